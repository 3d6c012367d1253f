//! The first MiB of guest RAM, and the memory map that the guest is told of (e820). Owns addresses; what
//! is written there is the business of the files beside this one.

use vmpatch_introspect::address::{Gpa, GpaRange};

use crate::memory::Layout;

/// Global descriptor table of the boot protocol: four descriptors.
pub const GDT: Gpa = Gpa(0x500);
/// The zero page: `struct boot_params`.
pub const BOOT_PARAMS: Gpa = Gpa(0x7000);
/// Top of a small stack, for kernels that push before they have set up their own.
pub const BOOT_STACK: Gpa = Gpa(0x8ff0);
/// Page tables: one page of level 4, one of level 3, then one of level 2 for each GiB mapped.
pub const PAGE_TABLES: Gpa = Gpa(0x9000);
/// The command line, at most [`CMDLINE_ROOM`] bytes with its final zero.
pub const CMDLINE: Gpa = Gpa(0x2_0000);
/// Room for the command line. Kernels take 2048 (`COMMAND_LINE_SIZE`, Linux v6.12
/// arch/x86/include/asm/setup.h).
pub const CMDLINE_ROOM: u64 = 0x1_0000;
/// Where a PC has its extended BIOS data area: from here to 1 MiB is no RAM for the guest.
pub const LOW_RAM_END: Gpa = Gpa(0x9_fc00);
/// ACPI tables, in the area that kernels search for them (ACPI 6.5, 5.2.5.1).
pub const ACPI: GpaRange = GpaRange {
    start: Gpa(0xe_0000),
    end: HIGH_RAM,
};
/// RAM goes on at 1 MiB.
pub const HIGH_RAM: Gpa = Gpa(0x10_0000);

/// Kind of an e820 entry (Linux v6.12 arch/x86/include/asm/e820/types.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM for the guest to use.
    Ram = 1,
    /// Not to be touched: here, the BIOS areas with the ACPI tables.
    Reserved = 2,
}

/// The memory map: sorted, without overlaps. The arena is not in it.
#[must_use]
pub fn e820(layout: &Layout) -> Vec<(GpaRange, Kind)> {
    let mut map = vec![
        (
            GpaRange {
                start: Gpa(0),
                end: LOW_RAM_END,
            },
            Kind::Ram,
        ),
        (
            GpaRange {
                start: LOW_RAM_END,
                end: HIGH_RAM,
            },
            Kind::Reserved,
        ),
    ];
    for &range in layout.ram() {
        let start = range.start.max(HIGH_RAM);
        map.push((
            GpaRange {
                start,
                end: range.end,
            },
            Kind::Ram,
        ));
    }
    map.retain(|(range, _)| !range.is_empty());
    map
}

/// RAM below the hole from 1 MiB on: where kernel and initial RAM disk go.
#[must_use]
pub fn low_ram(layout: &Layout) -> GpaRange {
    let end = layout.ram().first().map_or(HIGH_RAM, |range| range.end);
    GpaRange {
        start: HIGH_RAM,
        end: end.max(HIGH_RAM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(gib: u64) -> Vec<(u64, u64, u32)> {
        let layout = Layout::new(gib << 30, 40).unwrap();
        let map = e820(&layout);
        map.into_iter()
            .map(|(range, kind)| (range.start.0, range.end.0, kind as u32))
            .collect()
    }

    #[test]
    fn a_small_machine_has_ram_bios_and_ram() {
        let expected = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x10_0000, 2),
            (0x10_0000, 0x4000_0000, 1),
        ];
        assert_eq!(spans(1), expected);
    }

    #[test]
    fn a_large_machine_has_nothing_in_the_hole() {
        assert_eq!(
            spans(8)[2..],
            [(0x10_0000, 0xc000_0000, 1), (1 << 32, 9 << 30, 1)]
        );
    }

    #[test]
    fn the_fixed_areas_do_not_touch_each_other() {
        let page_tables_end = PAGE_TABLES.0 + 6 * 4096;
        let areas = [
            (GDT.0, GDT.0 + 32),
            (BOOT_PARAMS.0, BOOT_PARAMS.0 + 4096),
            (BOOT_STACK.0 - 0x100, BOOT_STACK.0),
            (PAGE_TABLES.0, page_tables_end),
            (CMDLINE.0, CMDLINE.0 + CMDLINE_ROOM),
            (LOW_RAM_END.0, ACPI.start.0),
            (ACPI.start.0, ACPI.end.0),
        ];
        assert!(
            areas.windows(2).all(|pair| pair[0].1 <= pair[1].0),
            "{areas:x?}"
        );
    }
}
