//! A patch file from a stranger. The header is put right first, so that the checksum does not keep the fuzzer
//! out of the body; every fourth input is taken as it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmpatch_patcher::patch::file::{FORMAT_VERSION, MAGIC, decode};

const HEADER: usize = 32;

fn mended(input: &[u8]) -> Vec<u8> {
    let mut file = vec![0; HEADER];
    file[..8].copy_from_slice(&MAGIC);
    file[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    file[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    let body = input.get(HEADER..).unwrap_or_default();
    file[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    file.extend_from_slice(body);
    let sum = crc32fast::hash(&file);
    file[24..28].copy_from_slice(&sum.to_le_bytes());
    file
}

fuzz_target!(|input: &[u8]| {
    let file = if input.len() % 4 == 3 {
        input.to_vec()
    } else {
        mended(input)
    };
    let Ok(patch) = decode(&file) else { return };
    let again = decode(&patch.encode()).expect("what was encoded decodes");
    assert_eq!(again.patch(), patch.patch());
});
