//! The log equals what the guest's own `dmesg` printed.

mod common;

use common::each_guest;
use vmpatch_introspect::log::LogRecord;

/// Lines as `dmesg` prints them: the time before each line of a record.
fn lines(record: &LogRecord) -> impl Iterator<Item = String> {
    let micros = record.nanoseconds / 1000;
    let time = format!("[{:5}.{:06}]", micros / 1_000_000, micros % 1_000_000);
    record
        .text
        .split('\n')
        .map(move |line| format!("{time} {line}"))
}

#[test]
fn the_log_begins_with_all_that_dmesg_printed() {
    each_guest(|guest| {
        let answer = guest.answer("dmesg.txt").unwrap();
        let records = guest.kernel.log(&guest.dump).unwrap();
        let found: Vec<String> = records.iter().flat_map(lines).collect();
        let expected: Vec<&str> = answer.lines().collect();
        assert!(expected.len() > 100);
        assert_eq!(found[..expected.len()], expected);
        assert!(
            records
                .iter()
                .zip(0..)
                .all(|(record, nth)| record.sequence == nth)
        );
    });
}
