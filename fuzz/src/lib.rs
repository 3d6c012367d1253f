//! What the fuzz targets share.

/// The fuzzer's bytes, taken from the front; zeros when they are used up.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// The next `N` bytes.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let (now, later) = self.0.split_at(self.0.len().min(N));
        taken[..now.len()].copy_from_slice(now);
        self.0 = later;
        taken
    }

    /// The next word.
    pub fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
