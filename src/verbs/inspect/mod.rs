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

/// Code addresses by name, over the kernel and its modules, the way /proc/PID/stack prints them.
struct Names<'a> {
    kernel: &'a Kernel,
    modules: &'a [Module],
}

impl Names<'_> {
    /// `function+0x12/0x34`, with ` [module]` behind it for a module's, or the bare address.
    ///
    /// Modules first: vmlinux's last symbol has no end, and modules lie above it.
    fn name(&self, at: Gva) -> String {
        let module = self.modules.iter().find(|module| module.text.contains(at));
        let name = match module {
            Some(module) => {
                symbolised(&module.symbols, at).map(|name| format!("{name} [{}]", module.name))
            }
            None if self.kernel.layout.text.contains(at) => symbolised(&self.kernel.symbols, at),
            None => None,
        };
        name.unwrap_or_else(|| at.to_string())
    }
}

fn symbolised(symbols: &vmpatch_introspect::symbols::Symbols, at: Gva) -> Option<String> {
    let (symbol, next) = symbols.containing(at)?;
    let offset = at.0.checked_sub(symbol.at.0)?;
    let size = next.0.checked_sub(symbol.at.0)?;
    Some(format!("{}+{offset:#x}/{size:#x}", symbol.name))
}
