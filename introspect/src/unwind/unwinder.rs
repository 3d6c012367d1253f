//! What unwinding needs to know of one kernel, read once while the guest runs: ORC tables of vmlinux and of
//! each module, or that there are frame pointers; trampolines; entry code.

use crate::address::{Gva, GvaRange};
use crate::deadline::Deadline;
use crate::kernel::{AttachError, Kernel};
use crate::modules::{ModuleOrc, ModulePlace};
use crate::paging::{KernelMemory, ReadError};
use crate::stacks::cpu::StackPlaces;
use crate::symbols::Symbols;
use crate::target::PhysicalMemory;
use crate::vcpu::Vcpu;

use super::chain::Chain;
use super::hidden::{Hidden, Hooks};
use super::memory::{StackKind, StackMemory, StackPool, StackSource, StackSpan};
use super::orc::raw::{ENTRY_SIZE, HEADER_SIZE};
use super::orc::table::MAX_ENTRIES;
use super::orc::{Entry, Format, Kind, Table, TableError};
use super::special::Special;
use super::walk::{Code, Start, Walk};
use super::{Frame, FrameKind, Trace, pt_regs};

/// Functions that every kernel has and that no compiler leaves without a frame where it makes frames.
const SAMPLE: [&str; 6] = [
    "schedule",
    "schedule_timeout",
    "do_exit",
    "kthread",
    "vfs_read",
    "worker_thread",
];

/// `push rbp; mov rbp, rsp`.
const PROLOGUE: [u8; 4] = [0x55, 0x48, 0x89, 0xe5];

/// How far into a function its prologue may begin: after `endbr64` and a call or nop for ftrace.
const PROLOGUE_WITHIN: usize = 24;

/// The unwind tables of a kernel and its modules, copied, so that a stop does not read them again.
#[derive(Debug, Default)]
pub struct Unwinder {
    /// Frames are found by frame pointers, not by tables.
    frame_pointers: bool,
    /// How ORC entries of this kernel are stored.
    format: Option<Format>,
    tables: Vec<Table>,
    /// Sorted by start, without overlaps.
    regions: Vec<Region>,
    hooks: Hooks,
    entry_text: Option<GvaRange>,
    /// Where a new task begins: not a return address though `inactive_task_frame` holds it.
    fork_return: Option<Gva>,
    places: StackPlaces,
    special: Special,
    /// The modules it was made for.
    modules: Vec<ModulePlace>,
}

/// Text with its table, if it has one.
#[derive(Debug, Clone, Copy)]
struct Region {
    range: GvaRange,
    table: Option<usize>,
}

impl Unwinder {
    /// Copies the tables. Modules loaded later are unknown to it: [`is_current`](Self::is_current) tells.
    ///
    /// # Errors
    /// Tables in an unknown format.
    pub fn load(
        kernel: &Kernel,
        physical: &dyn PhysicalMemory,
        modules: &[ModulePlace],
    ) -> Result<Self, AttachError> {
        let memory = kernel.memory(physical);
        let symbols = &kernel.symbols;
        let mut unwinder = Self {
            hooks: Hooks::new(symbols, &kernel.types),
            entry_text: between(symbols, "__entry_text_start", "__entry_text_end"),
            fork_return: ["ret_from_fork_asm", "ret_from_fork"]
                .iter()
                .find_map(|name| symbols.unique(name).ok()),
            places: StackPlaces::find(kernel),
            modules: modules.to_vec(),
            ..Self::default()
        };
        unwinder.special = Special::find(symbols, &memory, unwinder.entry_text);
        unwinder.add_vmlinux(kernel, &memory)?;
        unwinder.frame_pointers = unwinder.format.is_none() && makes_frames(symbols, &memory);
        for module in modules {
            unwinder.add_module(module, &memory);
        }
        Ok(unwinder)
    }

    /// The modules that the tables were copied for, as they were then.
    #[must_use]
    pub fn modules(&self) -> &[ModulePlace] {
        &self.modules
    }

    /// Whether the guest still has the modules that the tables were copied for, each in its place and state. Where another
    /// has taken the place of one, its frames would be followed by the wrong table. Cheap enough to be asked
    /// inside a stop.
    ///
    /// # Errors
    /// The module list cannot be read, or not before `deadline`.
    pub fn is_current(
        &self,
        kernel: &Kernel,
        physical: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Result<bool, AttachError> {
        Ok(kernel.module_places(physical, deadline)? == self.modules)
    }

    /// An unwinder for one stretch of text with its ORC table: for text that is no kernel's.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn for_text(
        text: GvaRange,
        format: Format,
        ips: &[u64],
        stored: &[u8],
    ) -> Result<Self, TableError> {
        let mut unwinder = Self {
            format: Some(format),
            ..Self::default()
        };
        let table = Table::new(format, ips, stored)?;
        unwinder.insert(text, Some(table));
        Ok(unwinder)
    }

    /// An unwinder for one stretch of text whose functions keep frame pointers.
    #[must_use]
    pub fn for_frame_pointers(text: GvaRange) -> Self {
        let mut unwinder = Self {
            frame_pointers: true,
            ..Self::default()
        };
        unwinder.insert(text, None);
        unwinder
    }

    /// Takes in what holds in code that no table of the kernel's covers: rows by address, ascending. From an undefined
    /// row to the next one nothing is known. Text of the kernel and of its modules keeps its own table. Where frames are
    /// found by frame pointers, rows tell where that code keeps one.
    ///
    /// # Errors
    /// [`TableError`]; nothing was taken in.
    pub fn cover(&mut self, rows: &[(Gva, Entry)]) -> Result<(), TableError> {
        if self.format.is_none() && !self.frame_pointers {
            return Ok(());
        }
        let (ips, entries): (Vec<u64>, Vec<Entry>) =
            rows.iter().map(|(at, entry)| (at.0, *entry)).unzip();
        let ranges = covered(rows);
        self.tables.push(Table::of(&ips, entries)?);
        let table = Some(self.tables.len() - 1);
        for range in ranges {
            if !self.regions.iter().any(|it| it.range.overlaps(&range)) {
                self.insert_region(Region { range, table });
            }
        }
        Ok(())
    }

    /// How ORC entries of this kernel are stored; `None` for a kernel without ORC.
    #[must_use]
    pub const fn orc_format(&self) -> Option<Format> {
        self.format
    }

    /// Whether frames are found by frame pointers.
    #[must_use]
    pub const fn by_frame_pointers(&self) -> bool {
        self.frame_pointers
    }

    /// What a table says of an instruction; `None` where none does.
    #[must_use]
    pub fn entry_at(&self, at: Gva) -> Option<Entry> {
        self.tables.get(self.region(at)?.table?)?.find(at.0)
    }

    /// How many ORC entries there are in all tables.
    #[must_use]
    pub fn orc_entries(&self) -> usize {
        self.tables.iter().map(Table::len).sum()
    }

    /// Where the stacks of each CPU are to be found.
    pub(crate) const fn places(&self) -> &StackPlaces {
        &self.places
    }

    /// The trampolines that hide return addresses.
    pub(crate) const fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    #[cfg(test)]
    pub(super) const fn hooks_mut(&mut self) -> &mut Hooks {
        &mut self.hooks
    }

    /// The trace of a task that sleeps: `saved_sp` is its `thread.sp`, `stack` its whole stack.
    pub fn sleeping(
        &self,
        source: &dyn StackSource,
        pool: &mut StackPool,
        (stack, saved_sp): (GvaRange, Gva),
        hidden: &Hidden,
    ) -> Trace {
        let spans = [StackSpan {
            kind: StackKind::Task,
            range: stack,
        }];
        let mut memory = StackMemory::new(pool, source, &spans);
        let saved = saved_sp.0.wrapping_add(pt_regs::INACTIVE_BP);
        let (bp, ip) = match (memory.word(saved), memory.word(saved.wrapping_add(8))) {
            (Ok(bp), Ok(ip)) => (bp, ip),
            (Err(reason), _) | (_, Err(reason)) => {
                return Trace {
                    frames: Vec::new(),
                    unreliable: Some(reason),
                };
            }
        };
        if self.frame_pointers {
            return self.chain(memory, hidden, (saved, saved_sp.0)).trace(None);
        }
        let kind = self.saved_kind(ip);
        let sp = saved_sp.0.wrapping_add(pt_regs::INACTIVE_SIZE);
        Walk::new(
            self,
            memory,
            hidden,
            Start {
                ip,
                sp,
                bp,
                kind,
                live: None,
            },
        )
        .trace()
    }

    /// The trace of what a vCPU runs in kernel mode. `spans` are the stacks it may be on: those of its CPU
    /// and of its task.
    pub fn running(
        &self,
        source: &dyn StackSource,
        pool: &mut StackPool,
        (spans, vcpu): (&[StackSpan], &Vcpu),
        hidden: &Hidden,
    ) -> Trace {
        let memory = StackMemory::new(pool, source, spans);
        let (ip, sp, bp) = (vcpu.rip.0, vcpu.rsp().0, vcpu.rbp().0);
        if self.frame_pointers {
            let first = Frame {
                at: vcpu.rip,
                kind: FrameKind::Running,
                sp: vcpu.rsp(),
            };
            return self.chain(memory, hidden, (bp, sp)).trace(Some(first));
        }
        let live = Some(&vcpu.general);
        let start = Start {
            ip,
            sp,
            bp,
            kind: FrameKind::Running,
            live,
        };
        Walk::new(self, memory, hidden, start).trace()
    }

    fn chain<'a, 'm>(
        &'a self,
        memory: StackMemory<'m>,
        hidden: &'a Hidden,
        start: (u64, u64),
    ) -> Chain<'a, 'm> {
        Chain::new(memory, self, hidden, start)
    }

    /// What kind of pointer a saved or called-back `ip` is: a new task has not run yet, so the first byte of
    /// where it begins is not a return address (`__unwind_start`).
    pub(super) fn saved_kind(&self, ip: u64) -> FrameKind {
        if self.fork_return == Some(Gva(ip)) {
            FrameKind::Interrupted
        } else {
            FrameKind::Call
        }
    }

    /// Whether the code at `ip` keeps a frame pointer, so that its caller's frame is found by it. The kernel's own does
    /// where frames are found so.
    pub(super) fn keeps_frame(&self, ip: Gva) -> bool {
        let Some(region) = self.region(ip) else {
            return false;
        };
        let table = region.table.and_then(|table| self.tables.get(table));
        table.is_none_or(|table| table.find(ip.0) == Some(Entry::FRAME_POINTER_GUESS))
    }

    /// Whether `ip` lies in known text.
    #[cfg(test)]
    pub(super) fn knows(&self, ip: Gva) -> bool {
        self.region(ip).is_some()
    }

    fn region(&self, ip: Gva) -> Option<&Region> {
        let after = self
            .regions
            .partition_point(|region| region.range.start <= ip);
        let region = self.regions.get(after.checked_sub(1)?)?;
        region.range.contains(ip).then_some(region)
    }

    fn insert(&mut self, range: GvaRange, table: Option<Table>) {
        let table = table.map(|table| {
            self.tables.push(table);
            self.tables.len() - 1
        });
        self.insert_region(Region { range, table });
    }

    /// Later text wins over what it overlaps: memory of an unloaded module may have been used again.
    fn insert_region(&mut self, region: Region) {
        if region.range.is_empty() {
            return;
        }
        self.regions
            .retain(|known| !known.range.overlaps(&region.range));
        let at = self
            .regions
            .partition_point(|known| known.range.start < region.range.start);
        self.regions.insert(at, region);
    }

    /// Tables of vmlinux cover its text and its init text, of which the first idle task keeps frames for
    /// ever.
    fn add_vmlinux(
        &mut self,
        kernel: &Kernel,
        memory: &KernelMemory<'_>,
    ) -> Result<(), AttachError> {
        let place = VmlinuxOrc::find(&kernel.symbols);
        if let Some(place) = &place {
            let (format, ips, stored) = place.read(memory)?;
            let table = Table::new(format, &ips, &stored).map_err(|why| refuse(&why))?;
            self.format = Some(format);
            self.tables.push(table);
        }
        let table = place.is_some().then_some(0);
        self.insert_region(Region {
            range: kernel.layout.text,
            table,
        });
        if let Some(range) = kernel.layout.init {
            self.insert_region(Region { range, table });
        }
        Ok(())
    }

    fn add_module(&mut self, module: &ModulePlace, memory: &KernelMemory<'_>) {
        let read = |orc: &ModuleOrc| {
            let (ips, stored) =
                read_tables(memory, orc.ips, orc.entries, orc.count as usize).ok()?;
            Table::new(self.format?, &ips, &stored).ok()
        };
        let table = module.orc.as_ref().and_then(read);
        self.insert(module.text, table);
        if let Some(range) = module.init_text {
            let table = self
                .region(module.text.start)
                .and_then(|region| region.table);
            self.insert_region(Region { range, table });
        }
    }
}

impl Code for Unwinder {
    fn entry(&self, ip: u64, called: bool) -> Option<Entry> {
        let lookup = if called { ip.wrapping_sub(1) } else { ip };
        let table = self.region(Gva(lookup))?.table?;
        let entry = self.tables.get(table)?.find(lookup)?;
        Some(
            self.special
                .instead(ip, entry.kind, called)
                .unwrap_or(entry),
        )
    }

    fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    fn entry_text(&self) -> Option<GvaRange> {
        self.entry_text
    }
}

/// The tables of vmlinux.
struct VmlinuxOrc {
    ips: GvaRange,
    entries: GvaRange,
    header: Option<Gva>,
}

impl VmlinuxOrc {
    fn find(symbols: &Symbols) -> Option<Self> {
        Some(Self {
            ips: between(symbols, "__start_orc_unwind_ip", "__stop_orc_unwind_ip")?,
            entries: between(symbols, "__start_orc_unwind", "__stop_orc_unwind")?,
            header: symbols.unique("orc_header").ok(),
        })
    }

    fn read(&self, memory: &KernelMemory<'_>) -> Result<(Format, Vec<u64>, Vec<u8>), AttachError> {
        let count = usize::try_from(self.ips.size() / 4).unwrap_or(usize::MAX);
        let entries =
            usize::try_from(self.entries.size() / ENTRY_SIZE as u64).unwrap_or(usize::MAX);
        if count > MAX_ENTRIES {
            return Err(refuse(&TableError::TooLarge(count)));
        }
        if count != entries {
            return Err(refuse(&TableError::Uneven {
                ips: count,
                entries,
            }));
        }
        let (ips, stored) = read_tables(memory, self.ips.start, self.entries.start, count)?;
        Ok((self.format(memory, &stored)?, ips, stored))
    }

    fn format(&self, memory: &KernelMemory<'_>, stored: &[u8]) -> Result<Format, AttachError> {
        let Some(at) = self.header else {
            return Ok(Format::from_entries(stored));
        };
        let mut hash = [0; HEADER_SIZE];
        memory.read(at, &mut hash)?;
        Format::from_header(&hash).ok_or_else(|| AttachError::Unsupported {
            what: "ORC unwind tables",
            why: format!("their header {hash:02x?} names no known format"),
        })
    }
}

fn refuse(why: &TableError) -> AttachError {
    AttachError::Unsupported {
        what: "ORC unwind tables",
        why: why.to_string(),
    }
}

/// From each row that says something to the next one that does not.
fn covered(rows: &[(Gva, Entry)]) -> Vec<GvaRange> {
    let mut ranges = Vec::new();
    let mut start = None;
    for (at, entry) in rows {
        match (start, entry.kind) {
            (Some(from), Kind::Undefined) => {
                ranges.push(GvaRange {
                    start: from,
                    end: *at,
                });
                start = None;
            }
            (None, Kind::Undefined) | (Some(_), _) => {}
            (None, _) => start = Some(*at),
        }
    }
    ranges
}

/// Both tables: each ip is stored as a 32-bit offset from its own place (Linux v6.12
/// `arch/x86/kernel/unwind_orc.c`, `orc_ip`).
fn read_tables(
    memory: &KernelMemory<'_>,
    ips: Gva,
    entries: Gva,
    count: usize,
) -> Result<(Vec<u64>, Vec<u8>), ReadError> {
    let count = count.min(MAX_ENTRIES);
    let (mut offsets, mut stored) = (vec![0; count * 4], vec![0; count * ENTRY_SIZE]);
    memory.read(ips, &mut offsets)?;
    memory.read(entries, &mut stored)?;
    let places = (ips.0..).step_by(4);
    let absolute = offsets
        .as_chunks::<4>()
        .0
        .iter()
        .zip(places)
        .map(|(offset, place)| place.wrapping_add_signed(i64::from(i32::from_le_bytes(*offset))));
    Ok((absolute.collect(), stored))
}

fn between(symbols: &Symbols, start: &str, end: &str) -> Option<GvaRange> {
    let (start, end) = (symbols.unique(start).ok()?, symbols.unique(end).ok()?);
    (start < end).then_some(GvaRange { start, end })
}

/// Whether this kernel's functions set up frame pointers: most of a sample do.
fn makes_frames(symbols: &Symbols, memory: &KernelMemory<'_>) -> bool {
    let (mut seen, mut framed) = (0, 0);
    for at in SAMPLE.iter().filter_map(|name| symbols.unique(name).ok()) {
        let mut head = [0; PROLOGUE_WITHIN + PROLOGUE.len()];
        if memory.read(at, &mut head).is_ok() {
            seen += 1;
            framed += usize::from(head.windows(PROLOGUE.len()).any(|code| code == PROLOGUE));
        }
    }
    framed * 2 > seen
}
