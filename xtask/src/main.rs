//! Every developer command of vmpatch. Each sets up for itself what it needs. Owns nothing that the product uses.

#![allow(dead_code)]

mod apt;
mod checksum;
mod commands;
mod cpio;
mod dependencies;
mod host;
mod images;
mod manifest;
mod objects;
mod packages;
mod paths;
mod progress;
mod publish;
mod readme;
mod run;
mod source;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    /// Make guest images: kernel, first file system, planted module
    Images(commands::images::ImagesArgs),
    /// Compile the two objects that a test patch is made from
    #[command(hide = true)]
    Objects(commands::objects::ObjectsArgs),
    /// Check formatting, lints, the rule of dependencies and the README
    Lint,
    /// Run one command in the test host
    Host(commands::host::HostArgs),
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
        Task::Images(args) => commands::images::run(&args),
        Task::Lint => commands::lint::run(),
        Task::Objects(args) => commands::objects::run(&args),
        Task::Host(args) => commands::host::run(args),
    }
}
