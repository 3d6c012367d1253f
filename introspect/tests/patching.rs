//! A guest at rest changes no text; its feature words are those it shows in `/proc/cpuinfo`.

mod common;

use common::each_guest;

/// `word * 32 + bit` (Linux arch/x86/include/asm/cpufeatures.h).
const FEATURES: [(&str, u16); 6] = [
    ("fpu", 0),
    ("sse2", 26),
    ("nx", 52),
    ("lm", 61),
    ("avx2", 293),
    ("smap", 308),
];

#[test]
fn a_guest_at_rest_changes_no_text() {
    each_guest(|guest| assert_eq!(guest.kernel.text_patching(&guest.dump).unwrap(), None));
}

#[test]
fn feature_words_equal_proc_cpuinfo() {
    each_guest(|guest| {
        let answer = guest.answer("cpuinfo.txt").unwrap();
        let flags = answer
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap();
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let features = guest.kernel.cpu_features(&guest.dump).unwrap();
        assert!(features.words().len() >= 20);
        for (name, number) in FEATURES {
            assert_eq!(features.has(number), Some(flags.contains(&name)), "{name}");
        }
    });
}

#[test]
fn the_return_thunk_is_one_of_the_kernels_own() {
    each_guest(|guest| {
        let thunk = guest.kernel.return_thunk(&guest.dump).unwrap().unwrap();
        let (symbol, _) = guest.kernel.symbols.containing(thunk).unwrap();
        assert!(symbol.name.contains("return_thunk"), "{}", symbol.name);
    });
}
