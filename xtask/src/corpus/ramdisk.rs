//! What a guest needs beside its own first file system: the modules of the corpus, compiled probes, the load. Appended to that
//! file system as a second archive.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Entry;
use super::modules::Module;
use crate::cpio::{self, Archive};
use crate::run;

/// Forks, reads /proc, writes files and talks over the loopback device for as long as the guest lives, with pauses: the guest has
/// other work to do.
const LOAD: &str = "#!/bin/sh
ip link set lo up
while :; do
    cat /proc/[0-9]*/stat /proc/meminfo /proc/net/sockstat > /dev/null 2>&1
    dd if=/dev/zero of=/tmp/loaded bs=4096 count=16 2> /dev/null
    ls -l /proc/self/fd /sys/class > /dev/null
    rm -f /tmp/loaded
    nc -l -p 7777 > /dev/null &
    usleep 30000
    echo load | nc -w 1 127.0.0.1 7777 > /dev/null 2>&1
    kill $! 2> /dev/null
    wait
    usleep 100000
done
";

/// Both archives as one file: `base`, then ours.
pub(crate) fn make(
    base: &Path,
    modules: &[Module],
    entries: &[Entry],
    scratch: &Path,
) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("corpus")?;
    archive.file("corpus/load", 0o755, LOAD.as_bytes())?;
    for module in modules {
        archive.file(&format!("corpus/{}.ko", module.name), 0o644, &module.bytes)?;
    }
    for entry in entries {
        if let Some(source) = entry.program() {
            archive.file(
                &program(&entry.name)[1..],
                0o755,
                &compile(&source, scratch)?,
            )?;
        }
    }
    cpio::behind(base, &archive.finish()?)
}

/// Where the compiled probe of an entry lies in the guest.
pub(crate) fn program(name: &str) -> String {
    format!("/corpus/{name}.probe")
}

/// Where a module lies in the guest.
pub(crate) fn module(name: &str) -> String {
    format!("/corpus/{name}.ko")
}

fn compile(source: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let program = scratch.join("probe");
    run::quiet(
        Command::new("gcc-12")
            .args(["-Wall", "-Werror", "-O1", "-static", "-s", "-o"])
            .arg(&program)
            .arg(source),
    )
    .with_context(|| format!("{} does not compile", source.display()))?;
    fs::read(&program).with_context(|| format!("cannot read {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_a_script_that_a_shell_reads() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("load");
        fs::write(&script, LOAD).unwrap();
        let read = Command::new("sh").arg("-n").arg(&script).status().unwrap();
        assert!(read.success());
    }
}
