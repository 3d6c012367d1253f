//! The messages of the control socket: newline-delimited JSON-RPC 2.0, one request a line. Owns their
//! shapes; both sides use them. File descriptors of an answer travel beside its line.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmpatch_introspect::address::{Gpa, GpaRange};

use crate::vm::State;

/// Raised with every change that an older peer would get wrong.
pub const PROTOCOL: u32 = 3;
/// The longest line, in bytes, newline included.
pub const MAX_LINE: usize = 1 << 20;
/// The most bytes of one arena write: hexadecimal or base64, it fits a line.
pub const MAX_ARENA_WRITE: usize = 256 << 10;

/// What can be asked for.
pub mod method {
    /// State, sizes and counters. Answers [`Status`](super::Status).
    pub const STATUS: &str = "vm.status";
    /// The owner's pause. Answers null.
    pub const PAUSE: &str = "vm.pause";
    /// Its end. Answers null.
    pub const RESUME: &str = "vm.resume";
    /// Ends the machine as pulling the plug does. Answers null.
    pub const STOP: &str = "vm.stop";
    /// Opens the one session of the machine; it ends with its connection. Answers
    /// [`Opened`](super::Opened).
    pub const OPEN: &str = "session.open";
    /// Writes to the arena while the guest runs; needs the session. Takes
    /// [`ArenaWrite`](super::ArenaWrite), answers null.
    pub const ARENA_WRITE: &str = "arena.write";
}

/// One request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Always "2.0".
    pub jsonrpc: String,
    /// Comes back with the answer. Without one there is no answer, and nothing is done.
    #[serde(default)]
    pub id: Value,
    /// One of [`method`].
    pub method: String,
    /// By method; null where it takes none.
    #[serde(default)]
    pub params: Value,
}

/// One answer: exactly one of `result` and `error`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Response {
    /// Always "2.0".
    pub jsonrpc: String,
    /// The request's.
    #[serde(default)]
    pub id: Value,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "some_null")]
    pub result: Option<Value>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// Keeps `"result": null` apart from no result: pausing has nothing to tell.
mod some_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::Value;

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Value>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Value>, D::Error> {
        Value::deserialize(from).map(Some)
    }
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// One of [`code`].
    pub code: i64,
    /// For people.
    pub message: String,
}

/// Kinds of failure: JSON-RPC 2.0's own, and one of ours.
pub mod code {
    /// The line is not JSON.
    pub const PARSE: i64 = -32700;
    /// The JSON is not a request.
    pub const REQUEST: i64 = -32600;
    /// No such method.
    pub const METHOD: i64 = -32601;
    /// The parameters do not fit the method.
    pub const PARAMS: i64 = -32602;
    /// The machine is not in the state for it; the message says why.
    pub const REFUSED: i64 = -32000;
}

impl Failure {
    pub(crate) fn new(code: i64, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(code::REFUSED, message)
    }
}

/// What a machine tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`PROTOCOL`] of the VMM.
    pub protocol: u32,
    /// What does not change.
    #[serde(flatten)]
    pub description: Description,
    /// Who holds it.
    pub state: State,
    /// How it ended, if it has.
    pub outcome: Option<String>,
    /// Whether a session is open.
    pub session: bool,
    /// How long it has run, in milliseconds.
    pub uptime_ms: u64,
}

/// What does not change while a machine lives. Also what `vm.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// What the user calls it.
    pub id: String,
    /// Process of the VMM.
    pub pid: u32,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// The kernel it was booted with, as the user named it.
    pub kernel: Option<String>,
}

/// Guest memory as a session maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRange {
    /// Where the guest sees it.
    pub range: GpaRange,
    /// Which of the descriptors beside the answer, counted from 0.
    pub fd: usize,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
}

/// What a session gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// [`PROTOCOL`] of the VMM.
    pub protocol: u32,
    /// The machine.
    pub description: Description,
    /// Guest RAM, read-only.
    pub ram: Vec<MappedRange>,
    /// The arena slot, read-only: writing goes through the VMM, whose record of dirty pages has it then.
    pub arena: MappedRange,
    /// The descriptor of the shared page.
    pub hot_fd: usize,
}

/// A write to the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaWrite {
    /// Where the guest sees it.
    pub at: Gpa,
    /// The bytes, in base64 with padding.
    pub data: String,
}
