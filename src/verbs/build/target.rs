//! The kernel that is to be patched, if the call names it: in a file or in a VM.

use std::path::Path;

use vmpatch_kbuild::Running;

use super::objects::read;
use crate::cli::Build;
use crate::exit::Failure;
use crate::live::Live;

/// Looks at it.
pub(super) fn target(asked: &Build) -> Result<Option<Running>, Failure> {
    if let Some(id) = &asked.vm {
        let identity = Live::attach(id)?.kernel.identity;
        let running = Running::of_banner(&identity.banner, identity.build_id);
        return running
            .map(Some)
            .map_err(|error| Failure::refused(format!("VM {id}: {error}")));
    }
    asked.vmlinux.as_deref().map(of_file).transpose()
}

fn of_file(path: &Path) -> Result<Running, Failure> {
    let running = Running::of_vmlinux(&read(path, "vmlinux")?);
    running.map_err(|error| Failure::refused(format!("{}: {error}", path.display())))
}
