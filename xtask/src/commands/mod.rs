//! One file a developer command.

pub(crate) mod host;
pub(crate) mod images;
pub(crate) mod lint;
pub(crate) mod objects;
pub(crate) mod setup;
