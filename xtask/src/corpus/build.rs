//! `vmpatch build` of every entry, as a maintainer would type it. What came of it is kept in the cache for as long as neither the
//! entry nor the product changes, so that a corpus that was interrupted goes on where it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmpatch_testkit::Tool;

use super::Entry;
use crate::manifest::Manifest;
use crate::{checksum, images, paths, publish};

/// The exit code of a refusal.
pub(crate) const REFUSED: i32 = 3;

/// What an entry is built from, beside its diff.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Source of the running kernel.
    pub source: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
}

/// What came of one build.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Built {
    /// Exit code of the product.
    pub code: Option<i32>,
    /// Its answer.
    pub answer: Value,
    /// What it said beside that.
    pub said: String,
    /// How long it took.
    pub seconds: f64,
}

/// Source and configuration of a guest's kernel, as files.
pub(crate) fn kernel(manifest: &Manifest, guest: &str) -> Result<Kernel> {
    let recipe = images::recipe(manifest, guest)?;
    let config = paths::cache()?
        .join("corpus")
        .join(format!("{guest}.config"));
    fs::create_dir_all(config.parent().unwrap_or(&config))?;
    publish::file(&config, recipe.config.as_bytes())?;
    Ok(Kernel {
        source: recipe.source,
        config,
    })
}

/// Builds one entry, or takes what came of it before.
pub(crate) fn build(tool: &Tool, product: &str, kernel: &Kernel, entry: &Entry) -> Result<Built> {
    kept(tool, product, kernel, &entry.diff(), &patch(entry)?)
}

/// Builds a patch from a diff into a folder of its own, or takes what is there of the same product, diff and kernel.
pub(crate) fn kept(
    tool: &Tool,
    product: &str,
    kernel: &Kernel,
    diff: &Path,
    patch: &Path,
) -> Result<Built> {
    let dir = patch.parent().context("a patch without a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let text = fs::read(diff).with_context(|| format!("cannot read {}", diff.display()))?;
    let made_of = checksum::of_parts(&[
        product.as_bytes(),
        &text,
        kernel.source.as_os_str().as_encoded_bytes(),
        &fs::read(&kernel.config)
            .with_context(|| format!("cannot read {}", kernel.config.display()))?,
    ]);
    let (stamp, log) = (dir.join("stamp"), dir.join("build.json"));
    if fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == made_of)
        && let Ok(text) = fs::read(&log)
        && let Ok(built) = serde_json::from_slice::<Built>(&text)
        && (!built.is_patch() || patch.exists())
    {
        return Ok(built);
    }
    // What is there from now on may be of this run: an interrupted one must not be taken for that of before.
    if stamp.exists() {
        fs::remove_file(&stamp).with_context(|| format!("cannot remove {}", stamp.display()))?;
    }
    let built = now(tool, kernel, diff, patch)?;
    publish::file(&log, &serde_json::to_vec_pretty(&built)?)?;
    publish::file(&stamp, made_of.as_bytes())?;
    Ok(built)
}

/// Names this very product.
pub(crate) fn product(tool: &Tool) -> Result<String> {
    let path = PathBuf::from(tool.command().get_program());
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(checksum::of_parts(&[&bytes]))
}

/// Builds a patch from a diff.
pub(crate) fn now(tool: &Tool, kernel: &Kernel, diff: &Path, patch: &Path) -> Result<Built> {
    let cache = paths::cache()?;
    let cache = cache.to_str().context("the cache's path is not UTF-8")?;
    let answer = tool.with_env("VMPATCH_CACHE", cache).call([
        "build".as_ref(),
        "--source".as_ref(),
        kernel.source.as_os_str(),
        "--config".as_ref(),
        kernel.config.as_os_str(),
        "--diff".as_ref(),
        diff.as_os_str(),
        "--output".as_ref(),
        patch.as_os_str(),
    ])?;
    Ok(Built {
        code: answer.code,
        answer: answer.json,
        said: answer.stderr,
        seconds: round(answer.time),
    })
}

/// The folder of an entry's patch and logs.
pub(crate) fn folder(entry: &Entry) -> Result<PathBuf> {
    Ok(paths::cache()?.join("corpus").join(&entry.name))
}

/// The patch file of an entry.
pub(crate) fn patch(entry: &Entry) -> Result<PathBuf> {
    Ok(folder(entry)?.join(format!("{}.vmpatch", entry.name)))
}

fn round(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).round() / 10.0
}

impl Built {
    /// That of an entry for which the product could not be asked.
    pub(crate) fn failed(error: &anyhow::Error) -> Self {
        Self {
            code: None,
            answer: Value::Null,
            said: format!("{error:#}"),
            seconds: 0.0,
        }
    }

    /// Whether there is a patch.
    pub(crate) fn is_patch(&self) -> bool {
        self.code == Some(0)
    }

    /// Why there is none.
    pub(crate) fn reason(&self) -> String {
        let told = self.answer["reason"]
            .as_str()
            .or(self.answer["error"].as_str());
        told.unwrap_or(&self.said).trim().to_owned()
    }
}
