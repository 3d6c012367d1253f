//! One file a developer command.

pub(crate) mod bench;
pub(crate) mod corpus;
pub(crate) mod demo;
pub(crate) mod host;
pub(crate) mod images;
pub(crate) mod lint;
pub(crate) mod objects;
pub(crate) mod setup;
pub(crate) mod soak;
pub(crate) mod test;
