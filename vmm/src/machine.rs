//! A whole machine: what the user asked for, made from host, memory, devices, boot and [`Vm`]. Owns which
//! device sits where; the life of the vCPUs is [`crate::vm`]'s.
//!
//! ```text
//! MachineConfig ──build──▶ Machine ──start──▶ RunningMachine ──wait──▶ Outcome
//! ```

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vmpatch_introspect::address::Gva;
use vmpatch_introspect::vcpu::Vcpu;

use crate::boot::acpi::PM1A_PORT;
use crate::boot::{self, BootError};
use crate::bus::{Bus, BusError, Shared};
use crate::config::{ConfigError, MachineConfig};
use crate::devices::{Com1, Console, ConsoleError, I8042, PowerManagement, ResetControl};
use crate::host::{Host, HostError, Kind};
use crate::memory::{GuestMemory, Layout, LayoutError, SetupError};
use crate::vm::{Crash, Fault, Options, Outcome, Running, Vm, VmError};

/// A machine ready to run: memory filled, vCPUs set up, nothing executed yet.
#[derive(Debug)]
pub struct Machine {
    vm: Vm,
    devices: Devices,
    kind: Kind,
}

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// What was asked for cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This host cannot run it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The memory size cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host has no memory for it.
    #[error(transparent)]
    Memory(#[from] SetupError),
    /// Kernel, initial RAM disk or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Its console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The VM itself.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Two devices in one place.
    #[error("attaching a device: {0}")]
    Bus(#[from] BusError),
    /// COM1 has no interrupt.
    #[error("the serial port's interrupt: {0}")]
    Interrupt(io::Error),
}

impl Machine {
    /// Makes the machine: opens every file, fills memory, sets up every vCPU.
    ///
    /// # Errors
    /// [`MachineError`]: the first thing that cannot be had, and what would help.
    pub fn build(config: &MachineConfig) -> Result<Self, MachineError> {
        config.validate()?;
        let host = Host::open()?;
        host.require_hardware(config.assist_emulation)?;
        let memory = GuestMemory::new(Layout::new(config.memory, host.address_bits())?)?;
        let initrd = config.initrd.as_deref();
        let ready = boot::prepare(
            &memory,
            &config.kernel,
            initrd,
            &config.cmdline,
            config.vcpus,
        )?;
        let options = Options {
            assist_int3: config.assist_emulation,
        };
        let mut vm = Vm::new(host.kvm(), memory, options)?;
        for index in 0..config.vcpus {
            ready.set_vcpu(&host, vm.add_vcpu()?, index)?;
        }
        let devices = Devices::attach(&vm, config)?;
        Ok(Self {
            vm,
            devices,
            kind: host.kind(),
        })
    }

    /// Lets it run.
    ///
    /// # Errors
    /// [`MachineError`] where the host gives no thread.
    pub fn start(self) -> Result<RunningMachine, MachineError> {
        let Devices {
            bus,
            com1,
            mut console,
        } = self.devices;
        let running = self.vm.start(Arc::new(bus))?;
        let machine = Arc::downgrade(&running);
        let quit = move || {
            if let Some(machine) = machine.upgrade() {
                machine.terminate();
            }
        };
        console.connect(com1, Box::new(quit))?;
        Ok(RunningMachine {
            running,
            console,
            kind: self.kind,
        })
    }
}

/// Every device in its place, and the host's side of COM1.
struct Devices {
    bus: Bus,
    com1: Shared<Com1>,
    console: Console,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devices")
            .field("bus", &self.bus)
            .finish_non_exhaustive()
    }
}

impl Devices {
    fn attach(vm: &Vm, config: &MachineConfig) -> Result<Self, MachineError> {
        let mut bus = Bus::default();
        let console = Console::open(&config.console)?;
        let (com1, line) = Com1::new(console.output()).map_err(MachineError::Interrupt)?;
        vm.fd()
            .register_irqfd(&line, Com1::IRQ.into())
            .map_err(|error| MachineError::Interrupt(error.into()))?;
        let com1 = shared(com1);
        bus.attach_ports(Com1::PORT, Com1::SIZE, Arc::clone(&com1))?;
        bus.attach_ports(
            PM1A_PORT,
            PowerManagement::SIZE,
            shared(PowerManagement::new()),
        )?;
        bus.attach_ports(ResetControl::PORT, 1, shared(ResetControl::default()))?;
        bus.attach_ports(I8042::PORT, 1, shared(I8042))?;
        Ok(Self { bus, com1, console })
    }
}

fn shared<D>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

/// A machine whose vCPUs run.
#[derive(Debug)]
pub struct RunningMachine {
    running: Arc<Running>,
    console: Console,
    kind: Kind,
}

impl RunningMachine {
    /// Its vCPUs and memory.
    #[must_use]
    pub const fn vm(&self) -> &Arc<Running> {
        &self.running
    }

    /// The file or terminal of its console, if it has one.
    #[must_use]
    pub fn console_path(&self) -> Option<&Path> {
        self.console.path()
    }

    /// Waits until it has ended; all its output is out then, and the terminal as before.
    #[must_use]
    pub fn wait(self) -> Finished {
        let outcome = self.running.wait();
        Finished {
            outcome,
            kind: self.kind,
        }
    }
}

/// A machine that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How.
    pub outcome: Outcome,
    kind: Kind,
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.outcome.fmt(f)?;
        match hint(&self.outcome, self.kind) {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// What a user can do about the end of a machine, or should know of it.
fn hint(outcome: &Outcome, kind: Kind) -> Option<&'static str> {
    let Outcome::Crashed(crash) = outcome else {
        return None;
    };
    match (&crash.fault, kind) {
        (Fault::Internal { .. }, Kind::Software) => Some(
            "this KVM emulates the kernel's instructions and does not know this one; use a host \
             with svm or vmx, or a kernel configured without it",
        ),
        (Fault::TripleFault, _) if at_reset(crash) => Some(
            "on AMD, KVM resets a vCPU that takes a triple fault: these are no longer the guest's \
             registers; boot with earlyprintk=ttyS0 to see what came before",
        ),
        (Fault::TripleFault, _) => {
            Some("boot with earlyprintk=ttyS0 to see what the kernel said before")
        }
        (Fault::FailEntry { .. }, _) => Some("the host's kernel log may say more"),
        _ => None,
    }
}

/// Whether the registers are those of power-on: SVM leaves the guest's state undefined after a shutdown,
/// so KVM sets it anew before it tells us (Linux v6.12 arch/x86/kvm/svm/svm.c, `shutdown_interception`).
fn at_reset(crash: &Crash) -> bool {
    let power_on = |vcpu: &Vcpu| (vcpu.cs, vcpu.rip) == (0xf000, Gva(0xfff0));
    crash.registers.as_ref().is_some_and(power_on)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::map::PAGE_TABLES;
    use crate::boot::testing;
    use crate::config::ConsoleKind;
    use vmpatch_introspect::address::Gpa;
    use vmpatch_introspect::target::PhysicalMemory;

    fn config(kernel: &Path) -> MachineConfig {
        MachineConfig {
            id: "test".into(),
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            vcpus: 2,
            memory: 64 << 20,
            console: ConsoleKind::Pty,
            assist_emulation: true,
        }
    }

    /// A vmlinux that is a few instructions.
    fn image(code: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), testing::vmlinux(code, 0x100_0000, 0)).unwrap();
        file
    }

    fn run(code: &[u8]) -> Option<Finished> {
        if Host::open().is_err() {
            eprintln!("SKIPPED: no /dev/kvm");
            return None;
        }
        let image = image(code);
        let machine = Machine::build(&config(image.path())).unwrap();
        Some(machine.start().unwrap().wait())
    }

    #[test]
    fn the_first_vcpu_starts_in_64_bit_mode_with_the_zero_page_and_can_switch_off() {
        // cmp word [rsi+0x1fe], 0xaa55; jne to hlt; mov dx, 0x604; mov ax, 0x3401; out dx, ax; hlt
        let code = [
            0x66, 0x81, 0xbe, 0xfe, 0x01, 0x00, 0x00, 0x55, 0xaa, 0x75, 0x0a, 0x66, 0xba, 0x04,
            0x06, 0x66, 0xb8, 0x01, 0x34, 0x66, 0xef, 0xf4,
        ];
        let Some(finished) = run(&code) else { return };
        assert_eq!(finished.outcome, Outcome::PowerOff);
    }

    #[test]
    fn an_fwait_that_kvm_cannot_emulate_is_helped_over() {
        // fwait; then power-off as above.
        let code = [
            0x9b, 0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x01, 0x34, 0x66, 0xef, 0xf4,
        ];
        let Some(finished) = run(&code) else { return };
        assert_eq!(finished.outcome, Outcome::PowerOff, "{finished}");
    }

    #[test]
    fn a_vcpu_reaches_the_arena_where_the_layout_puts_it() {
        if Host::open().is_err() {
            return eprintln!("SKIPPED: no /dev/kvm");
        }
        // mov rax, 1 << 39; mov dword [rax], 0x616e6572; then power-off as above.
        let code = [
            0x48, 0xb8, 0x00, 0x00, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0xc7, 0x00, 0x72, 0x65,
            0x6e, 0x61, 0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x01, 0x34, 0x66, 0xef, 0xf4,
        ];
        let image = image(&code);
        let machine = Machine::build(&config(image.path())).unwrap();
        let memory = machine.vm.memory().clone();
        let arena = memory.layout().arena();
        // One page-table path for address 1 << 39: level 4, 3 and 2, the last a 2 MiB page.
        let entries = [
            (PAGE_TABLES.0 + 8, 0x1_0003),
            (0x1_0000, 0x1_1003),
            (0x1_1000, arena.start.0 | 0x83),
        ];
        for (at, entry) in entries {
            memory.write(Gpa(at), &u64::to_le_bytes(entry)).unwrap();
        }
        let finished = machine.start().unwrap().wait();
        assert_eq!(finished.outcome, Outcome::PowerOff, "{finished}");
        let mut written = [0; 4];
        memory.read(arena.start, &mut written).unwrap();
        assert_eq!(&written, b"rena");
    }

    #[test]
    fn acpis_reset_register_ends_the_machine_with_a_reset() {
        // mov dx, 0xcf9; mov al, 6; out dx, al; hlt
        let Some(finished) = run(&[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4]) else {
            return;
        };
        assert_eq!(finished.outcome, Outcome::Reset);
    }

    #[test]
    fn a_triple_fault_is_reported_with_registers_and_a_hint() {
        // mov eax, 0x12345678; ud2
        let Some(finished) = run(&[0xb8, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x0b]) else {
            return;
        };
        let report = finished.to_string();
        for expected in ["vCPU 0", "triple fault", "hint: boot", "rax"] {
            let on_amd = expected == "hint: boot" && report.contains("hint: on AMD");
            assert!(
                on_amd || report.contains(expected),
                "{expected:?} in {report}"
            );
        }
        let kept = report.contains("0000000012345678");
        assert_ne!(kept, report.contains("no longer the guest's"), "{report}");
    }

    #[test]
    fn a_software_kvm_gets_a_hint_that_hardware_would_help() {
        let crash = Crash {
            vcpu: 0,
            fault: Fault::Internal { suberror: 1 },
            registers: None,
            code: vec![],
        };
        let outcome = Outcome::Crashed(Box::new(crash));
        let report = |kind| {
            Finished {
                outcome: outcome.clone(),
                kind,
            }
            .to_string()
        };
        assert!(report(Kind::Software).contains("svm or vmx"));
        assert!(!report(Kind::Hardware).contains("svm or vmx"));
    }
}
