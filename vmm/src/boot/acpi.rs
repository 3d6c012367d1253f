//! The ACPI tables: which CPUs, interrupt controllers and devices there are, and how to switch off and
//! reset. Owns the tables' content and place; the registers they name are [`crate::devices`]'.
//!
//! Not hardware-reduced: that drops PIC and PIT, by which a kernel without kvmclock calibrates its TSC.
//! There is no SMI port, so ACPI mode is always on. The FADT says that keyboard controller, VGA and CMOS
//! clock are absent, so that nobody waits for them.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::MemoryError;
use zerocopy::{Immutable, IntoBytes};

use super::map;
use crate::devices::power::S5_SLEEP_TYPE;
use crate::devices::{Com1, PowerManagement, ResetControl};
use crate::memory::GuestMemory;

/// Start of the PM1a block in port space.
pub const PM1A_PORT: u16 = 0x600;
/// The system control interrupt, on a PC.
pub const SCI: u8 = 9;

const OEM: [u8; 6] = *b"VMPTCH";
const OEM_TABLE: [u8; 8] = *b"VMPATCH ";
const OEM_REVISION: u32 = 1;
/// KVM's IOAPIC and local APICs, where a PC has them.
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// `IAPC_BOOT_ARCH`: no VGA to probe, no CMOS clock (ACPI 6.5, table 5.10). Bit 1 is clear: no 8042.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// Flags of a MADT override: active high, level-triggered (ACPI 6.5, table 5.26).
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
/// Tables begin at multiples of this; the FACS needs 64, the RSDP 16.
const ALIGNMENT: u64 = 64;

/// Tables in the making: each is placed after the one before.
struct Tables {
    next: Gpa,
    placed: Vec<(Gpa, Vec<u8>)>,
}

impl Tables {
    fn place(&mut self, table: &dyn Aml) -> Gpa {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.next = Gpa(at.0.saturating_add(size).next_multiple_of(ALIGNMENT));
        self.placed.push((at, bytes));
        at
    }
}

/// Writes the tables of a machine with `vcpus` CPUs; where their root is.
///
/// # Errors
/// [`MemoryError`] where they do not fit below 1 MiB or there is no RAM.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<Gpa, MemoryError> {
    let (rsdp, placed) = tables(vcpus);
    for (at, bytes) in &placed {
        let end = u64::try_from(bytes.len())
            .ok()
            .and_then(|len| at.checked_add(len));
        if end.is_none_or(|end| end > map::ACPI.end) {
            return Err(MemoryError::NotBacked {
                at: *at,
                len: bytes.len(),
            });
        }
        memory.write(*at, bytes)?;
    }
    Ok(rsdp)
}

fn tables(vcpus: u8) -> (Gpa, Vec<(Gpa, Vec<u8>)>) {
    let rsdp = map::ACPI.start;
    let mut tables = Tables {
        next: Gpa(rsdp.0 + ALIGNMENT),
        placed: Vec::new(),
    };
    let facs = tables.place(&FACS::new());
    let dsdt = tables.place(&dsdt());
    let fadt = tables.place(&fadt(facs, dsdt));
    let madt = tables.place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = tables.place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut root);
    tables.placed.push((rsdp, root));
    (rsdp, tables.placed)
}

fn fadt(facs: Gpa, dsdt: Gpa) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(low(facs))
        .dsdt_32(low(dsdt))
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    let control = PM1A_PORT + PowerManagement::CONTROL_OFFSET;
    fadt.x_dsdt = dsdt.0.into();
    fadt.sci_int = u16::from(SCI).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(PM1A_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(control, 16, AccessSize::WordAccess);
    fadt.reset_reg = port(ResetControl::PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = ResetControl::RESET;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.finalize()
}

/// Latencies above 100 and 1000 µs say that there is no C2 and no C3 (ACPI 6.5, table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

fn port(number: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, number.into())
}

/// An address in the first MiB as a field of 32 bits.
fn low(at: Gpa) -> u32 {
    u32::try_from(at.0).unwrap_or(u32::MAX)
}

fn madt(vcpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(LAPIC_ADDRESS);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // An IOAPIC's id must not be a local APIC's.
    madt.add_structure(IoApic::new(vcpus, IOAPIC_ADDRESS, 0));
    madt.add_structure(SourceOverride::level(SCI));
    madt.add_structure(LocalApicNmi::on_lint1());
    madt
}

/// MADT interrupt source override (ACPI 6.5, 5.2.12.5). ISA interrupts not named keep their number and
/// are edge-triggered.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    interrupt: [u8; 4],
    flags: [u8; 2],
}

impl SourceOverride {
    fn level(source: u8) -> Self {
        let interrupt = u32::from(source).to_le_bytes();
        let flags = ACTIVE_HIGH_LEVEL.to_le_bytes();
        Self {
            kind: 2,
            length: 10,
            bus: 0,
            source,
            interrupt,
            flags,
        }
    }
}

impl Aml for SourceOverride {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

/// MADT local APIC NMI (ACPI 6.5, 5.2.12.7).
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    processor: u8,
    flags: [u8; 2],
    pin: u8,
}

impl LocalApicNmi {
    const fn on_lint1() -> Self {
        Self {
            kind: 4,
            length: 6,
            processor: 0xff,
            flags: [0; 2],
            pin: 1,
        }
    }
}

impl Aml for LocalApicNmi {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

/// COM1, and S5: all a stock kernel needs to speak and to switch off.
fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    let identity = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let number = Name::new("_UID".into(), &ZERO);
    let ports = IO::new(Com1::PORT, Com1::PORT, 1, COM1_PORTS);
    let interrupt = Interrupt::new(true, true, false, false, Com1::IRQ.into());
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let settings = Name::new("_CRS".into(), &resources);
    let com1 = Device::new("COM1".into(), vec![&identity, &number, &settings]);
    Scope::new(Path::new("_SB_"), vec![&com1]).to_aml_bytes(&mut aml);
    let sleep = Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &sleep).to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_SIZE, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

const COM1_PORTS: u8 = Com1::SIZE as u8;
/// Size of a table's common header in bytes.
const HEADER_SIZE: u32 = 36;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;
    use std::fs;
    use std::process::Command;
    use vmpatch_introspect::target::PhysicalMemory;

    fn memory() -> GuestMemory {
        GuestMemory::new(Layout::new(32 << 20, 40).unwrap()).unwrap()
    }

    fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// Every table that a guest finds, by its signature: followed from the root as a guest does.
    fn found(memory: &GuestMemory, rsdp: Gpa) -> Vec<(String, Vec<u8>)> {
        let root = read(memory, rsdp.0, 36);
        assert_eq!(
            (&root[..8], sum(&root[..20]), sum(&root)),
            (b"RSD PTR ".as_slice(), 0, 0)
        );
        let xsdt = table(memory, number(&root[24..32]));
        let mut tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(memory, number(entry)))
            .collect();
        tables.push(table(memory, number(&tables[0][140..148])));
        tables
            .into_iter()
            .map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table))
            .collect()
    }

    fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let len = number(&read(memory, at + 4, 4));
        let table = read(memory, at, usize::try_from(len).unwrap());
        assert_eq!(
            sum(&table),
            0,
            "checksum of {:?}",
            String::from_utf8_lossy(&table[..4])
        );
        table
    }

    #[test]
    fn a_guest_that_follows_the_root_finds_every_table_whole() {
        let memory = memory();
        let rsdp = write(&memory, 8).unwrap();
        let names: Vec<_> = found(&memory, rsdp)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["FACP", "APIC", "DSDT"]);
        assert_eq!(rsdp.0 % 16, 0);
    }

    #[test]
    fn the_fadt_names_the_registers_that_the_devices_have() {
        let memory = memory();
        let rsdp = write(&memory, 1).unwrap();
        let (_, fadt) = found(&memory, rsdp).swap_remove(0);
        let facs = number(&fadt[36..40]);
        assert_eq!(
            (read(&memory, facs, 4).as_slice(), facs % 64),
            (b"FACS".as_slice(), 0)
        );
        assert_eq!(
            (number(&fadt[56..60]), number(&fadt[64..68])),
            (0x600, 0x604)
        );
        assert_eq!((number(&fadt[120..128]), fadt[128]), (0xcf9, 6));
        assert_eq!(
            number(&fadt[48..52]),
            0,
            "no SMI port: ACPI mode is always on"
        );
        assert_eq!(number(&fadt[112..116]) & 1 << 20, 0, "not hardware-reduced");
    }

    #[test]
    fn the_madt_lists_every_vcpu_once() {
        let memory = memory();
        let rsdp = write(&memory, 3).unwrap();
        let (_, madt) = found(&memory, rsdp).swap_remove(1);
        let (mut rest, mut lapics, mut kinds) = (&madt[44..], Vec::new(), Vec::new());
        while let [kind, length, ..] = *rest {
            kinds.push(kind);
            if kind == 0 {
                lapics.push((rest[3], number(&rest[4..8])));
            }
            rest = &rest[usize::from(length)..];
        }
        assert_eq!(lapics, [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(kinds, [0, 0, 0, 1, 2, 4]);
    }

    #[test]
    fn iasl_reads_every_table_without_complaint() {
        if Command::new("iasl").arg("-v").output().is_err() {
            return eprintln!("SKIPPED: iasl (package acpica-tools) is not installed");
        }
        let memory = memory();
        let rsdp = write(&memory, 2).unwrap();
        for (name, bytes) in found(&memory, rsdp) {
            let source = disassemble(&name, &bytes);
            if name == "DSDT" {
                for expected in ["PNP0501", "0x03F8", "Name (_S5, Package", "_CRS"] {
                    assert!(source.contains(expected), "{expected} in {source}");
                }
            }
        }
    }

    fn disassemble(name: &str, bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.dat");
        fs::write(&path, bytes).unwrap();
        let output = Command::new("iasl").arg("-d").arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {said}");
        for complaint in ["Error", "Warning", "Invalid", "mismatch"] {
            assert!(!said.contains(complaint), "{name}: {said}");
        }
        fs::read_to_string(path.with_extension("dsl")).unwrap()
    }
}
