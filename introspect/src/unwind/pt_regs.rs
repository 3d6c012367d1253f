//! Where the kernel's `struct pt_regs` and `struct inactive_task_frame` keep what unwinding needs. Both
//! layouts are fixed by assembly, not by configuration.

/// Size of `struct pt_regs` (Linux v6.12 `arch/x86/include/asm/ptrace.h`: 21 words, r15 to ss).
pub(crate) const SIZE: u64 = 168;
/// Offset of `r13`.
pub(crate) const R13: u64 = 16;
/// Offset of `bp`.
pub(crate) const BP: u64 = 32;
/// Offset of `r10`.
pub(crate) const R10: u64 = 56;
/// Offset of `ax`.
pub(crate) const AX: u64 = 80;
/// Offset of `dx`.
pub(crate) const DX: u64 = 96;
/// Offset of `di`.
pub(crate) const DI: u64 = 112;
/// Offset of `ip`: from here on the words are those that the CPU itself pushes for an interrupt (Intel
/// SDM vol. 3 section 6.14.2).
pub(crate) const IP: u64 = 128;
/// Offset of `cs`.
pub(crate) const CS: u64 = 136;
/// Offset of `sp`.
pub(crate) const SP: u64 = 152;
/// Size of what the CPU pushes: `ip`, `cs`, `flags`, `sp`, `ss`.
pub(crate) const HARDWARE_SIZE: u64 = SIZE - IP;

/// Size of `struct inactive_task_frame`, which `thread.sp` of a sleeping task points to (Linux v6.12
/// `arch/x86/include/asm/switch_to.h`: r15, r14, r13, r12, bx, bp, ret_addr, as `__switch_to_asm` pushes
/// them).
pub(crate) const INACTIVE_SIZE: u64 = 56;
/// Offset of `bp` in it; `ret_addr` follows.
pub(crate) const INACTIVE_BP: u64 = 40;
