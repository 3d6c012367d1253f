//! Return sites, as the kernel's `patch_return` leaves them (Linux v6.12 arch/x86/kernel/alternative.c).

use vmpatch_introspect::Gva;

use crate::link::relocate::{OutOfReach, branch};

/// How this boot of the kernel returns from functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// `ret`, then `int3`.
    Plain,
    /// A jump to the value of `x86_return_thunk`.
    Thunk(Gva),
    /// `its_return_thunk`: needed only where the site lies in the lower half of a cache line.
    LowerHalf(Gva),
}

impl Returns {
    /// The bytes of a site at `at`.
    ///
    /// # Errors
    /// The thunk is out of reach.
    pub fn site(self, at: Gva, length: usize) -> Result<Vec<u8>, OutOfReach> {
        let mut bytes = match self {
            Self::Thunk(thunk) => branch(0xe9, at, thunk)?.to_vec(),
            Self::LowerHalf(thunk) if at.0 & 0x20 == 0 => branch(0xe9, at, thunk)?.to_vec(),
            Self::Plain | Self::LowerHalf(_) => vec![0xc3],
        };
        if bytes.len() < length {
            bytes.resize(length, 0xcc);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_return_is_followed_by_traps() {
        assert_eq!(
            Returns::Plain.site(Gva(0x1000), 5).unwrap(),
            [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]
        );
    }

    #[test]
    fn a_thunk_for_the_lower_half_is_used_there_only() {
        let its = Returns::LowerHalf(Gva(0x2000));
        assert_eq!(its.site(Gva(0x1005), 5).unwrap(), [0xe9, 0xf6, 0x0f, 0, 0]);
        assert_eq!(
            its.site(Gva(0x1025), 5).unwrap(),
            [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]
        );
    }
}
