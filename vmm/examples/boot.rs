//! Boots a kernel on this machine's KVM, console on standard output, and says how it ended.
//!
//! ```text
//! cargo run -p vmpatch-vmm --example boot -- KERNEL [--initrd FILE] [--cmdline TEXT] [--vcpus N]
//!     [--memory MIB] [--assist-emulation]
//! ```
//!
//! Exit code: 0 after power-off, 10 after reset, 1 otherwise.

use std::process::ExitCode;

use vmpatch_vmm::config::{ConsoleKind, MachineConfig};
use vmpatch_vmm::machine::Machine;
use vmpatch_vmm::vm::Outcome;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = parse(std::env::args().skip(1))?;
    let finished = Machine::build(&config)?.start()?.wait();
    eprintln!("boot: {finished}");
    Ok(match finished.outcome {
        Outcome::PowerOff => ExitCode::SUCCESS,
        Outcome::Reset => ExitCode::from(10),
        _ => ExitCode::FAILURE,
    })
}

fn parse(
    mut args: impl Iterator<Item = String>,
) -> Result<MachineConfig, Box<dyn std::error::Error>> {
    let mut config = MachineConfig {
        id: "boot".into(),
        kernel: args.next().ok_or("which kernel?")?.into(),
        initrd: None,
        cmdline: "console=ttyS0".into(),
        vcpus: 1,
        memory: 256 << 20,
        console: ConsoleKind::Stdio,
        assist_emulation: false,
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--initrd" => config.initrd = Some(value()?.into()),
            "--cmdline" => config.cmdline = value()?,
            "--vcpus" => config.vcpus = value()?.parse()?,
            "--memory" => config.memory = value()?.parse::<u64>()? << 20,
            "--assist-emulation" => config.assist_emulation = true,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    Ok(config)
}
