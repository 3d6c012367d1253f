//! Small guests for the tests: a few bytes of 16-bit code, devices that record, vCPUs set up by hand.
// Each test file uses a part of it, and a helper that fails is a test that fails.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// What an access sets off.
pub type Call = Box<dyn FnMut() + Send>;

/// Devices that remember what was written and answer every read with the count of reads so far.
#[derive(Default)]
pub struct Recorder {
    pub written: Vec<u8>,
    pub reads: u8,
    /// Called on every access, on the vCPU's thread.
    pub on_access: Option<Call>,
}

/// The recorder, as the bus and the test share it.
pub type Shared = Arc<Mutex<Recorder>>;

pub fn recorder() -> Shared {
    Arc::default()
}

impl Recorder {
    fn accessed(&mut self) {
        if let Some(call) = self.on_access.as_mut() {
            call();
        }
    }
}

impl Device for Recorder {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.accessed();
        data.fill(self.reads);
        self.reads = self.reads.wrapping_add(1);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.accessed();
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
    /// The same with a handler for #BP at this address.
    Breakpoint(u16),
    /// 64 bits, interrupts on, all RAM mapped as it is.
    Long,
}

/// Top-level page table of [`Mode::Long`], with two tables after it.
const PAGE_TABLES: u64 = 0x10000;

/// Where descriptor tables lie, below the code.
const GDT: u64 = 0x500;
const IDT: u64 = 0x600;

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
    if let Mode::Breakpoint(handler) = mode {
        // Flat code and data segments; a 32-bit interrupt gate for vector 3.
        for (at, entry) in [
            (GDT + 8, 0x00cf_9b00_0000_ffff),
            (GDT + 16, 0x00cf_9300_0000_ffff),
            (IDT + 3 * 8, 0x8e00_0008_0000 | u64::from(handler)),
        ] {
            memory.write(Gpa(at), &u64::to_le_bytes(entry)).unwrap();
        }
    }
    if let Mode::Long = mode {
        // The last is a page of 2 MiB.
        let entries = [PAGE_TABLES + 0x1003, PAGE_TABLES + 0x2003, 0x83];
        for (level, entry) in (0..).zip(entries) {
            let at = Gpa(PAGE_TABLES + level * 0x1000);
            memory.write(at, &u64::to_le_bytes(entry)).unwrap();
        }
    }
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
    if let Mode::Protected | Mode::Breakpoint(_) = mode {
        sregs.cr0 |= 1;
        sregs.cs = flat(0xb, 8);
        let data = flat(0x3, 16);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.idt.limit = 0;
    }
    if let Mode::Breakpoint(_) = mode {
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 31);
    }
    if let Mode::Long = mode {
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = 0x620;
        sregs.efer = 0x500;
        sregs.cs = flat(0xb, 8);
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        let data = flat(0x3, 16);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.idt.limit = 0;
    }
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = CODE;
    regs.rsp = 0xf00;
    regs.rflags = if let Mode::Long = mode { 0x202 } else { 2 };
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

/// 32-bit code that starts every other vCPU at 16-bit address 0x2000, and then goes on.
pub const START_OTHERS: [u8; 20] = [
    // mov dword [0xfee00300], INIT to all but self
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, //
    // mov dword [0xfee00300], start-up IPI with vector 2
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x02, 0x46, 0x0c, 0x00,
];

/// Sleeps until `what` holds; a test that waits in vain fails.
pub fn eventually(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "it never happened");
        std::thread::sleep(Duration::from_millis(2));
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
