//! The rule of dependencies between our crates, checked against what cargo says. `patcher → introspect ← vmm`, and only the
//! root package sees all four: `kbuild` stands by itself.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{paths, run};

/// Our crates and which of ours each may use, for the product itself or for tests.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("vmpatch-introspect", &[]),
    ("vmpatch-patcher", &["vmpatch-introspect"]),
    ("vmpatch-vmm", &["vmpatch-introspect"]),
    ("vmpatch-kbuild", &["vmpatch-testkit"]),
    ("vmpatch-testkit", &[]),
    (
        "vmpatch",
        &[
            "vmpatch-introspect",
            "vmpatch-kbuild",
            "vmpatch-patcher",
            "vmpatch-vmm",
            "vmpatch-testkit",
        ],
    ),
    ("xtask", &["vmpatch-kbuild", "vmpatch-testkit"]),
];

/// Fails with every dependency that the rule does not allow.
pub(crate) fn check() -> Result<()> {
    let text = run::stdout(
        Command::new("cargo")
            .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
            .current_dir(paths::repo()),
    )?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    let broken = breaches(&metadata);
    if !broken.is_empty() {
        bail!("not allowed: {}", broken.join(", "));
    }
    Ok(())
}

fn breaches(metadata: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for package in items(metadata, "packages") {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| *n == name) else {
            found.push(format!("crate {name}, which the rule does not know"));
            continue;
        };
        for dependency in items(package, "dependencies").filter_map(|d| d["name"].as_str()) {
            let ours = ALLOWED.iter().any(|(n, _)| *n == dependency);
            // A crate's tests may use the crate itself with more features.
            if ours && dependency != name && !allowed.contains(&dependency) {
                found.push(format!("{name} → {dependency}"));
            }
        }
    }
    found
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn package(name: &str, uses: &[&str]) -> Value {
        let dependencies: Vec<Value> = uses.iter().map(|u| json!({ "name": u })).collect();
        json!({ "name": name, "dependencies": dependencies })
    }

    #[test]
    fn an_arrow_the_wrong_way_is_named() {
        let metadata =
            json!({ "packages": [package("vmpatch-introspect", &["serde", "vmpatch-vmm"])] });
        assert_eq!(breaches(&metadata), ["vmpatch-introspect → vmpatch-vmm"]);
    }

    #[test]
    fn the_arrows_of_the_design_are_allowed() {
        let metadata = json!({ "packages": [package("vmpatch-patcher", &["vmpatch-introspect", "vmpatch-patcher", "object"])] });
        assert!(breaches(&metadata).is_empty());
    }
}
