//! `vmpatch inspect symbols`: what /proc/kallsyms shows, read from guest RAM.

use serde::Serialize;
use vmpatch_introspect::Gva;
use vmpatch_introspect::symbols::Symbol;

use crate::cli::Symbols;
use crate::exit::Failure;
use crate::live::Live;
use crate::report::Output;

#[derive(Serialize)]
struct Row {
    at: Gva,
    kind: char,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<String>,
}

pub(super) fn show(asked: &Symbols, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(&asked.vm.vm)?;
    let wanted = |symbol: &Symbol<'_>| asked.name.as_deref().is_none_or(|name| symbol.name == name);
    let mut rows: Vec<Row> = seen
        .kernel
        .symbols
        .iter()
        .filter(wanted)
        .map(|symbol| row(symbol, None))
        .collect();
    if asked.modules {
        for module in seen.modules()? {
            let own = module.symbols.iter().filter(wanted);
            rows.extend(own.map(|symbol| row(symbol, Some(module.name.clone()))));
        }
    }
    if rows.is_empty() {
        return Err(nothing_found(asked));
    }
    output.answer(&rows, |rows| {
        rows.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(())
}

fn row(symbol: Symbol<'_>, module: Option<String>) -> Row {
    Row {
        at: symbol.at,
        kind: symbol.kind,
        name: symbol.name.to_owned(),
        module,
    }
}

fn line(row: &Row) -> String {
    let module = row
        .module
        .as_ref()
        .map(|name| format!("\t[{name}]"))
        .unwrap_or_default();
    format!("{:016x} {} {}{module}", row.at.0, row.kind, row.name)
}

fn nothing_found(asked: &Symbols) -> Failure {
    let name = asked.name.as_deref().unwrap_or("any name");
    let hint = if asked.modules {
        ""
    } else {
        "; `--modules` looks into loaded modules too"
    };
    Failure::refused(format!("no symbol of {name} in the guest kernel{hint}"))
}
