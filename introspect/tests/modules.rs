//! Modules and their symbols equal the guest's own `/proc/modules` and `/proc/kallsyms`.
#![allow(clippy::unwrap_used, reason = "only tests use it")]

mod common;

use std::cell::Cell;
use std::time::Duration;

use common::{Changed, Guest, each_guest, some_guest};
use vmpatch_introspect::modules::{Module, ModuleState};
use vmpatch_introspect::types::Types;
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{AttachError, Deadline, Gva, PhysicalMemory};

#[test]
fn modules_equal_proc_modules() {
    each_guest(|guest| {
        let answer = guest.answer("modules.txt").unwrap();
        let modules = guest.kernel.modules(&guest.dump).unwrap();
        assert_eq!(modules.len(), answer.lines().count());
        for (module, line) in modules.iter().zip(answer.lines()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(module.name, words[0]);
            assert_eq!((module.state, words[4]), (ModuleState::Live, "Live"));
            assert_eq!(format!("{:#x}", module.text.start.0), words[5]);
        }
    });
}

#[test]
fn the_users_of_modules_equal_proc_modules() {
    let (guests, used) = (Cell::new(0), Cell::new(0));
    each_guest(|guest| {
        guests.set(guests.get() + 1);
        let answer = guest.answer("modules.txt").unwrap();
        let modules = guest.kernel.modules(&guest.dump).unwrap();
        for (module, line) in modules.iter().zip(answer.lines()) {
            let listed = line.split_whitespace().nth(3).unwrap();
            let listed = listed.split(',').filter(|name| !matches!(*name, "" | "-"));
            let mut listed: Vec<_> = listed.collect();
            let uses_it = |user: &&Module| user.uses.as_ref().unwrap().contains(&module.at);
            let users = modules.iter().filter(uses_it);
            let mut users: Vec<_> = users.map(|user| user.name.as_str()).collect();
            listed.sort_unstable();
            users.sort_unstable();
            assert_eq!(users, listed, "{}", module.name);
            used.set(used.get() + users.len());
        }
    });
    assert!(
        guests.get() == 0 || used.get() > 0,
        "no module uses another"
    );
}

#[test]
fn symbols_of_modules_equal_proc_kallsyms() {
    each_guest(|guest| {
        let answer = guest.answer("kallsyms.txt").unwrap();
        for module in guest.kernel.modules(&guest.dump).unwrap() {
            let ending = format!("\t[{}]", module.name);
            let expected: Vec<String> = answer
                .lines()
                .filter_map(|line| line.strip_suffix(ending.as_str()))
                .map(|line| {
                    // /proc shows exported symbols with a capital letter.
                    let words: Vec<&str> = line.split(' ').collect();
                    format!("{} {} {}", words[0], words[1].to_lowercase(), words[2])
                })
                .collect();
            assert!(expected.len() > 10, "{}", module.name);
            let found: Vec<String> = module
                .symbols
                .iter()
                .map(|found| {
                    let kind = found.kind.to_ascii_lowercase();
                    format!("{:016x} {kind} {}", found.at.0, found.name)
                })
                .collect();
            assert_eq!(found, expected, "{}", module.name);
        }
    });
}

#[test]
fn text_symbols_of_a_module_lie_in_its_text_and_its_unwind_tables_in_no_text() {
    each_guest(|guest| {
        for module in guest.kernel.modules(&guest.dump).unwrap() {
            let text = module.symbols.iter().filter(|symbol| symbol.kind == 't');
            let outside = text
                .filter(|symbol| !module.text.contains(symbol.at))
                .count();
            assert_eq!(outside, 0, "{}", module.name);
            let orc = module.orc.unwrap();
            assert!(orc.count > 0 && !module.text.contains(orc.ips));
        }
    });
}

/// Memory in which so many bytes at a place of the kernel are others.
fn changed(guest: &Guest, at: Gva, bytes: Vec<u8>) -> Changed<'_> {
    let memory = guest.kernel.memory(&guest.dump);
    Changed {
        dump: &guest.dump,
        at: memory.physical_of(at).unwrap(),
        bytes,
    }
}

/// Memory in which a 32-bit member of the module is greater by one.
fn one_more<'a>(guest: &'a Guest, module: &Module, offset: u64) -> (u32, Changed<'a>) {
    let at = module.at.wrapping_add(offset);
    let was = guest.kernel.memory(&guest.dump).read_u32(at).unwrap();
    let bytes = (was + 1).to_le_bytes().to_vec();
    (was, changed(guest, at, bytes))
}

/// Of the size of a module's text.
fn text_size(types: &Types) -> u64 {
    let of_text = |memories| {
        let index = u64::try_from(types.enumerator("MOD_TEXT").unwrap()).unwrap();
        let element = types.size_of("module_memory").unwrap();
        memories + index * element + types.offset_of("module_memory", "size").unwrap()
    };
    let memories = types.offset_of("module", "mem").map(of_text);
    memories.unwrap_or_else(|_| types.offset_of("module", "core_layout.text_size").unwrap())
}

#[test]
fn unwind_tables_know_when_a_module_has_gone_or_another_is_in_its_place() {
    let no_end = Deadline::none();
    some_guest(|guest| {
        let kernel = &guest.kernel;
        let modules = kernel.modules(&guest.dump).unwrap();
        let places: Vec<_> = modules.iter().map(Module::place).collect();
        let unwinder = Unwinder::load(kernel, &guest.dump, &places).unwrap();
        let is_current = |memory: &dyn PhysicalMemory| {
            let current = unwinder.is_current(kernel, memory, &no_end);
            current.unwrap()
        };
        assert!(is_current(&guest.dump));
        // A kernel that cannot load modules has none to lose.
        let Some(last) = modules.last() else {
            return false;
        };
        let memory = kernel.memory(&guest.dump);
        let head = kernel.place("modules").unwrap();
        let second: [u8; 8] = memory
            .read_array(memory.read_pointer(head).unwrap())
            .unwrap();
        assert!(!is_current(&changed(guest, head, second.to_vec())));
        // Others in the place of the last: all the same but for this.
        let (size, larger) = one_more(guest, last, text_size(&kernel.types));
        assert_eq!(u64::from(size), last.text.size());
        assert!(!is_current(&larger));
        let counts = kernel.types.offset_of("module", "arch.num_orcs").unwrap();
        let (count, longer) = one_more(guest, last, counts);
        assert_eq!(count, last.orc.unwrap().count);
        assert!(!is_current(&longer));
        true
    });
}

#[test]
fn a_stop_that_has_no_time_left_does_not_look_at_modules() {
    some_guest(|guest| {
        let unwinder = Unwinder::load(&guest.kernel, &guest.dump, &[]).unwrap();
        let over = Deadline::within(Duration::ZERO);
        let current = unwinder.is_current(&guest.kernel, &guest.dump, &over);
        let some = !guest.kernel.modules(&guest.dump).unwrap().is_empty();
        assert_eq!(matches!(current, Err(AttachError::Late { .. })), some);
        some
    });
}
