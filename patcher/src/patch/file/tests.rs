use std::fs;

use super::super::sample;
use super::*;

fn sample_file() -> Vec<u8> {
    PatchFile::new(sample::patch()).unwrap().encode()
}

/// The file around a body, with a right checksum: what a hostile writer makes.
fn wrapped(body: &[u8]) -> Vec<u8> {
    let patch = sample::patch();
    PatchFile {
        digest: Digest::of(body),
        patch,
        body: body.to_vec(),
    }
    .encode()
}

#[test]
fn a_file_decodes_to_the_patch_it_was_made_of() {
    let made = PatchFile::new(sample::patch()).unwrap();
    let read = decode(&made.encode()).unwrap();
    assert_eq!(read, made);
    assert_eq!(read.patch(), &sample::patch());
}

#[test]
fn every_flipped_bit_is_refused() {
    let file = sample_file();
    for bit in 0..file.len() * 8 {
        let mut flipped = file.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&flipped).is_err(), "bit {bit} of {}", file.len() * 8);
    }
}

#[test]
fn every_truncation_is_refused_and_says_how_much_is_missing() {
    let file = sample_file();
    for len in 1..file.len() {
        match decode(&file[..len]).unwrap_err() {
            PatchFileError::Truncated { have, need } => {
                assert_eq!(have, len as u64);
                assert!(need == file.len() as u64 || len < HEADER_BYTES);
            }
            other => panic!("{len} bytes: {other}"),
        }
    }
}

#[test]
fn empty_and_foreign_files_are_not_patch_files() {
    for foreign in [
        &b""[..],
        b"\x7fELF\x02\x01\x01",
        b"VMPATCX\0aaaaaaaaaaaaaaaa",
    ] {
        assert!(matches!(decode(foreign), Err(PatchFileError::NotAPatch)));
    }
}

#[test]
fn a_newer_format_is_named_even_if_nothing_else_fits() {
    let mut file = sample_file();
    file.truncate(12);
    file[8] = 9;
    assert!(matches!(
        decode(&file),
        Err(PatchFileError::OtherVersion {
            found: 9,
            known: FORMAT_VERSION
        })
    ));
}

#[test]
fn bytes_after_the_end_are_refused() {
    let mut file = sample_file();
    file.push(0);
    assert!(matches!(
        decode(&file),
        Err(PatchFileError::Trailing { .. })
    ));
    let mut body = postcard::to_stdvec(&sample::patch()).unwrap();
    body.push(0);
    assert!(matches!(
        decode(&wrapped(&body)),
        Err(PatchFileError::Malformed(Malformed::Leftover { bytes: 1 }))
    ));
}

#[test]
fn a_claimed_size_beyond_the_limit_is_refused_before_anything_is_read() {
    let mut file = sample_file();
    file[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        decode(&file),
        Err(PatchFileError::TooLarge { .. })
    ));
}

#[test]
fn a_damaged_body_is_a_checksum_error() {
    let mut file = sample_file();
    *file.last_mut().unwrap() ^= 0xff;
    assert!(matches!(
        decode(&file),
        Err(PatchFileError::Checksum { .. })
    ));
}

#[test]
fn a_body_that_is_no_patch_is_a_decode_error_even_if_the_checksum_is_right() {
    // A first string of 2^63 bytes.
    let body = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
    assert!(matches!(
        decode(&wrapped(&body)),
        Err(PatchFileError::Decode(_))
    ));
}

#[test]
fn content_is_checked_after_decoding() {
    let mut patch = sample::patch();
    patch.replaced[0].new_section = 99;
    let body = postcard::to_stdvec(&patch).unwrap();
    assert!(matches!(
        decode(&wrapped(&body)),
        Err(PatchFileError::Malformed(_))
    ));
    assert!(matches!(
        PatchFile::new(patch),
        Err(PatchFileError::Malformed(_))
    ));
}

#[test]
fn same_name_and_other_content_have_different_digests() {
    let mut other = sample::patch();
    other.sections[0].bytes[5] ^= 1;
    let (one, two) = (
        PatchFile::new(sample::patch()).unwrap(),
        PatchFile::new(other).unwrap(),
    );
    assert_eq!(one.patch().name, two.patch().name);
    assert_ne!(one.digest(), two.digest());
}

#[test]
fn saving_replaces_the_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fix.vmpatch");
    fs::write(&path, b"old").unwrap();
    let made = PatchFile::new(sample::patch()).unwrap();
    made.save(&path).unwrap();
    assert_eq!(PatchFile::open(&path).unwrap(), made);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    assert!(matches!(
        PatchFile::open(Path::new("/dev/zero")),
        Err(PatchFileError::NotAFile { .. })
    ));
    assert!(matches!(
        PatchFile::open(Path::new("/absent.vmpatch")),
        Err(PatchFileError::Read { .. })
    ));
}

#[test]
fn saving_where_it_cannot_be_names_the_file() {
    let error = PatchFile::new(sample::patch())
        .unwrap()
        .save(Path::new("/absent/fix.vmpatch"));
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("/absent/fix.vmpatch")
    );
}

proptest::proptest! {
    #[test]
    fn arbitrary_bodies_never_panic(body in proptest::collection::vec(0_u8.., 0..400)) {
        let _ = decode(&wrapped(&body));
    }

    #[test]
    fn changed_bodies_with_a_right_checksum_never_panic(
        at in 0_usize..10_000, value in 0_u8..,
    ) {
        let mut body = postcard::to_stdvec(&sample::patch()).unwrap();
        let at = at % body.len();
        body[at] = value;
        let _ = decode(&wrapped(&body));
    }
}
