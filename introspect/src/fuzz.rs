//! Ways in for fuzz targets: each takes hostile bytes and must neither panic nor run without bound. Not
//! part of the interface.

use crate::address::{Gpa, Gva};
use crate::flat::{BASE, Flat, Ram};
use crate::paging::{AddressSpace, KernelMemory};
use crate::symbols::kallsyms::{self, Evidence};
use crate::target::PhysicalMemory;
use crate::types::Types;

/// Bytes as the read-only data of a kernel: searched for kallsyms. What is found must be consistent.
pub fn kallsyms(bytes: &[u8]) {
    let flat = Flat::new(bytes);
    let evidence = Evidence {
        anchors: vec![("_text", BASE)],
    };
    let Ok(symbols) = kallsyms::read(&flat.memory(), &[flat.range()], &evidence) else {
        return;
    };
    for symbol in symbols.iter().take(64) {
        let found = symbols.containing(symbol.at);
        assert!(found.is_some_and(|(found, end)| found.at == symbol.at && end >= symbol.at));
        assert!(symbols.named(symbol.name).any(|named| named == symbol));
    }
}

/// Bytes as BTF.
pub fn btf(bytes: &[u8]) {
    let Ok(types) = Types::from_btf(bytes.to_vec()) else {
        return;
    };
    for path in ["tasks", "thread.sp", "a.b.c", ""] {
        let _ = types.member("task_struct", path);
    }
    let _ = (types.size_of("task_struct"), types.enumerator("MOD_TEXT"));
}

/// Bytes as RAM from zero: the first word is the root of the tables, the second an address.
pub fn page_walk(bytes: &[u8]) {
    let ram = Ram(bytes);
    let word = |at| ram.read_u64(Gpa(at)).unwrap_or(0);
    let (root, at) = (word(0), Gva(word(8)));
    for five_level in [false, true] {
        let space = AddressSpace {
            root: Gpa(root),
            five_level,
        };
        let _ = space.translate(&ram, at);
        let _ = space.hole(&ram, at);
        let _ = KernelMemory::new(&ram, space).read(at, &mut [0; 8192]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            super::kallsyms(&bytes);
            super::btf(&bytes);
            super::page_walk(&bytes);
        }
    }
}
