//! `vmpatch inspect kernel`: which kernel runs and where it lies.

use serde::Serialize;
use vmpatch_introspect::identity::Identity;
use vmpatch_introspect::{Gva, GvaRange};

use crate::exit::Failure;
use crate::live::Live;
use crate::report::{Output, table};

#[derive(Serialize)]
struct Answer {
    vm: String,
    #[serde(flatten)]
    identity: Identity,
    text: GvaRange,
    page_tables: String,
    five_level_paging: bool,
    direct_map: Gva,
    possible_cpus: usize,
    symbols: usize,
}

pub(super) fn show(vm: &str, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(vm)?;
    let layout = &seen.kernel.layout;
    let answer = Answer {
        vm: vm.to_owned(),
        identity: seen.kernel.identity.clone(),
        text: layout.text,
        page_tables: layout.space.root.to_string(),
        five_level_paging: layout.space.five_level,
        direct_map: layout.direct_map,
        possible_cpus: layout.per_cpu_offset.len(),
        symbols: seen.kernel.symbols.len(),
    };
    output.answer(&answer, text);
    Ok(())
}

fn text(answer: &Answer) -> String {
    let identity = &answer.identity;
    let levels = if answer.five_level_paging {
        "five levels"
    } else {
        "four levels"
    };
    table::pairs(&[
        ("release", identity.release.clone()),
        ("banner", identity.banner.clone()),
        (
            "build id",
            identity
                .build_id
                .clone()
                .unwrap_or_else(|| "not in memory".to_owned()),
        ),
        ("boot", identity.boot.clone()),
        ("KASLR slide", format!("{:#x}", identity.slide)),
        ("phys base", format!("{:#x}", identity.phys_base)),
        ("text", answer.text.to_string()),
        ("page tables", format!("{} ({levels})", answer.page_tables)),
        ("direct map", answer.direct_map.to_string()),
        ("possible CPUs", answer.possible_cpus.to_string()),
        ("symbols", answer.symbols.to_string()),
    ])
}
