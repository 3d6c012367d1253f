//! `vmpatch`: the command line. Parses, calls one verb, prints what came of it and turns it into an
//! exit code. Owns no logic of patching: that is [`flow`] and the crates below it.

mod cli;
mod detach;
mod exit;
mod flow;
mod held;
mod live;
mod report;
mod verbs;
mod verdict;
mod watch;

use clap::Parser;

use crate::cli::Cli;
use crate::exit::{ExitCode, Failure};

fn main() -> std::process::ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| usage(&error));
    report::start_log(cli.verbose);
    // A detached child's messages are read by its parent, which then answers in the form asked for.
    let output = report::Output::new(cli.json && !detach::is_child());
    let code = match verbs::run(cli.verb, &output) {
        Ok(()) => ExitCode::Done,
        Err(failure) => {
            output.failure(&failure);
            failure.exit_code()
        }
    };
    code.into()
}

/// A call that makes no sense, in the form asked for as far as it was understood; or help, or the version.
fn usage(error: &clap::Error) -> ! {
    let json = std::env::args_os().any(|word| word == "--json");
    if error.use_stderr() && json {
        let failure = Failure::Usage(error.render().to_string().trim().to_owned());
        report::Output::new(true).failure(&failure);
        std::process::exit(2);
    }
    error.exit()
}
