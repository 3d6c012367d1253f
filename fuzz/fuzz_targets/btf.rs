//! Type information in guest memory.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| vmpatch_introspect::fuzz::btf(input));
