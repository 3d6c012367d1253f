//! `vmpatch`: the command line. Parses, calls one verb, prints what came of it and turns it into an
//! exit code. Owns no logic of patching: that is [`flow`] and the crates below it.

mod cli;
mod detach;
mod exit;
mod flow;
mod live;
mod report;
mod verbs;
mod verdict;
mod watch;

use clap::Parser;

use crate::cli::Cli;
use crate::exit::ExitCode;

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    report::start_log(cli.verbose);
    let output = report::Output::new(cli.json);
    let code = match verbs::run(cli.verb, &output) {
        Ok(()) => ExitCode::Done,
        Err(failure) => {
            output.failure(&failure);
            failure.exit_code()
        }
    };
    code.into()
}
