//! Small guests for the tests: a few bytes of 16-bit code, devices that record, vCPUs set up by hand.
// Each test file uses a part of it, and a helper that fails is a test that fails.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;
use vmpatch_introspect::address::Gpa;
use vmpatch_vmm::bus::{Bus, Device, Effect};
use vmpatch_vmm::client::{Description, KvmTarget};
use vmpatch_vmm::control::{ControlServer, RunDir};
use vmpatch_vmm::memory::{GuestMemory, Layout};
use vmpatch_vmm::vm::{Options, Running, Vm};

/// Where the code lies, and where its vCPUs begin.
pub const CODE: u64 = 0x1000;
/// Guest RAM in bytes.
pub const RAM: u64 = 2 << 20;
/// A page of the recorder's in guest-physical space.
pub const MMIO: u64 = 0xd000_0000;
/// The port that switches the machine off.
pub const OFF_PORT: u64 = 0xf4;
/// The port that resets it.
pub const RESET_PORT: u64 = 0xf5;

/// The host's KVM, or `None`, loudly, where there is none.
pub fn kvm() -> Option<Kvm> {
    let kvm = Kvm::new();
    if let Err(error) = &kvm {
        eprintln!("SKIPPED: no /dev/kvm on this machine: {error}");
    }
    kvm.ok()
}

/// What a port write sets off.
pub type Call = Box<dyn FnMut(u64, &[u8]) + Send>;

/// Devices that remember what was written and answer every read with the count of reads so far.
#[derive(Default)]
pub struct Recorder {
    pub written: Vec<u8>,
    pub reads: u8,
    /// Called on every write, on the vCPU's thread.
    pub on_write: Option<Call>,
}

/// The recorder, as the bus and the test share it.
pub type Shared = Arc<Mutex<Recorder>>;

pub fn recorder() -> Shared {
    Arc::default()
}

impl Device for Recorder {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.reads);
        self.reads = self.reads.wrapping_add(1);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(call) = self.on_write.as_mut() {
            call(offset, data);
        }
        self.written.extend_from_slice(data);
        match offset {
            OFF_PORT => Effect::PowerOff,
            RESET_PORT => Effect::Reset,
            _ => Effect::None,
        }
    }
}

/// How the boot vCPU begins.
#[derive(Clone, Copy)]
pub enum Mode {
    /// 16 bits, segments at 0.
    Real,
    /// 32 bits, flat segments, no paging, an empty interrupt table.
    Protected,
}

/// A guest whose boot vCPU runs `code` in real mode, with `vcpus` vCPUs in all.
pub fn guest(kvm: &Kvm, code: &[u8], vcpus: u32, devices: Shared) -> Arc<Running> {
    start(kvm, Mode::Real, code, vcpus, devices, Options::default())
}

/// A guest with one vCPU that runs `code` in `mode`.
pub fn guest_in(kvm: &Kvm, mode: Mode, code: &[u8], devices: Shared) -> Arc<Running> {
    start(kvm, mode, code, 1, devices, Options::default())
}

pub fn start(
    kvm: &Kvm,
    mode: Mode,
    code: &[u8],
    vcpus: u32,
    devices: Shared,
    options: Options,
) -> Arc<Running> {
    let memory = GuestMemory::new(Layout::new(RAM, 40).unwrap()).unwrap();
    memory.write(Gpa(CODE), code).unwrap();
    let mut vm = Vm::new(kvm, memory, options).unwrap();
    for index in 0..vcpus {
        let vcpu = vm.add_vcpu().unwrap();
        if index == 0 {
            set_up(vcpu, mode);
        }
    }
    let mut bus = Bus::default();
    bus.attach_ports(0, u16::MAX, devices.clone()).unwrap();
    bus.attach_mmio(MMIO, 0x1000, devices).unwrap();
    vm.start(Arc::new(bus)).unwrap()
}

/// RIP at the code, a stack below it.
fn set_up(vcpu: &kvm_ioctls::VcpuFd, mode: Mode) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    if let Mode::Protected = mode {
        sregs.cr0 |= 1;
        sregs.cs = flat(0xb, 8);
        let data = flat(0x3, 16);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.idt.limit = 0;
    }
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = CODE;
    regs.rsp = 0xf00;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
}

/// A 4 GiB segment of this type for privilege level 0.
fn flat(kind: u8, selector: u16) -> kvm_bindings::kvm_segment {
    kvm_bindings::kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// A machine with its control socket in a folder of its own.
pub struct Served {
    pub machine: Arc<Running>,
    pub server: ControlServer,
    pub base: tempfile::TempDir,
}

impl Served {
    pub fn new(machine: Arc<Running>) -> Self {
        let base = tempfile::tempdir().unwrap();
        let place = RunDir::claim(base.path(), "test").unwrap();
        let description = Description {
            id: "test".into(),
            pid: std::process::id(),
            vcpus: machine.vcpu_count(),
            memory: RAM,
            kernel: None,
        };
        let server = ControlServer::start(place, machine.clone(), description).unwrap();
        Self {
            machine,
            server,
            base,
        }
    }

    /// What `--vm` would be given.
    pub fn path(&self) -> String {
        self.server.place().path().to_str().unwrap().to_owned()
    }

    pub fn target(&self) -> KvmTarget {
        KvmTarget::connect(&self.path()).unwrap()
    }
}
