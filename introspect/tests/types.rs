//! Types equal what the kernel's compiler wrote into VMCOREINFO, and a kernel without types is still known.

mod common;

use common::each_guest;
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::{Dump, Gpa, GpaRange, Kernel, PhysicalMemory};

#[test]
fn sizes_and_offsets_equal_vmcoreinfo() {
    each_guest(|guest| {
        let kernel = &guest.kernel;
        let Ok(place) = kernel.place("vmcoreinfo_data") else {
            eprintln!("{} has no VMCOREINFO", guest.name);
            return;
        };
        let memory = kernel.memory(&guest.dump);
        let at = memory.read_pointer(place).unwrap();
        let text = memory.read_string(at, 4096).unwrap();
        let mut compared = 0;
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let inner = |kind: &str| key.strip_prefix(kind)?.strip_suffix(')');
            if let Some((within, path)) = inner("OFFSET(").and_then(|key| key.split_once('.')) {
                // A few of the names are typedefs.
                if kernel.types.size_of(within).is_ok() {
                    let offset = kernel.types.offset_of(within, path).unwrap();
                    assert_eq!(offset, value.parse::<u64>().unwrap(), "{key}");
                    compared += 1;
                }
            }
            if let Some(size) = inner("SIZE(").and_then(|name| kernel.types.size_of(name).ok()) {
                assert_eq!(size, value.parse::<u64>().unwrap(), "{key}");
                compared += 1;
            }
        }
        assert!(compared > 20, "{}: {compared}", guest.name);
    });
}

#[test]
fn per_cpu_variables_in_types_lie_where_symbols_say() {
    each_guest(|guest| {
        for name in ["runqueues", "cpu_info"] {
            let symbol = guest.kernel.symbols.unique(name).map(|at| at.0).ok();
            assert_eq!(guest.kernel.types.per_cpu(name), symbol, "{name}");
        }
    });
}

/// A guest whose BTF has lost its magic.
struct WithoutTypes<'a> {
    dump: &'a Dump,
    magic: Gpa,
}

impl PhysicalMemory for WithoutTypes<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        self.dump.read(at, into)?;
        for place in self.magic.0..self.magic.0 + 2 {
            let offset = place
                .checked_sub(at.0)
                .and_then(|offset| usize::try_from(offset).ok());
            if let Some(byte) = offset.and_then(|offset| into.get_mut(offset)) {
                *byte = 0;
            }
        }
        Ok(())
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.dump.ram()
    }
}

#[test]
fn a_kernel_without_types_is_known_and_its_tasks_are_refused_by_name() {
    each_guest(|guest| {
        let start = guest.kernel.place("__start_BTF").unwrap();
        let magic = guest.kernel.memory(&guest.dump).physical_of(start).unwrap();
        let memory = WithoutTypes {
            dump: &guest.dump,
            magic,
        };
        let kernel = Kernel::attach(&memory, guest.dump.vcpus()).unwrap();
        assert!(kernel.types.is_empty());
        assert_eq!(kernel.identity.build_id, guest.kernel.identity.build_id);
        assert_eq!(kernel.symbols.len(), guest.kernel.symbols.len());
        let why = kernel.tasks(&memory).unwrap_err().to_string();
        assert_eq!(
            why,
            "tasks: the guest kernel has no type `struct task_struct`"
        );
    });
}
