//! Whether two objects do the same: what is loaded into the kernel, byte for byte, with what is to be filled in. What is only for
//! debuggers does not count.

use object::read::elf::ElfFile64;
use object::{
    Endianness, Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget,
    SectionFlags, elf,
};

/// What is loaded of a section.
#[derive(PartialEq)]
struct Loaded<'a> {
    name: &'a [u8],
    size: u64,
    data: &'a [u8],
    fields: Vec<Field<'a>>,
}

/// A field that the linker fills in.
#[derive(PartialEq)]
struct Field<'a> {
    offset: u64,
    flags: RelocationFlags,
    /// Symbol or section.
    target: &'a [u8],
    addend: i64,
}

/// Whether both are loaded the same; not if one cannot be read.
pub(crate) fn is_same(old: &[u8], new: &[u8]) -> bool {
    old == new
        || loaded(old)
            .zip(loaded(new))
            .is_some_and(|(old, new)| old == new)
}

fn loaded(object: &[u8]) -> Option<Vec<Loaded<'_>>> {
    let file = ElfFile64::<Endianness>::parse(object).ok()?;
    let mut found = Vec::new();
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
            return None;
        };
        if !sh_flags.contains(elf::SHF_ALLOC) {
            continue;
        }
        let mut fields = Vec::new();
        for (offset, field) in section.relocations() {
            fields.push(Field {
                offset,
                flags: field.flags(),
                target: target(&file, field.target())?,
                addend: field.addend(),
            });
        }
        found.push(Loaded {
            name: section.name_bytes().ok()?,
            size: section.size(),
            data: section.data().ok()?,
            fields,
        });
    }
    Some(found)
}

fn target<'a>(file: &ElfFile64<'a>, target: RelocationTarget) -> Option<&'a [u8]> {
    let RelocationTarget::Symbol(index) = target else {
        return Some(b"");
    };
    let symbol = file.symbol_by_index(index).ok()?;
    let name = symbol.name_bytes().ok()?;
    match (name, symbol.section_index()) {
        (b"", Some(section)) => file.section_by_index(section).ok()?.name_bytes().ok(),
        _ => Some(name),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn compiled(text: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (source, made) = (dir.path().join("a.c"), dir.path().join("a.o"));
        std::fs::write(&source, text).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-g", "-ffunction-sections", "-c", "-o"]);
        assert!(gcc.arg(&made).arg(&source).status().unwrap().success());
        std::fs::read(made).unwrap()
    }

    #[test]
    fn lines_and_names_of_types_do_not_count_and_code_and_callees_do() {
        let text =
            "struct a { int b; };\nint g(int), h(int);\nint f(struct a *a) { return g(a->b); }\n";
        let old = compiled(text);
        let renamed = compiled(&format!("\n\n{}", text.replace("struct a", "struct c")));
        assert!(old != renamed && is_same(&old, &renamed));
        for (from, to) in [("return g(", "return h("), ("a->b)", "a->b + 1)")] {
            assert!(!is_same(&old, &compiled(&text.replace(from, to))), "{to}");
        }
        assert!(!is_same(&old, b"no object"));
    }
}
