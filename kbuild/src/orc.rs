//! The unwind data (ORC) of an object. The kernel's own objtool makes it; of kernels with indirect branch tracking only when
//! all of vmlinux or of a module is linked (Linux v6.12 scripts/Makefile.lib, `delay-objtool`), and of those that go by frame
//! pointers never, so that objects have none. It is then run on a copy here, for nothing but that. The object itself stays as the compiler made it.

use object::read::elf::ElfFile64;
use object::{Endianness, Object};
use std::fs;
use std::path::{Path, PathBuf};

use crate::command;

/// The kernel's own objtool in a tree made ready: its `make prepare` builds it where the configuration needs it.
const OBJTOOL: &str = "tools/objtool/objtool";

/// The section of the entries.
const ENTRIES: &str = ".orc_unwind";

/// Where the unwind data of an object's code is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Orc {
    /// In the object itself.
    Within,
    /// In a copy of it.
    Copy(Vec<u8>),
    /// Nowhere, and why.
    Absent(String),
}

/// Makes it.
pub(crate) struct Maker {
    objtool: PathBuf,
    /// Where the copy lies meanwhile.
    copy: PathBuf,
    /// Why it makes none.
    unable: Option<&'static str>,
}

impl Maker {
    /// With what a tree made ready in `out` by this configuration has.
    pub(crate) fn of(out: &Path, config: &str) -> Self {
        let objtool = out.join(OBJTOOL);
        let has = |option: &str| config.lines().any(|line| line == option);
        // Of a kernel that goes by frame pointers it tells where code keeps them.
        let unwinds = ["CONFIG_UNWINDER_ORC=y", "CONFIG_UNWINDER_FRAME_POINTER=y"];
        let unable = match unwinds.into_iter().any(has) {
            true => (!objtool.is_file()).then_some("the kernel's build made no objtool"),
            false => Some("the kernel is configured to unwind by guess"),
        };
        Self {
            objtool,
            copy: out.join("vmpatch-orc.o"),
            unable,
        }
    }

    /// Looks at an object, and makes its unwind data if it has none.
    pub(crate) fn make(&self, object: &[u8]) -> Orc {
        if is_within(object) {
            return Orc::Within;
        }
        let copy = match self.unable {
            Some(why) => Err(why.to_owned()),
            None => self.run(object),
        };
        copy.map_or_else(Orc::Absent, Orc::Copy)
    }

    fn run(&self, object: &[u8]) -> Result<Vec<u8>, String> {
        let io = |error: std::io::Error| format!("{}: {error}", self.copy.display());
        fs::write(&self.copy, object).map_err(io)?;
        let mut objtool = command::plain(&self.objtool);
        // Whatever else it can do to an object, or be told to do, is not wanted.
        objtool.arg("--orc").arg(&self.copy);
        let done = command::succeed("the kernel's own objtool", &mut objtool);
        let made = fs::read(&self.copy).map_err(io);
        let _ = fs::remove_file(&self.copy);
        let said = done.map_err(|error| error.to_string())?;
        let made = made?;
        match is_within(&made) {
            true => Ok(made),
            false => Err(format!(
                "the kernel's own objtool makes none: {}",
                command::last_words(&said)
            )),
        }
    }
}

fn is_within(object: &[u8]) -> bool {
    let file = ElfFile64::<Endianness>::parse(object);
    file.is_ok_and(|file| file.section_by_name(ENTRIES).is_some())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    const CONFIG: &str = "CONFIG_OBJTOOL=y\nCONFIG_UNWINDER_ORC=y\n";

    fn compiled(more: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let (source, object) = (folder.path().join("a.c"), folder.path().join("a.o"));
        fs::write(&source, format!("int f(int a) {{ return a; }}\n{more}")).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-c", "-o"]).arg(&object).arg(&source);
        assert!(gcc.status().unwrap().success());
        fs::read(object).unwrap()
    }

    /// What a program in the place of objtool makes of an object without unwind data.
    fn made_by(script: &str) -> Orc {
        let out = tempfile::tempdir().unwrap();
        let objtool = out.path().join(OBJTOOL);
        fs::create_dir_all(objtool.parent().unwrap()).unwrap();
        fs::write(&objtool, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&objtool, fs::Permissions::from_mode(0o755)).unwrap();
        let made = Maker::of(out.path(), CONFIG).make(&compiled(""));
        let left = fs::read_dir(out.path()).unwrap().count();
        assert_eq!(left, 1, "the copy is not left behind");
        made
    }

    fn why(orc: Orc) -> String {
        match orc {
            Orc::Absent(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_object_that_has_its_own_needs_none() {
        let own = compiled("__attribute__((section(\".orc_unwind\"))) int own = 1;");
        let nothing = Maker::of(Path::new("/nonexistent"), "");
        assert_eq!(nothing.make(&own), Orc::Within);
    }

    #[test]
    fn objtool_is_asked_for_unwind_data_alone_and_works_on_a_copy() {
        let add = "[ \"$1\" = --orc ] && [ $# = 2 ] && objcopy --add-section .orc_unwind=$0 $2";
        let Orc::Copy(copy) = made_by(add) else {
            panic!("no copy")
        };
        assert!(is_within(&copy) && copy != compiled(""));
    }

    #[test]
    fn where_there_is_none_the_reason_is_told() {
        assert!(why(made_by("echo 'a.o: no such thing' >&2; exit 1")).contains("no such thing"));
        assert!(why(made_by("echo skipping >&2")).contains("skipping"));
        let nowhere =
            |config| why(Maker::of(Path::new("/nonexistent"), config).make(&compiled("")));
        assert!(nowhere(CONFIG).contains("no objtool"));
        assert!(nowhere("CONFIG_UNWINDER_FRAME_POINTER=y\n").contains("no objtool"));
        assert!(nowhere("# CONFIG_UNWINDER_ORC is not set\n").contains("by guess"));
    }
}
