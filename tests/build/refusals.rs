//! What must not become a patch: each case ends with exit code 3 and a reason that names the thing, and leaves nothing behind. What a
//! guest is needed for is in `tests/e2e/refusals.rs`: a symbol that it lacks, among others.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use vmpatch_testkit::Kernel;

use crate::support::{Bench, patch};

/// A source, a line of it, and what becomes of that line.
#[track_caller]
fn changed(source: &str, from: &str, to: &str, words: &[&str]) {
    assert_eq!(source.matches(from).count(), 1);
    let bench = Bench::new();
    let answer = bench.compare(source, &source.replace(from, to));
    bench.refuses(&answer, words);
}

#[test]
fn no_functional_change() {
    let source = "\
static int limit = 7;
int checked(int n) { return n > limit ? limit : n + 2; }
";
    let other = "\n\n!(limit >= n) ? limit : 2 + n";
    changed(
        source,
        "n > limit ? limit : n + 2",
        other,
        &["nothing changed"],
    );
}

#[test]
fn a_function_that_runs_only_at_boot() {
    let source = "\
__attribute__((section(\".init.text\"))) int set_up(int n) { return n + 1; }
int used(int n) { return n * 3; }
";
    changed(
        source,
        "n + 1",
        "n + 2",
        &["set_up", ".init.text", "only at boot"],
    );
    // One that can be replaced does not take it along.
    let both = source.replace("n + 1", "n + 2").replace("n * 3", "n * 5");
    let bench = Bench::new();
    bench.refuses(&bench.compare(source, &both), &["set_up", ".init.text"]);
}

#[test]
fn another_layout_of_a_structure() {
    let source = "\
struct waiter { long since; int priority; };
long rank(struct waiter *waiter) { return waiter->since + waiter->priority; }
";
    let more = ["struct waiter", "member boost"];
    changed(source, "int priority;", "int priority; int boost;", &more);
    let moved = ["struct waiter", "member priority"];
    changed(
        source,
        "long since; int priority;",
        "int priority; long since;",
        &moved,
    );
}

#[test]
fn another_initial_value() {
    let source = "\
int limit = 5;
static const int steps[] = { 1, 2, 3 };
int next(int n) { return n > limit ? 0 : steps[n]; }
";
    changed(
        source,
        "limit = 5",
        "limit = 6",
        &["limit", "initial value"],
    );
    let source = source.replace("static const", "const");
    changed(&source, "1, 2, 3", "1, 2, 4", &["steps", "initial value"]);
}

#[test]
fn what_a_diff_of_a_kernel_must_not_be() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let bench = Bench::new();
    let config = fs::read_to_string(&kernel.config).unwrap();
    let refuses = |config: &str, diff: &str, words: &[&str]| {
        let (config, diff) = (bench.write("config", config), bench.write("a.patch", diff));
        bench.refuses(&bench.compile(&kernel, &config, &diff), words);
    };
    let head = "--- a/fs/proc/version.c\n+++ b/fs/proc/version.c\n";
    let elsewhere = format!("{head}@@ -3,1 +3,2 @@\n no such line\n+int x;\n");
    refuses(&config, &elsewhere, &["does not fit the source", "FAILED"]);
    let nothing = format!(
        "{head}@@ -1,2 +1,3 @@\n // SPDX-License-Identifier: GPL-2.0\n+\n #include <linux/fs.h>\n"
    );
    refuses(&config, &nothing, &["nothing changed"]);
    // In a large file whose functions tell their lines in warnings and in messages.
    let moved = "\
--- a/fs/ext4/super.c
+++ b/fs/ext4/super.c
@@ -18,4 +18,6 @@
  */
 
+/* Moved. */
+
 #include <linux/module.h>
 #include <linux/string.h>
";
    refuses(&config, moved, &["nothing changed"]);
    let wrong = nothing.replace("+\n", "+no C\n");
    refuses(
        &config,
        &wrong,
        &["does not compile", "fs/proc/version.c", "error:"],
    );
    let early = moved.replace("fs/ext4/super.c", "arch/x86/boot/main.c");
    refuses(
        &config,
        &early,
        &["arch/x86/boot/main.c", "before the kernel"],
    );
    let absent = moved.replace("fs/ext4/super.c", "drivers/net/hamradio/6pack.c");
    refuses(
        &config,
        &absent,
        &["nothing that this configuration builds", "6pack.c"],
    );
    let everywhere = moved.replace("fs/ext4/super.c", "include/linux/list.h");
    refuses(
        &config,
        &everywhere,
        &["include/linux/list.h", "more than 64"],
    );
    // None of them left the source otherwise.
    let fit = bench.compile(&kernel, &kernel.config, &patch("proc-version"));
    assert_eq!(fit.code, Some(0), "{}", fit.stdout);
}

#[test]
fn another_compiler_or_configuration_than_the_kernel_was_built_with() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let bench = Bench::new();
    let config = fs::read_to_string(&kernel.config).unwrap();
    let refuses = |config: &str, words: &[&str]| {
        let config = bench.write("config", config);
        let answer = bench.compile(&kernel, &config, &patch("proc-version"));
        bench.refuses(&answer, words);
    };
    let other = config.replace("gcc-12 (Debian", "gcc-12 (other");
    refuses(&other, &["gcc-12 (other", "here is"]);
    let older = config.replace("# Linux/x86 6.", "# Linux/x86 5.");
    refuses(&older, &["of Linux 5.", "the source of 6."]);
    let strange = config + "CONFIG_NO_SUCH_OPTION=y\n";
    refuses(&strange, &["CONFIG_NO_SUCH_OPTION is y and becomes absent"]);
}

/// An ELF that shows a kernel's banner where a vmlinux does.
fn vmlinux(bench: &Bench, banner: &str) -> PathBuf {
    let text = format!("const char linux_banner[] = \"{banner}\\n\";\n");
    let (source, made) = (bench.write("banner.c", &text), bench.at("vmlinux"));
    let mut gcc = Command::new("gcc");
    gcc.args(["-fno-zero-initialized-in-bss", "-c", "-o"]);
    assert!(gcc.arg(&made).arg(&source).status().unwrap().success());
    made
}

#[test]
fn another_kernel_than_the_compiled_one() {
    let Some(kernel) = Kernel::given() else {
        return;
    };
    let bench = Bench::new();
    let config = fs::read_to_string(&kernel.config).unwrap();
    let compiler = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT="));
    let compiler = compiler.unwrap().trim_matches('"');
    let head = config
        .lines()
        .find_map(|line| line.strip_prefix("# Linux/x86 "))
        .unwrap();
    let version = head.strip_suffix(" Kernel Configuration").unwrap();
    let build = |release: &str, compiler: &str| {
        let banner = format!("Linux version {release} (a@b) ({compiler}, GNU ld 2.40) #1 SMP");
        let words: [PathBuf; 8] = [
            "--vmlinux".into(),
            vmlinux(&bench, &banner),
            "--source".into(),
            kernel.source.clone(),
            "--config".into(),
            kernel.config.clone(),
            "--diff".into(),
            patch("proc-version"),
        ];
        bench.build(&words)
    };
    let another = build("9.9.9-other", "gcc 1.0");
    bench.refuses(&another, &["9.9.9-other", version, "gcc 1.0", compiler]);
    let same = build(&format!("{version}-cloud"), compiler);
    assert_eq!(same.code, Some(0), "{}", same.stdout);
}
