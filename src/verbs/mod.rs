//! One file a verb, or a family of verbs.

mod build;
mod change;
mod inspect;
mod machines;
mod reconcile;
mod run;
mod status;

use crate::cli::Verb;
use crate::exit::Failure;
use crate::report::Output;

/// Does what was asked.
pub(crate) fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Run(asked) => run::run(&asked, output),
        Verb::List => machines::list(output),
        Verb::Pause(vm) => machines::pause(&vm.vm, output),
        Verb::Resume(vm) => machines::resume(&vm.vm, output),
        Verb::Stop(vm) => machines::stop(&vm.vm, output),
        Verb::Inspect(asked) => inspect::run(asked.what, output),
        Verb::Build(asked) => build::run(&asked, output),
        Verb::Check(asked) => change::check(&asked, output),
        Verb::Apply(asked) => change::apply(&asked, output),
        Verb::Reconcile(asked) => reconcile::run(&asked, output),
        Verb::Status(vm) => status::run(&vm.vm, output),
        Verb::Rollback(asked) => change::roll_back(&asked, output),
    }
}
