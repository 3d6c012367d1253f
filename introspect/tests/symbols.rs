//! Symbols equal the guest's own `/proc/kallsyms`, line by line.

mod common;

use common::each_guest;

#[test]
fn symbols_of_the_kernel_equal_proc_kallsyms() {
    each_guest(|guest| {
        let answer = guest.answer("kallsyms.txt").unwrap();
        let expected: Vec<&str> = answer.lines().filter(|line| !line.ends_with(']')).collect();
        assert!(expected.len() > 1000);
        assert_eq!(guest.kernel.symbols.len(), expected.len());
        for (symbol, line) in guest.kernel.symbols.iter().zip(expected) {
            assert_eq!(
                format!("{:016x} {} {}", symbol.at.0, symbol.kind, symbol.name),
                line
            );
        }
    });
}

#[test]
fn every_text_symbol_contains_its_own_address() {
    each_guest(|guest| {
        let symbols = &guest.kernel.symbols;
        for symbol in symbols
            .iter()
            .filter(|symbol| guest.kernel.layout.text.contains(symbol.at))
        {
            let (found, end) = symbols.containing(symbol.at).unwrap();
            assert_eq!(found.at, symbol.at);
            assert!(end > symbol.at);
            assert!(
                symbols
                    .named(symbol.name)
                    .any(|named| named.at == symbol.at)
            );
        }
    });
}
