//! Indirect branches, as the kernel's `patch_retpoline` leaves them (Linux v6.12
//! arch/x86/kernel/alternative.c).

use vmpatch_introspect::Gva;

use super::{Rules, nops};
use crate::link::relocate::{OutOfReach, branch};

/// Distance between two thunks (`RETPOLINE_THUNK_SIZE`, `ITS_THUNK_SIZE`; Linux v6.12
/// arch/x86/include/asm/nospec-branch.h).
const THUNK: u64 = 32;
const ITS_THUNK: u64 = 64;

/// How this boot of the kernel branches through registers. The addresses are those of arrays with one
/// thunk for each register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indirect {
    /// Through `__x86_indirect_thunk_array`.
    Thunk(Gva),
    /// Through the thunks that count calls (call-depth tracking).
    Counted {
        /// `__x86_indirect_call_thunk_array`.
        calls: Gva,
        /// `__x86_indirect_jump_thunk_array`.
        jumps: Gva,
    },
    /// Directly, where that fits.
    Direct {
        /// After an `lfence`.
        lfence: bool,
        /// `__x86_indirect_its_thunk_array`, for branches in the lower half of a cache line.
        its: Option<Gva>,
        /// `__x86_indirect_thunk_array`, where the direct form does not fit.
        otherwise: Gva,
    },
}

/// A site to be written.
#[derive(Clone, Copy, Debug)]
pub struct IndirectSite {
    /// Where.
    pub at: Gva,
    /// 5, or 6 with a CS prefix.
    pub length: usize,
    /// Register in the x86 encoding.
    pub register: u8,
    /// A call; else a jump.
    pub call: bool,
}

impl Indirect {
    /// The bytes of a site. The thunk for a lower half is the one in the kernel image; the kernel itself
    /// may have taken one of its own making.
    ///
    /// # Errors
    /// The thunk is out of reach.
    pub fn site(self, rules: Rules, site: IndirectSite) -> Result<Vec<u8>, OutOfReach> {
        match self {
            Self::Thunk(array) => site.through(array, THUNK),
            Self::Counted { calls, jumps } => {
                site.through(if site.call { calls } else { jumps }, THUNK)
            }
            Self::Direct {
                lfence,
                its,
                otherwise,
            } => {
                let fence: &[u8] = if lfence { &[0x0f, 0xae, 0xe8] } else { &[] };
                match its {
                    Some(array) if site.in_lower_half(fence.len()) => {
                        site.through(array, ITS_THUNK)
                    }
                    _ => match site.direct(fence) {
                        bytes if bytes.len() == site.length => Ok(optimised(rules, bytes)),
                        _ => site.through(otherwise, THUNK),
                    },
                }
            }
        }
    }
}

fn optimised(rules: Rules, mut bytes: Vec<u8>) -> Vec<u8> {
    nops::optimise(rules, &mut bytes);
    bytes
}

impl IndirectSite {
    /// Whether the last byte of the branch would lie in the lower half of a cache line
    /// (`cpu_wants_indirect_its_thunk_at`).
    fn in_lower_half(&self, before: usize) -> bool {
        let last = self
            .at
            .0
            .wrapping_add(before as u64 + 1 + u64::from(self.register / 8));
        last & 0x20 == 0
    }

    fn through(&self, array: Gva, step: u64) -> Result<Vec<u8>, OutOfReach> {
        let thunk = array.wrapping_add(u64::from(self.register) * step);
        let prefix: &[u8] = if self.length == 6 { &[0x2e] } else { &[] };
        let at = self.at.wrapping_add(prefix.len() as u64);
        let opcode = if self.call { 0xe8 } else { 0xe9 };
        Ok([prefix, &branch(opcode, at, thunk)?].concat())
    }

    /// `[fence] call/jmp *reg`, filled up; longer than the site where it does not fit.
    fn direct(&self, fence: &[u8]) -> Vec<u8> {
        let mut bytes = fence.to_vec();
        if self.register >= 8 {
            bytes.push(0x41);
        }
        bytes.extend([
            0xff,
            if self.call { 0xd0 } else { 0xe0 } | (self.register & 7),
        ]);
        if !self.call && bytes.len() < self.length {
            bytes.push(0xcc);
        }
        if bytes.len() < self.length {
            bytes.resize(self.length, 0x90);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic, Register};

    use super::*;

    const R11_CALL: IndirectSite = IndirectSite {
        at: Gva(0x1000),
        length: 6,
        register: 11,
        call: true,
    };
    const RAX_JUMP: IndirectSite = IndirectSite {
        at: Gva(0x1000),
        length: 5,
        register: 0,
        call: false,
    };

    fn direct(lfence: bool, its: Option<Gva>) -> Indirect {
        Indirect::Direct {
            lfence,
            its,
            otherwise: Gva(0x8000),
        }
    }

    #[test]
    fn with_retpolines_off_a_call_goes_through_its_register() {
        let bytes = direct(false, None).site(Rules::Single, R11_CALL).unwrap();
        let call = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        assert_eq!(
            (call.mnemonic(), call.op0_register()),
            (Mnemonic::Call, Register::R11)
        );
        assert_eq!(bytes[3..], [0x0f, 0x1f, 0x00]);
        let bytes = direct(false, None).site(Rules::Single, RAX_JUMP).unwrap();
        assert_eq!(bytes, [0xff, 0xe0, 0xcc, 0x66, 0x90]);
    }

    #[test]
    fn a_thunk_is_picked_by_register() {
        let bytes = Indirect::Thunk(Gva(0x2000))
            .site(Rules::Single, R11_CALL)
            .unwrap();
        let call = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(call.near_branch_target(), 0x2000 + 11 * 32);
        assert_eq!((bytes[0], bytes.len()), (0x2e, 6));
    }

    #[test]
    fn a_fence_that_does_not_fit_leaves_the_thunk() {
        let r9 = IndirectSite {
            register: 9,
            length: 5,
            ..RAX_JUMP
        };
        let bytes = direct(true, None).site(Rules::Single, r9).unwrap();
        let jump = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(jump.near_branch_target(), 0x8000 + 9 * 32);
        let bytes = direct(true, None).site(Rules::Single, RAX_JUMP).unwrap();
        assert_eq!(bytes, [0x0f, 0xae, 0xe8, 0xff, 0xe0]);
    }

    #[test]
    fn only_a_branch_in_the_lower_half_of_a_line_takes_the_its_thunk() {
        let its = direct(false, Some(Gva(0x4000)));
        let low = its.site(Rules::Single, RAX_JUMP).unwrap();
        let jump = Decoder::with_ip(64, &low, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(jump.near_branch_target(), 0x4000);
        let high = its
            .site(
                Rules::Single,
                IndirectSite {
                    at: Gva(0x1020),
                    ..RAX_JUMP
                },
            )
            .unwrap();
        assert_eq!(high[..2], [0xff, 0xe0]);
    }
}
