//! Every developer command of vmpatch. Each sets up for itself what it needs. Owns nothing that the product uses.

mod apt;
mod checksum;
mod commands;
mod comparisons;
mod corpus;
mod cpio;
mod dependencies;
mod documents;
mod dumps;
mod emulator;
mod external;
mod extras;
mod host;
mod images;
mod inside;
mod manifest;
mod objects;
mod packages;
mod paths;
mod progress;
mod run;
mod source;
mod tally;
mod workbench;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

pub(crate) use vmpatch_kbuild::publish;

/// Developer commands of vmpatch
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the other commands need on this machine
    Setup,
    /// Boot a stock kernel, patch it while it runs, and take the patch back
    Demo(commands::demo::DemoArgs),
    /// Run unit tests, then end-to-end tests against real guests
    Test(commands::test::TestArgs),
    /// Apply and roll back many times in one boot of a busy guest
    Soak(commands::soak::SoakArgs),
    /// Put real fixes of Linux through the whole way of a patch
    Corpus(commands::corpus::CorpusArgs),
    /// Measure, each bench ending with one line of JSON
    #[command(subcommand)]
    Bench(commands::bench::Bench),
    /// Make guest images: kernel, first file system, planted module
    Images(commands::images::ImagesArgs),
    /// Compile the two objects that a test patch is made from
    #[command(hide = true)]
    Objects(commands::objects::ObjectsArgs),
    /// Check formatting, lints, the rule of dependencies and the documents
    Lint,
    /// Run one command in the test host
    Host(commands::host::HostArgs),
    /// A driver, started by the command of its name with everything prepared
    #[command(hide = true, subcommand)]
    Inside(inside::Inside),
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(task: Task) -> Result<i32> {
    match task {
        Task::Setup => commands::setup::tools().map(|_| 0),
        Task::Demo(args) => commands::demo::run(&args),
        Task::Test(args) => commands::test::run(&args),
        Task::Soak(args) => commands::soak::run(&args),
        Task::Corpus(args) => commands::corpus::run(&args),
        Task::Bench(bench) => commands::bench::run(&bench),
        Task::Images(args) => commands::images::run(&args),
        Task::Lint => commands::lint::run(),
        Task::Objects(args) => commands::objects::run(&args),
        Task::Host(args) => commands::host::run(args),
        Task::Inside(inside) => inside::run(&inside),
    }
}
