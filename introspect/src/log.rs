//! The kernel log as `dmesg` shows it: records of the printk ring buffer (Linux v5.10 and later,
//! kernel/printk/printk_ringbuffer.c). Only finalised records; older log formats are refused by name.

use serde::{Deserialize, Serialize};

use crate::address::Gva;
use crate::kernel::{AttachError, Kernel};
use crate::paging::{KernelMemory, ReadError};
use crate::target::PhysicalMemory;
use crate::types::{TypeError, Types};

/// One record. Its text may hold several lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Its number, counted from boot.
    pub sequence: u64,
    /// When it was written, in nanoseconds of the guest's own clock since boot.
    pub nanoseconds: u64,
    /// Severity, 0 emergency to 7 debug.
    pub level: u8,
    /// Facility: 0 for the kernel, else the number that user space gave.
    pub facility: u8,
    /// Thread that wrote it, or with bit 31 set the CPU that did.
    pub caller: u32,
    /// The text without the final newline; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// Descriptor states (Linux v6.12 kernel/printk/printk_ringbuffer.h): the two top bits of `state_var`.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
const FINALISED: u64 = 2;
/// `begin` and `next` of a record that is an empty line. Any other odd position has lost its text.
const EMPTY_LINE: u64 = 3;
/// A data block begins with the id of its record.
const BLOCK_HEADER: u64 = 8;
/// Largest rings that are believed: 2^20 records, 2^27 bytes of text.
const MOST_RECORD_BITS: u32 = 20;
const MOST_TEXT_BITS: u32 = 27;

/// Offsets within the ring buffer's structs.
struct Fields {
    count_bits: u64,
    descriptors: u64,
    infos: u64,
    head: u64,
    tail: u64,
    size_bits: u64,
    data: u64,
    descriptor: u64,
    state: u64,
    begin: u64,
    next: u64,
    info: Info,
}

struct Info {
    size: u64,
    sequence: u64,
    time: u64,
    length: u64,
    facility: u64,
    caller: u64,
}

impl Fields {
    fn of(types: &Types) -> Result<Self, TypeError> {
        let ring = |path| types.offset_of("printk_ringbuffer", path);
        let info = |path| types.offset_of("printk_info", path);
        Ok(Self {
            count_bits: ring("desc_ring.count_bits")?,
            descriptors: ring("desc_ring.descs")?,
            infos: ring("desc_ring.infos")?,
            head: ring("desc_ring.head_id")?,
            tail: ring("desc_ring.tail_id")?,
            size_bits: ring("text_data_ring.size_bits")?,
            data: ring("text_data_ring.data")?,
            descriptor: types.size_of("prb_desc")?,
            state: types.offset_of("prb_desc", "state_var")?,
            begin: types.offset_of("prb_desc", "text_blk_lpos.begin")?,
            next: types.offset_of("prb_desc", "text_blk_lpos.next")?,
            info: Info {
                size: types.size_of("printk_info")?,
                sequence: info("seq")?,
                time: info("ts_nsec")?,
                length: info("text_len")?,
                facility: info("facility")?,
                caller: info("caller_id")?,
            },
        })
    }
}

/// A ring buffer whose dimensions were read and believed.
struct Ring<'a> {
    memory: KernelMemory<'a>,
    fields: Fields,
    descriptors: Gva,
    infos: Gva,
    count: u64,
    data: Gva,
    size: u64,
}

impl Kernel {
    /// Every finalised record of the kernel log, oldest first.
    ///
    /// # Errors
    /// A kernel before the ring buffer of v5.10, or memory that cannot be read.
    pub fn log(&self, physical: &dyn PhysicalMemory) -> Result<Vec<LogRecord>, AttachError> {
        let fields = Fields::of(&self.types).map_err(|why| AttachError::Unsupported {
            what: "log",
            why: why.to_string(),
        })?;
        let memory = self.memory(physical);
        let at = memory.read_pointer(self.place("prb")?)?;
        let head = memory.read_u64(at.wrapping_add(fields.head))? & ID_MASK;
        let tail = memory.read_u64(at.wrapping_add(fields.tail))? & ID_MASK;
        let ring = Ring::open(memory, fields, at)?;
        let span = (head.wrapping_sub(tail) & ID_MASK).min(ring.count - 1);
        let mut records = Vec::new();
        for step in 0..=span {
            records.extend(ring.record(tail.wrapping_add(step) & ID_MASK)?);
        }
        Ok(records)
    }
}

impl<'a> Ring<'a> {
    fn open(memory: KernelMemory<'a>, fields: Fields, at: Gva) -> Result<Self, AttachError> {
        let count_bits = memory.read_u32(at.wrapping_add(fields.count_bits))?;
        let size_bits = memory.read_u32(at.wrapping_add(fields.size_bits))?;
        if count_bits > MOST_RECORD_BITS || size_bits > MOST_TEXT_BITS {
            let why = format!("a ring of 2^{count_bits} records and 2^{size_bits} bytes");
            return Err(AttachError::Unsupported { what: "log", why });
        }
        Ok(Self {
            descriptors: memory.read_pointer(at.wrapping_add(fields.descriptors))?,
            infos: memory.read_pointer(at.wrapping_add(fields.infos))?,
            data: memory.read_pointer(at.wrapping_add(fields.data))?,
            count: 1 << count_bits,
            size: 1 << size_bits,
            memory,
            fields,
        })
    }

    /// The record of that id, if it is finalised and still has its text.
    fn record(&self, id: u64) -> Result<Option<LogRecord>, ReadError> {
        let index = id & (self.count - 1);
        let descriptor = self
            .descriptors
            .wrapping_add(index * self.fields.descriptor);
        let word = |offset| self.memory.read_u64(descriptor.wrapping_add(offset));
        let state = word(self.fields.state)?;
        if state & ID_MASK != id || state >> STATE_SHIFT != FINALISED {
            return Ok(None);
        }
        let info = self.infos.wrapping_add(index * self.fields.info.size);
        let length = self
            .memory
            .read_u16(info.wrapping_add(self.fields.info.length))?;
        let text = self.text(word(self.fields.begin)?, word(self.fields.next)?, length)?;
        text.map(|text| self.describe(info, text)).transpose()
    }

    fn describe(&self, at: Gva, text: String) -> Result<LogRecord, ReadError> {
        let info = &self.fields.info;
        let facility = at.wrapping_add(info.facility);
        Ok(LogRecord {
            sequence: self.memory.read_u64(at.wrapping_add(info.sequence))?,
            nanoseconds: self.memory.read_u64(at.wrapping_add(info.time))?,
            // `flags:5, level:3` follow the facility; a bit field has no offset to look up.
            level: self.memory.read_u8(facility.wrapping_add(1))? >> 5,
            facility: self.memory.read_u8(facility)?,
            caller: self.memory.read_u32(at.wrapping_add(info.caller))?,
            text,
        })
    }

    /// The text between two logical positions. A block that would cross the end of the ring lies at its
    /// start instead.
    fn text(&self, begin: u64, next: u64, length: u16) -> Result<Option<String>, ReadError> {
        if begin & 1 != 0 {
            return Ok((begin == EMPTY_LINE && next == EMPTY_LINE).then(String::new));
        }
        let mask = self.size - 1;
        let wraps = |position: u64| position / self.size;
        let (start, space) = if wraps(begin) == wraps(next) && begin < next {
            (begin & mask, next - begin)
        } else if wraps(begin.wrapping_add(self.size)) == wraps(next) {
            (0, next & mask)
        } else {
            return Ok(None);
        };
        let Some(space) = space.checked_sub(BLOCK_HEADER) else {
            return Ok(None);
        };
        let length = usize::from(length).min(usize::try_from(space).unwrap_or(0));
        let mut text = vec![0; length];
        self.memory
            .read(self.data.wrapping_add(start + BLOCK_HEADER), &mut text)?;
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }
}
