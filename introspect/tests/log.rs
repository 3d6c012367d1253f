//! The log equals what the guest's own `dmesg` printed.

mod common;

use common::each_guest;
use vmpatch_introspect::log::LogRecord;

/// Lines as `dmesg` prints them, with the time before each line of a record, and without, as kernels do
/// that were told to print no times.
fn lines(record: &LogRecord) -> impl Iterator<Item = [String; 2]> {
    let micros = record.nanoseconds / 1000;
    let time = format!("[{:5}.{:06}]", micros / 1_000_000, micros % 1_000_000);
    record
        .text
        .split('\n')
        .map(move |line| [format!("{time} {line}"), line.to_owned()])
}

#[test]
fn the_log_begins_with_all_that_dmesg_printed() {
    each_guest(|guest| {
        let answer = guest.answer("dmesg.txt").unwrap();
        let records = guest.kernel.log(&guest.dump).unwrap();
        let found: Vec<[String; 2]> = records.iter().flat_map(lines).collect();
        let expected: Vec<&str> = answer.lines().collect();
        assert!(expected.len() > 100);
        let form = usize::from(!expected[0].starts_with('['));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found[form], *expected);
        }
        assert!(found.len() >= expected.len());
        assert!(
            records
                .iter()
                .zip(0..)
                .all(|(record, nth)| record.sequence == nth)
        );
    });
}
