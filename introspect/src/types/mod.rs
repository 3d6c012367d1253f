//! Layouts of kernel types, by member path. Filled from BTF in guest RAM, or from a profile.

/// One member of a struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the outermost struct.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Why a type or member is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// No struct of that name.
    #[error("the guest kernel has no type `struct {0}`")]
    NoStruct(String),
    /// The struct is there, the member is not.
    #[error("`struct {within}` has no member `{member}`")]
    NoMember {
        /// The struct.
        within: String,
        /// The path looked for.
        member: String,
    },
}

/// Type layouts of one kernel.
#[derive(Debug, Default)]
pub struct Types {}

impl Types {
    /// Where the member lies; `path` may go through nested and anonymous structs: `"thread.sp"`.
    ///
    /// # Errors
    /// [`TypeError`].
    pub fn member(&self, within: &str, _path: &str) -> Result<Member, TypeError> {
        Err(TypeError::NoStruct(within.to_owned()))
    }

    /// Size of a struct in bytes.
    ///
    /// # Errors
    /// [`TypeError::NoStruct`].
    pub fn size_of(&self, name: &str) -> Result<u64, TypeError> {
        Err(TypeError::NoStruct(name.to_owned()))
    }

    /// Value of an enumerator.
    #[must_use]
    pub fn enumerator(&self, _name: &str) -> Option<i64> {
        None
    }
}
