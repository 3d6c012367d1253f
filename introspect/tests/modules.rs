//! Modules and their symbols equal the guest's own `/proc/modules` and `/proc/kallsyms`.
#![allow(clippy::unwrap_used, reason = "only tests use it")]

mod common;

use common::{Guest, each_guest};
use vmpatch_introspect::modules::ModuleState;
use vmpatch_introspect::target::MemoryError;
use vmpatch_introspect::unwind::Unwinder;
use vmpatch_introspect::{Gpa, GpaRange, PhysicalMemory};

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

/// Memory in which the first module has just left the list.
struct WithoutFirst<'a> {
    guest: &'a Guest,
    head: Gpa,
    second: [u8; 8],
}

impl<'a> WithoutFirst<'a> {
    fn of(guest: &'a Guest) -> Self {
        let memory = guest.kernel.memory(&guest.dump);
        let head = guest.kernel.place("modules").unwrap();
        let first = memory.read_pointer(head).unwrap();
        Self {
            guest,
            head: memory.physical_of(head).unwrap(),
            second: memory.read_array(first).unwrap(),
        }
    }
}

impl PhysicalMemory for WithoutFirst<'_> {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        if at == self.head && into.len() == 8 {
            into.copy_from_slice(&self.second);
            return Ok(());
        }
        self.guest.dump.read(at, into)
    }

    fn ram(&self) -> Vec<GpaRange> {
        self.guest.dump.ram()
    }
}

#[test]
fn unwind_tables_know_when_a_module_has_gone() {
    each_guest(|guest| {
        let modules = guest.kernel.modules(&guest.dump).unwrap();
        let unwinder = Unwinder::load(&guest.kernel, &guest.dump, &modules).unwrap();
        assert!(unwinder.is_current(&guest.kernel, &guest.dump).unwrap());
        // A kernel that cannot load modules has none to lose.
        if modules.is_empty() {
            return;
        }
        let later = WithoutFirst::of(guest);
        assert!(!unwinder.is_current(&guest.kernel, &later).unwrap());
    });
}
