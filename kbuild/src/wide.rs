//! Objects whose static branches take five bytes each. The assembler makes two of a near one, which leaves no room to
//! branch to code that lies elsewhere; new code is therefore compiled from a header that always asks for five. Owns the
//! change of the header and the proof that it worked.

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, RelocationTarget};

use crate::error::BuildError;

/// The header that has the branches (since Linux v3.0).
pub(crate) const HEADER: &str = "arch/x86/include/asm/jump_label.h";

/// The section of their entries: place, target and key, each relative to itself (Linux v6.12
/// include/linux/jump_label.h, `struct jump_entry`, CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE).
const TABLE: &str = "__jump_table";

/// Bytes of an entry.
const ENTRY: u64 = 16;

/// A `jmp rel32` (Intel SDM vol. 2A, JMP, opcode E9), and the nop of five bytes (Linux v6.12
/// arch/x86/include/asm/nops.h, BYTES_NOP5).
const JUMP: u8 = 0xe9;
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The header with jumps of five bytes, or `None` if it has no jump as any known kernel writes it. Lines stay as they are.
pub(crate) fn header(text: &str) -> Option<String> {
    // The mnemonic begins a string of the assembler's text.
    let made = text.replace("\"jmp ", "\"jmp.d32 ");
    (made != text).then_some(made)
}

/// Whether an object has static branches.
pub(crate) fn has_branches(object: &[u8]) -> bool {
    let file = ElfFile64::<Endianness>::parse(object);
    file.is_ok_and(|file| file.section_by_name(TABLE).is_some())
}

/// Checks that every static branch of an object takes five bytes.
///
/// # Errors
/// [`BuildError::NotWide`] with the first that does not.
pub(crate) fn check(file: &str, object: &[u8]) -> Result<(), BuildError> {
    let not_wide = |place: String| BuildError::NotWide {
        file: file.to_owned(),
        place,
    };
    let unreadable = |error: object::Error| not_wide(error.to_string());
    let elf = ElfFile64::<Endianness>::parse(object).map_err(unreadable)?;
    for table in elf.sections().filter(|it| it.name() == Ok(TABLE)) {
        let mut entries = 0;
        for (offset, relocation) in table.relocations() {
            if offset % ENTRY == 0 {
                let place = place(&elf, relocation.target(), relocation.addend());
                let (section, at, bytes) =
                    place.ok_or_else(|| not_wide(format!("entry {}", offset / ENTRY)))?;
                if bytes.first() != Some(&JUMP) && bytes != NOP {
                    return Err(not_wide(format!("{section}+{at:#x}")));
                }
                entries += 1;
            }
        }
        if entries * ENTRY != table.size() {
            return Err(not_wide(format!("{TABLE} of {} bytes", table.size())));
        }
    }
    Ok(())
}

/// Section, offset and bytes of a branch.
fn place<'data>(
    elf: &ElfFile64<'data>,
    target: RelocationTarget,
    addend: i64,
) -> Option<(String, u64, &'data [u8])> {
    let RelocationTarget::Symbol(symbol) = target else {
        return None;
    };
    let symbol = elf.symbol_by_index(symbol).ok()?;
    let section = elf.section_by_index(symbol.section_index()?).ok()?;
    let at = symbol.address().checked_add_signed(addend)?;
    let start = usize::try_from(at).ok()?;
    let bytes = section
        .data()
        .ok()?
        .get(start..start.checked_add(NOP.len())?)?;
    Some((section.name().ok()?.to_owned(), at, bytes))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The shape of the kernel's header (a text of our own).
    const TEXT: &str = r#"
#define ENTRY ".pushsection __jump_table, \"aw\"\n\t.balign 8\n\t.long 1b - .\n\t.long %l[yes] - .\n\t" \
    ".quad %c0 - .\n\t.popsection\n\t"
static inline __attribute__((always_inline)) int branch(int *const key)
{
    asm goto("1:" "jmp %l[yes] # a note \n\t" ENTRY : : "i" (key) : : yes);
    return 0;
yes:
    return 1;
}
"#;

    const CODE: &str = "
static int key;
int f(int);
int g(int a) { if (branch(&key)) return f(a) + 1; return a; }
int h(int a) { while (branch(&key)) a = f(a); return a; }
";

    fn compiled(header: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (source, object) = (dir.path().join("a.c"), dir.path().join("a.o"));
        std::fs::write(&source, format!("{header}{CODE}")).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-ffunction-sections", "-c", "-o"]);
        assert!(gcc.arg(&object).arg(&source).status().unwrap().success());
        std::fs::read(object).unwrap()
    }

    #[test]
    fn every_branch_takes_five_bytes_where_one_took_two() {
        let near = compiled(TEXT);
        assert!(has_branches(&near));
        let refused = check("fs/a.c", &near).unwrap_err().to_string();
        assert!(
            refused.contains("fs/a.c") && refused.contains(".text."),
            "{refused}"
        );
        let wide = compiled(&header(TEXT).unwrap());
        assert!(has_branches(&wide));
        check("fs/a.c", &wide).unwrap();
    }

    #[test]
    fn a_header_of_another_form_is_told_and_lines_stay() {
        assert_eq!(header("asm goto(\"b %l[yes]\")"), None);
        let made = header(TEXT).unwrap();
        assert_eq!(made.lines().count(), TEXT.lines().count());
        assert!(!made.contains("\"jmp "));
    }

    #[test]
    fn an_object_without_branches_needs_nothing() {
        let plain = compiled("static inline int branch(int *key) { return *key; }");
        assert!(!has_branches(&plain));
        check("fs/a.c", &plain).unwrap();
        assert!(!has_branches(b"no object"));
    }
}
