//! Return addresses that tracing keeps elsewhere, because it put a trampoline in their place on the stack:
//! function graph tracing in `task->ret_stack`, kretprobes and fprobes in `task->rethooks` (before 5.18
//! `task->kretprobe_instances`). Reads them and translates trampolines back.

use crate::address::{Gva, GvaRange};
use crate::paging::{KernelMemory, ReadError};
use crate::symbols::Symbols;
use crate::types::Types;

/// More hooked calls than one task has: the graph tracer's own limit is 50 (Linux v6.1
/// `include/linux/ftrace.h`, `FTRACE_RETFUNC_DEPTH`), its newer stack is one page.
const MAX_HOOKED: usize = 512;

/// Words of the graph tracer's stack since 6.11 (Linux v6.12 `kernel/trace/fgraph.c`,
/// `SHADOW_STACK_OFFSET`: one page).
const SHADOW_WORDS: u64 = 512;

/// Bits of a word on that stack that say how many words below it the frame begins (Linux v6.12
/// `kernel/trace/fgraph.c`, `FGRAPH_FRAME_OFFSET_MASK`).
const SHADOW_OFFSET_MASK: u64 = 0x3ff;

/// One hooked call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hooked {
    /// Where on the stack the return address stood.
    pub(crate) slot: u64,
    /// The return address.
    pub(crate) real: u64,
}

impl Hooked {
    /// The call that is kept at `at`, by the offsets of its two members.
    fn read(
        memory: &KernelMemory<'_>,
        at: u64,
        (slot, real): (u64, u64),
    ) -> Result<Self, ReadError> {
        let word = |offset| memory.read_u64(Gva(at.wrapping_add(offset)));
        Ok(Self {
            slot: word(slot)?,
            real: word(real)?,
        })
    }
}

/// All hooked calls of one task.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hidden {
    pub(crate) graph: Vec<Hooked>,
    pub(crate) rethook: Vec<Hooked>,
}

impl Hidden {
    pub(crate) fn clear(&mut self) {
        self.graph.clear();
        self.rethook.clear();
    }

    /// Every real return address, trampolines that hide each other included.
    pub(crate) fn returns(&self) -> Vec<Gva> {
        self.graph
            .iter()
            .chain(&self.rethook)
            .map(|hooked| Gva(hooked.real))
            .collect()
    }
}

/// The trampolines of a kernel and the layout of what they hide.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    graph: Option<GvaRange>,
    rethook: Option<GvaRange>,
    graph_layout: Option<GraphLayout>,
    rethook_layout: Option<ListLayout>,
}

#[derive(Debug, Clone, Copy)]
struct GraphLayout {
    /// Offset of `ret_stack` in `struct task_struct`.
    stack: u64,
    /// Offset of `curr_ret_stack`.
    current: u64,
    /// Size of `struct ftrace_ret_stack`.
    size: u64,
    /// Offset of `ret` in it.
    real: u64,
    /// Offset of `retp` in it, where it has one.
    slot: u64,
    /// A stack of words, not of structs (Linux commit 42675b723b48 ("function_graph: Convert ret_stack to
    /// a series of longs") (in v6.11)).
    words: bool,
}

#[derive(Debug, Clone, Copy)]
struct ListLayout {
    /// Offset of the list head's `first` in `struct task_struct`.
    head: u64,
    /// Offset of the list node in each item.
    node: u64,
    /// Offset of the real return address in each item.
    real: u64,
    /// Offset of the address on the stack.
    slot: u64,
}

impl Hooks {
    pub(crate) fn new(symbols: &Symbols, types: &Types) -> Self {
        let rethook = function(symbols, "arch_rethook_trampoline");
        Self {
            graph: function(symbols, "return_to_handler"),
            rethook: rethook.or_else(|| function(symbols, "__kretprobe_trampoline")),
            graph_layout: graph_layout(types),
            rethook_layout: rethook_layout(types).or_else(|| kretprobe_layout(types)),
        }
    }

    #[cfg(test)]
    pub(crate) const fn set_graph(&mut self, trampoline: GvaRange) {
        self.graph = Some(trampoline);
    }

    /// Whether `ip` lies in a trampoline, and so names no caller.
    pub(crate) fn is_trampoline(&self, ip: u64) -> bool {
        let within = |range: &Option<GvaRange>| range.is_some_and(|range| range.contains(Gva(ip)));
        within(&self.graph) || within(&self.rethook)
    }

    /// The real return address behind what stands at `slot`; `None` if a trampoline stands there and
    /// nothing is kept for it (Linux v6.12 `arch/x86/include/asm/unwind.h`, `unwind_recover_ret_addr`).
    pub(crate) fn recover(&self, hidden: &Hidden, found: u64, slot: u64) -> Option<u64> {
        let mut real = found;
        if is_start(self.graph, real) {
            real = lookup(&hidden.graph, slot, real)?;
        }
        self.recover_rethook(hidden, real, slot)
    }

    /// The same for kretprobes alone, which may also have changed where an interrupt returns to.
    pub(crate) fn recover_rethook(&self, hidden: &Hidden, found: u64, slot: u64) -> Option<u64> {
        if is_start(self.rethook, found) {
            lookup(&hidden.rethook, slot, found)
        } else {
            Some(found)
        }
    }

    /// Reads all hooked calls of the task at `task`.
    ///
    /// # Errors
    /// A list that leads out of memory: nothing is then known of what is hidden.
    pub(crate) fn collect(
        &self,
        memory: &KernelMemory<'_>,
        task: Gva,
        into: &mut Hidden,
    ) -> Result<(), ReadError> {
        into.clear();
        if let Some(layout) = &self.graph_layout {
            layout.collect(memory, task, &mut into.graph)?;
        }
        if let Some(layout) = &self.rethook_layout {
            layout.collect(memory, task, &mut into.rethook)?;
        }
        Ok(())
    }
}

fn is_start(trampoline: Option<GvaRange>, ip: u64) -> bool {
    trampoline.is_some_and(|range| range.start == Gva(ip))
}

fn lookup(hooked: &[Hooked], slot: u64, trampoline: u64) -> Option<u64> {
    let fits = |call: &&Hooked| call.slot == slot && call.real != trampoline;
    hooked.iter().find(fits).map(|call| call.real)
}

fn function(symbols: &Symbols, name: &str) -> Option<GvaRange> {
    let start = symbols.unique(name).ok()?;
    let end = symbols
        .containing(start)
        .map_or(start.wrapping_add(1), |(_, end)| end);
    Some(GvaRange { start, end })
}

fn graph_layout(types: &Types) -> Option<GraphLayout> {
    let task = |path| types.offset_of("task_struct", path).ok();
    let frame = |path| types.offset_of("ftrace_ret_stack", path).ok();
    Some(GraphLayout {
        stack: task("ret_stack")?,
        current: task("curr_ret_stack")?,
        size: types.size_of("ftrace_ret_stack").ok()?,
        real: frame("ret")?,
        slot: frame("retp")?,
        words: types.member("fgraph_ops", "idx").is_ok(),
    })
}

/// Linux v6.12 `include/linux/rethook.h`.
fn rethook_layout(types: &Types) -> Option<ListLayout> {
    list_layout(types, "rethooks.first", "rethook_node", "frame")
}

/// Linux v5.15 `include/linux/kprobes.h`.
fn kretprobe_layout(types: &Types) -> Option<ListLayout> {
    list_layout(
        types,
        "kretprobe_instances.first",
        "kretprobe_instance",
        "fp",
    )
}

/// A list from `head` in a task through items of type `item`, `slot` in which says where on the stack the
/// return address stood.
fn list_layout(types: &Types, head: &str, item: &str, slot: &str) -> Option<ListLayout> {
    let member = |path| types.offset_of(item, path).ok();
    Some(ListLayout {
        head: types.offset_of("task_struct", head).ok()?,
        node: member("llist")?,
        real: member("ret_addr")?,
        slot: member(slot)?,
    })
}

impl GraphLayout {
    fn collect(
        &self,
        memory: &KernelMemory<'_>,
        task: Gva,
        into: &mut Vec<Hooked>,
    ) -> Result<(), ReadError> {
        let stack = memory.read_u64(task.wrapping_add(self.stack))?;
        if stack == 0 {
            return Ok(());
        }
        let current = memory
            .read_u32(task.wrapping_add(self.current))?
            .cast_signed();
        if self.words {
            self.collect_words(memory, stack, current, into)
        } else {
            self.collect_structs(memory, stack, current, into)
        }
    }

    /// `curr_ret_stack` is the index of the newest struct, −1 for none.
    fn collect_structs(
        &self,
        memory: &KernelMemory<'_>,
        stack: u64,
        current: i32,
        into: &mut Vec<Hooked>,
    ) -> Result<(), ReadError> {
        let count = u64::try_from(i64::from(current) + 1).unwrap_or(0);
        if count > MAX_HOOKED as u64 {
            return Err(ReadError::NotMapped(Gva(stack)));
        }
        for index in 0..count {
            into.push(self.frame(memory, stack.wrapping_add(index.wrapping_mul(self.size)))?);
        }
        Ok(())
    }

    /// `curr_ret_stack` counts words; the word below it says how far below that its frame begins (Linux
    /// v6.12 `kernel/trace/fgraph.c`, `get_ret_stack`).
    fn collect_words(
        &self,
        memory: &KernelMemory<'_>,
        stack: u64,
        current: i32,
        into: &mut Vec<Hooked>,
    ) -> Result<(), ReadError> {
        let mut above = u64::try_from(current).unwrap_or(0);
        if above > SHADOW_WORDS {
            return Err(ReadError::NotMapped(Gva(stack)));
        }
        while above > 0 {
            let mark = above - 1;
            let below = memory.read_u64(word(stack, mark))? & SHADOW_OFFSET_MASK;
            if below == 0 || below > mark {
                return Err(ReadError::NotMapped(word(stack, mark)));
            }
            above = mark - below;
            into.push(self.frame(memory, word(stack, above).0)?);
        }
        Ok(())
    }

    fn frame(&self, memory: &KernelMemory<'_>, at: u64) -> Result<Hooked, ReadError> {
        Hooked::read(memory, at, (self.slot, self.real))
    }
}

const fn word(base: u64, index: u64) -> Gva {
    Gva(base.wrapping_add(index.wrapping_mul(8)))
}

impl ListLayout {
    fn collect(
        &self,
        memory: &KernelMemory<'_>,
        task: Gva,
        into: &mut Vec<Hooked>,
    ) -> Result<(), ReadError> {
        let mut node = memory.read_u64(task.wrapping_add(self.head))?;
        while node != 0 {
            if into.len() >= MAX_HOOKED {
                return Err(ReadError::NotMapped(Gva(node)));
            }
            let item = node.wrapping_sub(self.node);
            into.push(Hooked::read(memory, item, (self.slot, self.real))?);
            node = memory.read_u64(Gva(node))?;
        }
        Ok(())
    }
}
