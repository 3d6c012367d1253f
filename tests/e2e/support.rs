//! What the tests share: the guest under test, booted; patches for it.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use tempfile::TempDir;
use vmpatch_testkit::{Answer, Boot, Guest, Image, Side, Tool, extra, objects, patch_file};

/// Changes the first line of /proc/version.
pub(crate) const VERSION: &str = "proc-version";
/// What the guest's loop shows then.
pub(crate) const CHANGED: &str = "patched while it runs";
/// Changes a function that a planted kthread never leaves.
pub(crate) const PARKED: &str = "msleep-interruptible";

/// Name of the guest under test.
pub(crate) fn guest_name() -> String {
    std::env::var("VMPATCH_GUEST").expect("VMPATCH_GUEST is set by cargo xtask test")
}

/// The tool under test.
pub(crate) fn tool() -> Tool {
    Tool::from_env().unwrap()
}

/// Calls the tool on a guest; anything but this exit code fails the test with all that was said.
#[track_caller]
pub(crate) fn expect(guest: &Guest, code: i32, words: &[&str]) -> Answer {
    guest.call(words).unwrap().expect_code(code).unwrap()
}

/// The same for a call that is not on a guest of the tests.
#[track_caller]
pub(crate) fn expect_alone(code: i32, words: &[&str]) -> Answer {
    tool().call(words).unwrap().expect_code(code).unwrap()
}

/// A patch that was built from its diff, for the guest under test.
pub(crate) fn built(name: &str) -> String {
    let file = extra(&guest_name(), &format!("{name}.vmpatch")).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Boots a guest of its own for a test that ends it.
pub(crate) fn boot(id: &str) -> Guest {
    start(Boot::new(id).cmdline("vmpatch.loop=/proc/version"))
}

/// One that prints nothing unless it is asked. While a kernel prints an oops, it takes no care of others that use the console.
pub(crate) fn boot_silent(id: &str) -> Guest {
    start(Boot::new(id))
}

fn start(mut boot: Boot) -> Guest {
    let image = Image::named(&guest_name()).unwrap();
    // Those that need what is in it fail without.
    boot.initrd = extra(&guest_name(), "initrd").ok();
    boot.start(&tool(), &image).unwrap()
}

/// The guest that the tests share, one test at a time; it prints /proc/version all the while. Each test leaves it as it found it.
/// One that a failed test may have left otherwise is given up and another booted.
pub(crate) fn shared() -> MutexGuard<'static, Option<Guest>> {
    static SHARED: Mutex<Option<Guest>> = Mutex::new(None);
    let mut held = SHARED.lock().unwrap_or_else(|poisoned| {
        SHARED.clear_poison();
        let mut held = poisoned.into_inner();
        *held = None;
        held
    });
    if held.is_none() {
        *held = Some(boot("shared"));
    }
    held
}

/// A patch file, with the folder that holds it.
pub(crate) struct Patch {
    /// Keeps the file.
    pub(crate) dir: TempDir,
    /// The file.
    pub(crate) file: PathBuf,
}

impl Patch {
    /// Its path.
    pub(crate) fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }
}

/// Builds a patch for the guest under test.
pub(crate) fn patch(name: &str, side: Side) -> Patch {
    patch_for(&guest_name(), name, side)
}

/// Builds a patch for some guest.
pub(crate) fn patch_for(guest: &str, name: &str, side: Side) -> Patch {
    let dir = tempfile::tempdir().unwrap();
    let file = patch_file(
        &tool(),
        &objects(guest, name).unwrap(),
        name,
        side,
        dir.path(),
    )
    .unwrap();
    Patch { dir, file }
}

/// The first line of /proc/version, asked of the guest itself.
pub(crate) fn version(guest: &mut Guest) -> String {
    guest.ask("cat /proc/version").unwrap().concat()
}

/// The guest shows the changed behaviour, or does not.
pub(crate) fn assert_changed(guest: &mut Guest, changed: bool) {
    let version = version(guest);
    assert_eq!(version.contains(CHANGED), changed, "{version}");
}

/// The guest's kernel reports nothing that it did not report at boot.
pub(crate) fn assert_no_trouble(guest: &Guest) {
    assert_eq!(guest.troubles(), Vec::<String>::new());
}
