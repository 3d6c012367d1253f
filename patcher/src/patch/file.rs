//! The patch file on disk: magic, version, length, checksum, content. Refuses what it does not know.
