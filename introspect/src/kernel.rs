//! A kernel that was found: identity, layout, symbols and types, owned, so that they can be used
//! inside a stop without touching guest memory again.

use std::time::Duration;

use crate::address::{GpaRange, Gva, GvaRange};
use crate::deadline::Deadline;
use crate::find::{self, Found};
use crate::identity::{self, Identity, Sources};
use crate::image::{self, Region};
pub use crate::layout::Layout;
use crate::modules::read::{self, ModuleFields};
use crate::modules::{Module, ModulePlace};
use crate::paging::{KernelMemory, ReadError};
use crate::patching::Signs;
use crate::places::{Given, Lookup, Places};
use crate::symbols::Symbols;
use crate::symbols::kallsyms::{self, Evidence};
use crate::target::PhysicalMemory;
use crate::tasks::Task;
use crate::tasks::census::{self, Census};
use crate::tasks::fields::TaskFields;
use crate::tasks::walk::{self, Heads, Known};
use crate::types::{TypeError, Types, search};
use crate::vcpu::Vcpu;

/// A found kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Which it is.
    pub identity: Identity,
    /// Where it lies.
    pub layout: Layout,
    /// Symbols of vmlinux, by kallsyms.
    pub symbols: Symbols,
    /// Types of vmlinux, by BTF, or as far as the kernel's code and data show them.
    pub types: Types,
    task_fields: Result<TaskFields, TypeError>,
    task_heads: TaskHeads,
    module_fields: Result<ModuleFields, TypeError>,
    patching_signs: Signs,
    places: Places,
}

/// Where the lists of tasks begin, as far as known; looked up once, so that a stop does not look for names.
#[derive(Debug, Clone, Copy)]
struct TaskHeads {
    init_task: Option<Gva>,
    run_queues: Option<Gva>,
    exit_lists: Option<Gva>,
}

/// Why no kernel was found, or not enough of it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No vCPU points into a kernel.
    #[error("no Linux kernel found: {0}")]
    NoKernel(String),
    /// A kernel, but not one this program can read.
    #[error("{what}: {why}")]
    Unsupported {
        /// The part: "kallsyms", "BTF", "page tables".
        what: &'static str,
        /// What was found and what was expected.
        why: String,
    },
    /// The time that a stop may take ran out. What is left may be less the next time.
    #[error(
        "only {done} {what} were read in {allowed:?}, the time that a stop may take: try again when the guest has \
         fewer of them, or the host less to do"
    )]
    Late {
        /// "tasks", "counts of tasks", "stacks", "modules".
        what: &'static str,
        /// How many of them were read.
        done: usize,
        /// The time there was.
        allowed: Duration,
    },
    /// Guest memory could not be read where it should be.
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Kernel {
    /// Finds the kernel that the vCPUs run.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(memory: &dyn PhysicalMemory, vcpus: &[Vcpu]) -> Result<Self, AttachError> {
        let found = find::find(memory, vcpus)?;
        let through_vcpu = KernelMemory::new(memory, found.space);
        let regions = image::regions(&through_vcpu, found.page_fault)?;
        let symbols = read_symbols(&through_vcpu, &found, &regions)?;
        Self::of_symbols(memory, &found, &regions, symbols)
    }

    /// All but symbols of the kernel that was found.
    pub(crate) fn of_symbols(
        memory: &dyn PhysicalMemory,
        found: &Found,
        regions: &[Region],
        symbols: Symbols,
    ) -> Result<Self, AttachError> {
        let through_vcpu = KernelMemory::new(memory, found.space);
        let types = search::read(&through_vcpu, regions, &symbols)?;
        let places = Places::search(&Given {
            memory: &through_vcpu,
            regions,
            symbols: &symbols,
            types: &types,
        })?;
        let lookup = Lookup {
            symbols: &symbols,
            types: &types,
            places: &places,
        };
        let layout = Layout::read(&through_vcpu, found, regions, lookup)?;
        let own = KernelMemory::new(memory, layout.space);
        let fields = TaskFields::of(&types).ok();
        let identity = Identity::read(&Sources {
            memory: &own,
            layout: &layout,
            regions,
            symbols: &symbols,
            tasks: fields.as_ref().zip(lookup.get("init_task")),
        })?;
        Ok(Self::assemble(identity, layout, symbols, types, places))
    }

    /// A kernel put together from its parts; what the methods need of `types` is looked up here, so that
    /// a stop does not look for names.
    #[must_use]
    pub fn new(identity: Identity, layout: Layout, symbols: Symbols, types: Types) -> Self {
        Self::assemble(identity, layout, symbols, types, Places::default())
    }

    fn assemble(
        identity: Identity,
        layout: Layout,
        symbols: Symbols,
        types: Types,
        places: Places,
    ) -> Self {
        let lookup = Lookup {
            symbols: &symbols,
            types: &types,
            places: &places,
        };
        let task_fields = TaskFields::of(&types);
        let module_fields = ModuleFields::of(&types);
        let patching_signs = Signs::of(lookup);
        let task_heads = TaskHeads {
            init_task: lookup.get("init_task"),
            run_queues: lookup.get("runqueues"),
            exit_lists: lookup.get("rcu_tasks__percpu"),
        };
        Self {
            identity,
            layout,
            task_fields,
            task_heads,
            module_fields,
            patching_signs,
            symbols,
            types,
            places,
        }
    }

    /// Kernel-virtual memory through the kernel's own page tables.
    #[must_use]
    pub fn memory<'a>(&self, physical: &'a dyn PhysicalMemory) -> KernelMemory<'a> {
        KernelMemory::new(physical, self.layout.space)
    }

    /// Every task that is known: the task list, threads, and as far as the kernel's own lists of them are
    /// found also idle tasks and exiting tasks. For people to read, while the guest runs: what is off the task list
    /// may then be missed. The stack gate asks for all or nothing.
    ///
    /// # Errors
    /// A task list that leads out of memory or never ends, more than [`MOST_TASKS`](crate::tasks::MOST_TASKS), or
    /// a kernel whose task list is not known.
    pub fn tasks(&self, physical: &dyn PhysicalMemory) -> Result<Vec<Task>, AttachError> {
        let (fields, heads) = self.task_lists(physical)?;
        walk::running(&self.memory(physical), fields, &heads)
    }

    /// The tasks on the task list, as many of them as can be found before `deadline` while the guest runs.
    pub(crate) fn listed_tasks(
        &self,
        physical: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Vec<Task> {
        let memory = self.memory(physical);
        self.task_lists(physical)
            .map(|(fields, heads)| walk::listed(&memory, fields, &heads, deadline))
            .unwrap_or_default()
    }

    /// Every task that may own a kernel stack; those that are `known` are not read.
    ///
    /// # Errors
    /// As [`tasks`](Self::tasks); no time left; or some place is not known where a task may be that is on
    /// no task list.
    pub(crate) fn every_task(
        &self,
        memory: &KernelMemory<'_>,
        deadline: &Deadline,
        known: &dyn Known,
    ) -> Result<Census, AttachError> {
        let (fields, heads) = self.task_lists(memory.physical)?;
        census::take(memory, fields, &heads, deadline, known)
    }

    /// Where the members of a task lie, where that is known.
    pub(crate) fn task_fields(&self) -> Option<&TaskFields> {
        self.task_fields.as_ref().ok()
    }

    fn task_lists(
        &self,
        physical: &dyn PhysicalMemory,
    ) -> Result<(&TaskFields, Heads<'_>), AttachError> {
        let fields = self
            .task_fields
            .as_ref()
            .map_err(|why| AttachError::Unsupported {
                what: "tasks",
                why: why.to_string(),
            })?;
        let TaskHeads {
            init_task,
            run_queues,
            exit_lists,
        } = self.task_heads;
        let heads = Heads {
            init_task: init_task.ok_or_else(|| unknown("init_task"))?,
            run_queues,
            exit_lists,
            per_cpu_offset: &self.layout.per_cpu_offset,
            ram: physical.ram().iter().map(GpaRange::size).sum(),
        };
        Ok((fields, heads))
    }

    /// Whether memory still holds the boot of the kernel that was found: its text where it was, and the
    /// same random words. Cheap enough to be asked inside a stop; memory that cannot be read where the
    /// kernel was holds another boot, or none.
    #[must_use]
    pub fn same_boot(&self, physical: &dyn PhysicalMemory) -> bool {
        let fields = self.task_fields.as_ref().ok();
        let tasks = fields.zip(self.task_heads.init_task);
        identity::boot(&self.memory(physical), &self.layout, tasks)
            .is_ok_and(|boot| boot == self.identity.boot)
    }

    /// The address of the kernel's own variable of that name, for a per-CPU variable its offset within
    /// each CPU's area. Also where kallsyms has no data symbols, as far as memory shows it otherwise.
    ///
    /// # Errors
    /// [`AttachError::Unsupported`] where it is not known.
    pub fn place(&self, name: &str) -> Result<Gva, AttachError> {
        let lookup = Lookup {
            symbols: &self.symbols,
            types: &self.types,
            places: &self.places,
        };
        lookup.get(name).ok_or_else(|| unknown(name))
    }

    /// Every loaded module.
    ///
    /// # Errors
    /// A list that leads out of memory or never ends.
    pub fn modules(&self, physical: &dyn PhysicalMemory) -> Result<Vec<Module>, AttachError> {
        let memory = self.memory(physical);
        self.module_list(|fields, head| read::all(&memory, fields, head))
    }

    /// Where the code of every loaded module lies, in the order of [`modules`](Self::modules), but cheap
    /// enough to be asked inside a stop.
    ///
    /// # Errors
    /// As [`modules`](Self::modules), or not all were read before `deadline`.
    pub fn module_places(
        &self,
        physical: &dyn PhysicalMemory,
        deadline: &Deadline,
    ) -> Result<Vec<ModulePlace>, AttachError> {
        let memory = self.memory(physical);
        self.module_list(|fields, head| read::places(&memory, fields, head, deadline))
    }

    fn module_list<T>(
        &self,
        read: impl FnOnce(&ModuleFields, Gva) -> Result<Vec<T>, AttachError>,
    ) -> Result<Vec<T>, AttachError> {
        let unsupported = |why| AttachError::Unsupported {
            what: "modules",
            why,
        };
        if self.places.is_ambiguous("modules") {
            let why = "several lists look like that of modules";
            return Err(unsupported(why.to_owned()));
        }
        // A kernel built without modules has no list, and an empty one is nowhere to be seen.
        let Ok(head) = self.place("modules") else {
            return Ok(Vec::new());
        };
        let fields = self.module_fields.as_ref();
        read(fields.map_err(|why| unsupported(why.to_string()))?, head)
    }

    /// What tells of text changes in this kernel.
    pub(crate) const fn patching_signs(&self) -> &Signs {
        &self.patching_signs
    }
}

/// Symbols by kallsyms: in read-only data first, then, for kernels that do not protect them, in all data.
fn read_symbols(
    memory: &KernelMemory<'_>,
    found: &Found,
    regions: &[Region],
) -> Result<Symbols, AttachError> {
    let data = |writable| {
        let wanted = move |region: &&Region| !region.executable && region.writable == writable;
        regions.iter().filter(wanted).map(|region| region.range)
    };
    let ranges: Vec<GvaRange> = data(false).chain(data(true)).collect();
    let mut anchors = vec![("asm_exc_page_fault", found.page_fault)];
    anchors.extend(found.syscall.map(|at| ("entry_SYSCALL_64", at)));
    anchors.extend(regions.first().map(|text| ("_text", text.range.start)));
    kallsyms::read(memory, &ranges, &Evidence { anchors })
}

fn unknown(name: &str) -> AttachError {
    AttachError::Unsupported {
        what: "symbols",
        why: format!("the address of `{name}` is not known"),
    }
}
