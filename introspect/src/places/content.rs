//! Variables by what they hold: the first task by its name and lists, the module list by a module that
//! hangs off it, the log by its rings, the CPU data by its vendor.

use std::collections::BTreeMap;

use memchr::memmem;

use super::Given;
use crate::address::{Gva, GvaRange};
use crate::image::Region;
use crate::paging::ReadError;

/// Most bytes of one region that are searched.
const LARGEST: u64 = 64 << 20;
/// What the first task is called once its CPU is up (Linux v6.12 kernel/sched/core.c, init_idle).
const FIRST_TASK: &[u8] = b"swapper/0\0";
/// Vendors as CPUID spells them.
const VENDORS: [&[u8]; 3] = [b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine"];
/// Where modules may lie (Linux v6.12 Documentation/arch/x86/x86_64/mm.rst).
const MODULES: std::ops::Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;
const KERNEL: u64 = 0xff00_0000_0000_0000;

/// Finds what data show. Two candidates for one name are none.
pub(super) fn find(
    given: &Given<'_>,
    found: &mut BTreeMap<&'static str, Option<Gva>>,
) -> Result<(), ReadError> {
    let mut candidates: BTreeMap<&'static str, Vec<Gva>> = BTreeMap::new();
    let data = given
        .regions
        .iter()
        .filter(|region| region.writable && !region.executable);
    for region in data {
        let data = Data::read(given, region)?;
        let mut add = |name, found: Vec<Gva>| candidates.entry(name).or_default().extend(found);
        add("init_task", first_tasks(given, &data).collect());
        add("modules", module_lists(given, &data).collect());
        add("prb", logs(given, &data).collect());
        add("boot_cpu_data", cpu_data(given, &data).collect());
    }
    for (name, places) in candidates {
        match places.as_slice() {
            [] => {}
            [one] => drop(found.insert(name, Some(*one))),
            _ => drop(found.insert(name, None)),
        }
    }
    Ok(())
}

/// A region, copied.
struct Data {
    range: GvaRange,
    bytes: Vec<u8>,
}

impl Data {
    fn read(given: &Given<'_>, region: &Region) -> Result<Self, ReadError> {
        let len = region.range.size().min(LARGEST);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        given.memory.read(region.range.start, &mut bytes)?;
        Ok(Self {
            range: region.range,
            bytes,
        })
    }

    /// Every address of `pattern`.
    fn places<'a>(&'a self, pattern: &'a [u8]) -> impl Iterator<Item = Gva> + 'a {
        memmem::find_iter(&self.bytes, pattern)
            .map(|offset| self.range.start.wrapping_add(offset as u64))
    }

    /// Every aligned pair of words, with its address.
    fn pairs(&self) -> impl Iterator<Item = (Gva, u64, u64)> {
        let words = self.bytes.as_chunks::<8>().0;
        words
            .array_windows::<2>()
            .zip(0_u64..)
            .map(|([first, second], nth)| {
                let at = self.range.start.wrapping_add(nth * 8);
                (at, u64::from_le_bytes(*first), u64::from_le_bytes(*second))
            })
    }
}

/// Tasks in the image that are called like the first one, are number 0 and hang in a list both ways.
fn first_tasks<'a>(given: &'a Given<'_>, data: &'a Data) -> impl Iterator<Item = Gva> + 'a {
    let offset = |path| given.types.offset_of("task_struct", path).ok();
    let offsets = (|| Some((offset("comm")?, offset("pid")?, offset("tasks")?)))();
    let places = offsets.map(|(comm, pid, tasks)| {
        data.places(FIRST_TASK)
            .map(move |at| at.wrapping_sub(comm))
            .filter(move |task| {
                let number = given.memory.read_u32(task.wrapping_add(pid));
                number == Ok(0) && is_list(given, task.wrapping_add(tasks))
            })
    });
    places.into_iter().flatten()
}

/// Whether the next and the previous node of a list point back to `node`.
fn is_list(given: &Given<'_>, node: Gva) -> bool {
    let memory = given.memory;
    let back = |neighbour: Gva, offset| memory.read_pointer(neighbour.wrapping_add(offset));
    let next = memory.read_pointer(node).and_then(|next| back(next, 8));
    let before = memory
        .read_pointer(node.wrapping_add(8))
        .and_then(|before| back(before, 0));
    next == Ok(node) && before == Ok(node)
}

/// List heads in the image whose first node is `list` of a module: it has a name and a state, and its own
/// sysfs object names it (Linux v6.12 kernel/module/sysfs.c, mod_sysfs_init).
fn module_lists<'a>(given: &'a Given<'_>, data: &'a Data) -> impl Iterator<Item = Gva> + 'a {
    let fields = ModuleFields::of(given);
    let heads = fields.map(move |fields| {
        data.pairs()
            .filter(|(_, next, before)| MODULES.contains(next) && MODULES.contains(before))
            .filter(move |(head, next, _)| {
                is_list(given, *head) && fields.fits(given, Gva(*next).wrapping_sub(fields.list))
            })
    });
    heads.into_iter().flatten().map(|(head, ..)| head)
}

struct ModuleFields {
    list: u64,
    name: u64,
    state: u64,
    itself: u64,
}

impl ModuleFields {
    fn of(given: &Given<'_>) -> Option<Self> {
        let offset = |path| given.types.offset_of("module", path).ok();
        Some(Self {
            list: offset("list")?,
            name: offset("name")?,
            state: offset("state")?,
            itself: offset("mkobj.mod")?,
        })
    }

    fn fits(&self, given: &Given<'_>, module: Gva) -> bool {
        let state = given.memory.read_u32(module.wrapping_add(self.state));
        state.is_ok_and(|state| state < 4)
            && given.memory.read_pointer(module.wrapping_add(self.itself)) == Ok(module)
            && is_named(given, module.wrapping_add(self.name))
    }
}

fn is_named(given: &Given<'_>, at: Gva) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    given
        .memory
        .read_string(at, 64)
        .is_ok_and(|name| !name.is_empty() && name.len() < 60 && name.bytes().all(letter))
}

/// Pointers in the image to a log: a struct whose two rings have sane sizes and whose newest record is
/// there under its own id.
fn logs<'a>(given: &'a Given<'_>, data: &'a Data) -> impl Iterator<Item = Gva> + 'a {
    let fields = LogFields::of(given);
    let pointers = fields.map(move |fields| {
        data.pairs()
            .map(|(at, to, _)| (at, Gva(to)))
            .filter(|(_, to)| to.0 >= KERNEL && to.0.is_multiple_of(8) && in_data(given, *to))
            .filter(move |(_, to)| fields.fits(given, *to) == Some(true))
    });
    pointers.into_iter().flatten().map(|(at, _)| at)
}

/// The ring buffer is a variable itself, so only pointers into the image are looked at.
fn in_data(given: &Given<'_>, at: Gva) -> bool {
    given
        .regions
        .iter()
        .any(|region| region.writable && region.range.contains(at))
}

struct LogFields {
    count_bits: u64,
    descriptors: u64,
    head: u64,
    size_bits: u64,
    descriptor: u64,
    state: u64,
}

impl LogFields {
    fn of(given: &Given<'_>) -> Option<Self> {
        let ring = |path| given.types.offset_of("printk_ringbuffer", path).ok();
        Some(Self {
            count_bits: ring("desc_ring.count_bits")?,
            descriptors: ring("desc_ring.descs")?,
            head: ring("desc_ring.head_id")?,
            size_bits: ring("text_data_ring.size_bits")?,
            descriptor: given.types.size_of("prb_desc").ok()?,
            state: given.types.offset_of("prb_desc", "state_var").ok()?,
        })
    }

    /// Whether a log lies at `at`; `None` where that cannot be read.
    fn fits(&self, given: &Given<'_>, at: Gva) -> Option<bool> {
        let memory = given.memory;
        let count_bits = memory.read_u32(at.wrapping_add(self.count_bits)).ok()?;
        let size_bits = memory.read_u32(at.wrapping_add(self.size_bits)).ok()?;
        if !(4..=20).contains(&count_bits) || !(8..=27).contains(&size_bits) {
            return Some(false);
        }
        let head = memory.read_u64(at.wrapping_add(self.head)).ok()?;
        let descriptors = memory
            .read_pointer(at.wrapping_add(self.descriptors))
            .ok()?;
        let index = head & ((1 << count_bits) - 1);
        let state_at = descriptors.wrapping_add(index * self.descriptor + self.state);
        let state = memory.read_u64(state_at).ok()?;
        // The two top bits are the state, the rest is the id.
        Some(head != 0 && state << 2 == head << 2)
    }
}

/// Places where the CPU's vendor stands within data of a CPU that has an FPU and a family.
fn cpu_data<'a>(given: &'a Given<'_>, data: &'a Data) -> impl Iterator<Item = Gva> + 'a {
    let offset = |path| given.types.offset_of("cpuinfo_x86", path).ok();
    let offsets = (|| {
        Some((
            offset("x86_vendor_id")?,
            offset("x86_capability")?,
            offset("x86")?,
        ))
    })();
    let places = offsets.map(|(vendor, capability, family)| {
        let places = VENDORS.iter().flat_map(|pattern| data.places(pattern));
        places
            .map(move |at| at.wrapping_sub(vendor))
            .filter(move |cpu| {
                let fpu = given.memory.read_u32(cpu.wrapping_add(capability));
                let family = given.memory.read_u8(cpu.wrapping_add(family));
                // A vendor's name in a list of names may stand behind words that fit, but unaligned.
                cpu.0.is_multiple_of(8)
                    && fpu.is_ok_and(|word| word & 1 != 0)
                    && family.is_ok_and(|family| family >= 4)
            })
    });
    places.into_iter().flatten()
}
