//! vmpatch command line.
fn main() {}
