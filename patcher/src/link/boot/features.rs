//! Numbers of the CPU features that linking itself asks about: 32 times word plus bit, the same in Linux v6.1
//! and v6.12 arch/x86/include/asm/cpufeatures.h unless said otherwise.

/// `X86_FEATURE_PTI`.
pub const PTI: u16 = 7 * 32 + 11;
/// `X86_FEATURE_RETPOLINE`.
pub const RETPOLINE: u16 = 11 * 32 + 12;
/// `X86_FEATURE_RETPOLINE_LFENCE`.
pub const RETPOLINE_LFENCE: u16 = 11 * 32 + 13;
/// `X86_FEATURE_RETHUNK`.
pub const RETHUNK: u16 = 11 * 32 + 14;
/// `X86_FEATURE_CALL_DEPTH` (since v6.2).
pub const CALL_DEPTH: u16 = 11 * 32 + 19;
/// `X86_FEATURE_IBT`.
pub const IBT: u16 = 18 * 32 + 20;
/// `X86_FEATURE_INDIRECT_THUNK_ITS` in 6.1.
pub const ITS_6_1: u16 = 21 * 32 + 5;
/// `X86_FEATURE_INDIRECT_THUNK_ITS` in 6.12.
pub const ITS_6_12: u16 = 21 * 32 + 6;
