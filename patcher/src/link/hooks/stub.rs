//! The code that a hooked look-up runs first: whether the address is in a patch's table; if so it answers, if not
//! the kernel's own look-up goes on as if nothing had been before. Owns the encoding.
//!
//! It makes no call, so no return address ever leads into it; it uses eight bytes of stack, and keeps every register
//! but `rax`, which holds the answer: a compiler may know what the function it stands before leaves alone.

use vmpatch_introspect::Gva;
use vmpatch_introspect::unwind::orc::Entry;

use super::super::boot::returns::Returns;
use super::super::relocate::{OutOfReach, branch};
use crate::arena::fixed::{ENTRY, Table};
use crate::arena::window::{WINDOW_PAGES, WINDOW_START};
use crate::unwind::Row;

/// Makes a stub: `displaced` are the instructions that the jump to it takes the place of, and `back` is where the
/// function goes on behind them.
///
/// # Errors
/// The function or the thunk that returns is out of reach.
pub fn encode(
    table: Table,
    displaced: &[u8],
    back: Gva,
    returns: Returns,
) -> Result<Vec<u8>, OutOfReach> {
    write(table, displaced, back, returns).map(|code| code.bytes)
}

/// How to unwind from a stub, up to the first of the displaced instructions: what those do to the stack is the guest's own.
/// No other part of it differs from guest to guest in more than where it leads.
#[must_use]
pub fn rows(table: Table) -> Vec<Row> {
    let nothing = write(table, &[], table.stub(), Returns::Plain);
    nothing.map_or_else(|_| Vec::new(), |code| code.rows)
}

fn write(table: Table, displaced: &[u8], back: Gva, returns: Returns) -> Result<Code, OutOfReach> {
    let mut code = Code::at(table.stub());
    code.pushed(0);
    // Both lie within 2 GiB of the end of the address space, so that 32 bits name them, sign-extended.
    let from_window = (WINDOW_START.0.wrapping_neg() as u32).to_le_bytes();
    let directory = (table.directory().0 as u32).to_le_bytes();
    code.add(&[0x51]); // push rcx
    code.pushed(8);
    code.add(&[0x48, 0x8d, 0x87]); // lea rax, [rdi - window]
    code.add(&from_window);
    code.add(&[0x48, 0xc1, 0xe8, 12]); // shr rax, 12
    code.add(&[0x48, 0x3d]); // cmp rax, pages
    code.add(&WINDOW_PAGES.to_le_bytes());
    let outside = code.short(0x73); // jae
    code.add(&[0x48, 0x8b, 0x04, 0xc5]); // mov rax, [rax * 8 + directory]
    code.add(&directory);
    code.add(&[0x48, 0x85, 0xc0]); // test rax, rax
    let without = code.short(0x74); // je
    let next = code.bytes.len();
    code.add(&[0x48, 0x63, 0x08]); // movsxd rcx, dword [rax]
    code.add(&[0x85, 0xc9]); // test ecx, ecx
    let end = code.short(0x74); // je
    code.add(&[0x48, 0x01, 0xc1]); // add rcx, rax
    code.add(&[0x48, 0x39, 0xf9]); // cmp rcx, rdi
    let found = code.short(0x74); // je
    code.add(&[0x48, 0x83, 0xc0, ENTRY as u8]); // add rax, entry
    let again = code.short(0xeb); // jmp
    code.lead(again, next);
    code.lead_here(&[found]);
    code.add(&[0x59]); // pop rcx
    code.pushed(0);
    let back_to_caller = returns.site(code.here(), 5)?;
    code.add(&back_to_caller);
    code.lead_here(&[outside, without, end]);
    code.pushed(8);
    code.add(&[0x59]); // pop rcx
    code.pushed(0);
    code.known_no_longer();
    code.add(displaced);
    let onward = branch(0xe9, code.here(), back)?;
    code.add(&onward);
    Ok(code)
}

struct Code {
    start: Gva,
    bytes: Vec<u8>,
    rows: Vec<Row>,
}

impl Code {
    const fn at(start: Gva) -> Self {
        Self {
            start,
            bytes: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// From here on so many bytes lie upon the return address.
    fn pushed(&mut self, bytes: i16) {
        let entry = Entry {
            sp_offset: Entry::FUNCTION_START.sp_offset + bytes,
            ..Entry::FUNCTION_START
        };
        self.rows.push((self.here(), entry));
    }

    /// From the next instruction on nothing is known of the stack.
    fn known_no_longer(&mut self) {
        self.rows
            .push((self.here().wrapping_add(1), Entry::UNDEFINED));
    }

    fn here(&self) -> Gva {
        self.start.wrapping_add(self.bytes.len() as u64)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// A short jump that leads nowhere yet; where its distance stands.
    fn short(&mut self, opcode: u8) -> usize {
        self.add(&[opcode, 0]);
        self.bytes.len() - 1
    }

    fn lead(&mut self, from: usize, to: usize) {
        // The whole stub is shorter than what a short jump reaches.
        let distance = to.wrapping_sub(from + 1) as u8;
        if let Some(field) = self.bytes.get_mut(from) {
            *field = distance;
        }
    }

    fn lead_here(&mut self, all: &[usize]) {
        let here = self.bytes.len();
        all.iter().for_each(|from| self.lead(*from, here));
    }
}

#[cfg(test)]
mod tests;
