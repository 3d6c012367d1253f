//! The headers that vmpatch brings for fixes to include (`<vmpatch/…>`): put beside the source, where the compiler finds them.
//! They are part of the program, so that they fit the patches it makes.

use std::fs;
use std::path::Path;

use crate::error::{At, BuildError};
use crate::publish;

/// How what includes one of them begins.
pub const INCLUDED: &str = "#include <vmpatch/";

/// Names by which they are included, and their texts.
pub const HEADERS: [(&str, &str); 2] = [
    (
        "vmpatch/callbacks.h",
        include_str!("../../include/vmpatch/callbacks.h"),
    ),
    (
        "vmpatch/shadow.h",
        include_str!("../../include/vmpatch/shadow.h"),
    ),
];

/// Makes a folder hold them; those of another version that are there are replaced.
pub(crate) fn write(folder: &Path) -> Result<(), BuildError> {
    for (name, text) in HEADERS {
        let at = folder.join(name);
        if fs::read(&at).is_ok_and(|there| there == text.as_bytes()) {
            continue;
        }
        let parent = at.parent().unwrap_or(folder);
        fs::create_dir_all(parent).at(parent)?;
        publish::file(&at, text.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_another_version_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("vmpatch/shadow.h");
        for before in [None, Some("older")] {
            if let Some(before) = before {
                fs::write(&at, before).unwrap();
            }
            write(folder.path()).unwrap();
            let text = fs::read_to_string(&at).unwrap();
            assert!(text.contains("vmpatch_shadow_get("), "{text}");
        }
    }
}
