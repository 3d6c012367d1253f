//! `vmpatch inspect`: a guest kernel seen from outside. One file for each thing to look at.

mod dmesg;
mod kernel;
mod modules;
mod stacks;
mod symbols;
mod tasks;
mod vcpus;

use vmpatch_introspect::modules::Module;
use vmpatch_introspect::{Gva, Kernel};
use vmpatch_patcher::arena::PatchRecord;

use crate::cli::InspectWhat;
use crate::exit::Failure;
use crate::report::Output;

/// Shows what was asked for.
pub(crate) fn run(what: InspectWhat, output: &Output) -> Result<(), Failure> {
    match what {
        InspectWhat::Kernel(vm) => kernel::show(&vm.vm, output),
        InspectWhat::Symbols(symbols) => symbols::show(&symbols, output),
        InspectWhat::Modules(vm) => modules::show(&vm.vm, output),
        InspectWhat::Tasks(vm) => tasks::show(&vm.vm, output),
        InspectWhat::Stacks(stacks) => stacks::show(&stacks, output),
        InspectWhat::Dmesg(vm) => dmesg::show(&vm.vm, output),
        InspectWhat::Vcpus(vm) => vcpus::show(&vm.vm, output),
    }
}

/// Code addresses by name, over the kernel, its modules and patches, the way /proc/PID/stack prints them.
struct Names<'a> {
    kernel: &'a Kernel,
    modules: &'a [Module],
    placed: &'a [PatchRecord],
}

impl Names<'_> {
    /// `function+0x12/0x34`, with ` [module]` behind it for a module's and ` [patch NAME]` for new code, or the bare address.
    ///
    /// Modules first: vmlinux's last symbol has no end, and modules lie above it.
    fn name(&self, at: Gva) -> String {
        let module = self.modules.iter().find(|module| module.text.contains(at));
        let name = match module {
            Some(module) => {
                symbolised(&module.symbols, at).map(|name| format!("{name} [{}]", module.name))
            }
            None if self.kernel.layout.text.contains(at) => symbolised(&self.kernel.symbols, at),
            None => self.in_new_code(at),
        };
        name.unwrap_or_else(|| at.to_string())
    }

    fn in_new_code(&self, at: Gva) -> Option<String> {
        self.placed.iter().find_map(|patch| {
            let mut functions = patch.busy_for_rollback();
            let new = functions.find(|new| new.range.contains(at))?;
            let offset = at.0.checked_sub(new.range.start.0)?;
            let (name, size) = (&new.function, new.range.size());
            Some(format!(
                "{name}+{offset:#x}/{size:#x} [patch {}]",
                patch.name
            ))
        })
    }
}

fn symbolised(symbols: &vmpatch_introspect::symbols::Symbols, at: Gva) -> Option<String> {
    let (symbol, next) = symbols.containing(at)?;
    let offset = at.0.checked_sub(symbol.at.0)?;
    let size = next.0.checked_sub(symbol.at.0)?;
    Some(format!("{}+{offset:#x}/{size:#x}", symbol.name))
}
