//! Modules and their symbols equal the guest's own `/proc/modules` and `/proc/kallsyms`.

mod common;

use common::each_guest;
use vmpatch_introspect::modules::ModuleState;

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
