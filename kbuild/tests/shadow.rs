//! `vmpatch/shadow.h` in a program of threads, with what it takes from the kernel stood in for.
#![allow(clippy::unwrap_used, reason = "tests fail by it")]

use std::fs;
use std::path::Path;
use std::process::Command;

use vmpatch_kbuild::headers::HEADERS;

/// What it includes, all of which `kernel.h` has.
const INCLUDED: [&str; 9] = [
    "bit_spinlock",
    "hash",
    "irq_work",
    "irqflags",
    "kmemleak",
    "processor",
    "rcupdate",
    "slab",
    "types",
];

#[test]
fn data_are_found_and_counted_and_gone_whoever_else_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for folder in ["linux", "vmpatch"] {
        fs::create_dir(at.join(folder)).unwrap();
    }
    for (name, text) in HEADERS {
        fs::write(at.join(name), text).unwrap();
    }
    for name in INCLUDED {
        fs::write(at.join(format!("linux/{name}.h")), "").unwrap();
    }
    let program = at.join("shadow");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shadow/main.c");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=gnu11", "-O2", "-Wall", "-Werror", "-pthread", "-I"]);
    gcc.arg(at).arg("-o").arg(&program).arg(source);
    let made = gcc.output().unwrap();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{said}");
    let ran = Command::new(program).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}");
}
