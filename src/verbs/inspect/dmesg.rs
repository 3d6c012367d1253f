//! `vmpatch inspect dmesg`: the kernel's log, read from its ring buffer.

use vmpatch_introspect::log::LogRecord;

use crate::exit::Failure;
use crate::live::Live;
use crate::report::Output;

pub(super) fn show(vm: &str, output: &Output) -> Result<(), Failure> {
    let seen = Live::attach(vm)?;
    let records = seen.kernel.log(seen.vm())?;
    output.answer(&records, |records| {
        records.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(())
}

/// As `dmesg` prints it.
fn line(record: &LogRecord) -> String {
    let seconds = record.nanoseconds / 1_000_000_000;
    let micros = record.nanoseconds % 1_000_000_000 / 1000;
    format!("[{seconds:5}.{micros:06}] {}", record.text)
}
