//! `cargo xtask host -- COMMAND…`: one command in the test host, for people who develop vmpatch.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::setup;
use crate::host::{self, Job};
use crate::paths;

/// Options of the command.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// The folder that the command can write to, besides /tmp [default: a new one in the cache, removed afterwards]
    #[arg(long)]
    out: Option<PathBuf>,
    /// End the machine after so many seconds
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// The command; it sees this machine's files under their own paths
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the command and returns its exit code.
pub(crate) fn run(args: HostArgs) -> Result<i32> {
    let manifest = setup::tools()?;
    let scratch = paths::cache()?
        .join("run")
        .join(std::process::id().to_string());
    let out = args.out.clone().unwrap_or_else(|| scratch.clone());
    let job = Job {
        argv: args.command,
        cwd: std::env::current_dir().context("no current folder")?,
        env: host_env(),
        out: std::path::absolute(out)?,
        limit: Duration::from_secs(args.limit),
    };
    let code = host::run(&manifest, &job)?;
    if args.out.is_none() && code == 0 {
        let _ = std::fs::remove_dir_all(scratch);
    }
    Ok(code)
}

/// Variables that a command finds in the test host.
pub(crate) fn host_env() -> Vec<(String, String)> {
    let mut env = vec![
        ("HOME".to_owned(), "/tmp".to_owned()),
        ("XDG_RUNTIME_DIR".to_owned(), "/run".to_owned()),
    ];
    for name in ["PATH", "RUST_LOG", "VMPATCH_CACHE"] {
        if let Ok(value) = std::env::var(name) {
            env.push((name.to_owned(), value));
        }
    }
    env
}
