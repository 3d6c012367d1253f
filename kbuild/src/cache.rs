//! Where this tool keeps what takes long to make. Does not create anything.

use std::io;
use std::path::PathBuf;

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Nothing says where.
    #[error("neither VMPATCH_CACHE nor HOME says where the cache may be")]
    Nowhere,
    /// The variable cannot be used.
    #[error("VMPATCH_CACHE is no path: {0}")]
    NoPath(#[from] io::Error),
}

/// `$VMPATCH_CACHE`, by default `~/.cache/vmpatch`.
///
/// # Errors
/// [`CacheError`].
pub fn dir() -> Result<PathBuf, CacheError> {
    if let Some(dir) = std::env::var_os("VMPATCH_CACHE") {
        return Ok(std::path::absolute(dir)?);
    }
    let home = std::env::var_os("HOME").ok_or(CacheError::Nowhere)?;
    Ok(PathBuf::from(home).join(".cache/vmpatch"))
}
