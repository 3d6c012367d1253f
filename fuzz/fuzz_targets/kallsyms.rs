//! Kernel symbols in guest memory. The address of one symbol is known, as it is when attaching.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| vmpatch_introspect::fuzz::kallsyms(input));
