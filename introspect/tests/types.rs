//! Types equal what the kernel's compiler wrote into VMCOREINFO, and a kernel without types is still known.

mod common;

use common::{Changed, each_guest, some_guest};
use vmpatch_introspect::Kernel;

#[test]
fn sizes_and_offsets_equal_vmcoreinfo() {
    some_guest(|guest| {
        let kernel = &guest.kernel;
        let Ok(place) = kernel.place("vmcoreinfo_data") else {
            return false;
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
        true
    });
}

#[test]
fn per_cpu_variables_in_types_lie_where_symbols_say() {
    for name in ["runqueues", "cpu_info"] {
        some_guest(|guest| {
            let Ok(symbol) = guest.kernel.symbols.unique(name) else {
                return false;
            };
            let found = guest.kernel.types.per_cpu(name);
            assert_eq!(found, Some(symbol.0), "{name}");
            true
        });
    }
}

#[test]
fn a_kernel_without_types_is_known_and_its_tasks_are_refused_by_name() {
    each_guest(|guest| {
        let start = guest.kernel.place("__start_BTF").unwrap();
        let magic = guest.kernel.memory(&guest.dump).physical_of(start).unwrap();
        let memory = Changed {
            dump: &guest.dump,
            at: magic,
            bytes: vec![0; 2],
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
