//! Objects that the call names: which belongs to which.

use std::path::PathBuf;

use vmpatch_kbuild::Orc;
use vmpatch_patcher::patch::VMLINUX;

use super::objects::{File, read};
use crate::exit::Failure;

/// The n-th old object with the n-th new one, and with the n-th name of what both are linked into; one name is for all,
/// none is the kernel itself.
pub(super) fn given(
    old: &[PathBuf],
    new: &[PathBuf],
    objects: &[String],
) -> Result<Vec<File>, Failure> {
    let names = names(old.len(), new.len(), objects)?;
    let files = old.iter().zip(new).zip(names).map(|((old, new), object)| {
        Ok(File {
            name: new.display().to_string(),
            object: object.to_owned(),
            old: read(old, "object")?,
            new: read(new, "object")?,
            wide: None,
            orc: Orc::Within,
        })
    });
    files.collect()
}

fn names(old: usize, new: usize, objects: &[String]) -> Result<Vec<&str>, Failure> {
    if old != new {
        return Err(Failure::Usage(format!(
            "--old is given {old} times and --new {new} times: the first belongs to the first, and so on"
        )));
    }
    match objects {
        [] => Ok(vec![VMLINUX; old]),
        [one] => Ok(vec![one; old]),
        all if all.len() == old => Ok(all.iter().map(String::as_str).collect()),
        all => Err(Failure::Usage(format!(
            "--object is given {} times for {old} pairs of objects: give one for each, or one for all",
            all.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_name_is_for_all_and_none_is_the_kernel() {
        let named = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        assert_eq!(names(2, 2, &[]).unwrap(), ["vmlinux", "vmlinux"]);
        assert_eq!(names(2, 2, &named(&["ext4"])).unwrap(), ["ext4", "ext4"]);
        let both = named(&["ext4", "vmlinux"]);
        assert_eq!(names(2, 2, &both).unwrap(), ["ext4", "vmlinux"]);
    }

    #[test]
    fn counts_that_differ_are_a_usage_error_with_both_counts() {
        let refused = |old, new, objects| match names(old, new, objects) {
            Err(Failure::Usage(why)) => why,
            other => panic!("{other:?}"),
        };
        let why = refused(2, 1, &[]);
        assert!(why.contains("2 times") && why.contains("1 times"), "{why}");
        let why = refused(3, 3, &["a".to_owned(), "b".to_owned()]);
        assert!(why.contains("2 times for 3 pairs"), "{why}");
    }
}
