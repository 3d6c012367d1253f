//! A patch placed for one live guest: every symbol resolved, every relocation applied, every entry jump
//! chosen.
