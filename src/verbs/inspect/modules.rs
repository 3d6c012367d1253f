//! `vmpatch inspect modules`: what /proc/modules shows, and where each module's text lies.

use serde::Serialize;
use vmpatch_introspect::GvaRange;
use vmpatch_introspect::modules::{Module, ModuleState};

use crate::exit::Failure;
use crate::live::Live;
use crate::report::{Output, table};

#[derive(Serialize)]
struct Row {
    name: String,
    state: ModuleState,
    text: GvaRange,
    symbols: usize,
    unwind_tables: bool,
}

impl From<&Module> for Row {
    fn from(module: &Module) -> Self {
        Self {
            name: module.name.clone(),
            state: module.state,
            text: module.text,
            symbols: module.symbols.len(),
            unwind_tables: module.orc.is_some(),
        }
    }
}

pub(super) fn show(vm: &str, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(vm)?;
    let modules = seen.modules()?;
    let rows: Vec<Row> = modules.iter().map(Row::from).collect();
    output.answer(&rows, |rows| {
        table::table(
            &["name", "state", "text", "size", "symbols"],
            rows.iter().map(|row| {
                [
                    row.name.clone(),
                    format!("{:?}", row.state).to_lowercase(),
                    row.text.start.to_string(),
                    row.text.size().to_string(),
                    row.symbols.to_string(),
                ]
            }),
        )
    });
    Ok(())
}
