//! Peers that die, lie or stall harm neither the machine nor each other.
// Helpers that fail are tests that fail.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::{Served, eventually, guest, kvm, recorder};
use vmpatch_introspect::address::Gpa;
use vmpatch_introspect::target::{Edit, PhysicalMemory, StopRequest, Target};
use vmpatch_vmm::client::{self, KvmTarget};
use vmpatch_vmm::vm::State;

/// inc word [0x9000]; jmp back
const LOOP: [u8; 6] = [0xff, 0x06, 0x00, 0x90, 0xeb, 0xfa];
const DATA: Gpa = Gpa(0x8000);
/// Tells the child which machine to stop.
const CHILD_VM: &str = "VMPATCH_TEST_CHILD_VM";

fn connect(served: &Served) -> UnixStream {
    let stream = UnixStream::connect(served.server.place().socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream
}

/// Sends a line and returns the answer, `None` where the server closes the connection instead.
fn ask(stream: &UnixStream, line: &[u8]) -> Option<serde_json::Value> {
    let mut to = stream;
    to.write_all(line).ok()?;
    to.write_all(b"\n").ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

#[test]
#[ignore = "the process that `a_killed_tool_leaves_a_running_guest` starts and kills"]
fn the_tool_that_is_killed() {
    let target = KvmTarget::connect(&std::env::var(CHILD_VM).unwrap()).unwrap();
    let lease = Duration::from_secs(30);
    let request = StopRequest {
        lease,
        ..StopRequest::default()
    };
    let mut stopped = target.stop(request).unwrap();
    let edit = Edit {
        at: DATA,
        old: vec![0; 4],
        new: b"half".to_vec(),
    };
    stopped.write(&[edit]).unwrap();
    println!("written");
    std::thread::sleep(lease);
}

/// Starts the tool and returns when it has written inside its stop.
fn start_tool(served: &Served) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "the_tool_that_is_killed",
        ])
        .env(CHILD_VM, served.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let written = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("written"));
    assert!(written, "the tool did not get as far as writing");
    child
}

#[test]
fn a_killed_tool_leaves_a_running_guest() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let mut tool = start_tool(&served);
    let mut found = [0; 4];
    served.machine.memory().read(DATA, &mut found).unwrap();
    assert_eq!(
        (&found, served.machine.state()),
        (b"half", State::Stopped(vmpatch_vmm::vm::Holder::Patch))
    );
    tool.kill().unwrap();
    tool.wait().unwrap();
    eventually(|| served.machine.state() == State::Running);
    served.machine.memory().read(DATA, &mut found).unwrap();
    assert_eq!(found, [0; 4]);
    eventually(|| KvmTarget::connect(&served.path()).is_ok());
}

#[test]
fn nonsense_gets_an_error_and_the_next_request_an_answer() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let stream = connect(&served);
    let cases: [(&[u8], i64); 11] = [
        (b"", -32700),
        (b"\xff\xfe\x00", -32700),
        (b"{", -32700),
        (b"[]", -32600),
        (b"7", -32600),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1}", -32600),
        (b"{\"jsonrpc\":\"1.0\",\"id\":1,\"method\":\"vm.status\"}", -32600),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.explode\"}", -32601),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"arena.write\",\"params\":[]}", -32602),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"arena.write\",\"params\":{\"at\":0,\"data\":\"\"}}", -32000),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.resume\"}", -32000),
    ];
    for (line, code) in cases {
        let answer = ask(&stream, line).unwrap();
        assert_eq!(
            answer["error"]["code"],
            code,
            "{}",
            String::from_utf8_lossy(line)
        );
    }
    let answer = ask(
        &stream,
        br#"{"jsonrpc":"2.0","id":"x","method":"vm.status"}"#,
    )
    .unwrap();
    assert_eq!(
        (answer["id"].as_str(), answer["result"]["state"].as_str()),
        (Some("x"), Some("running"))
    );
}

#[test]
fn writes_outside_the_arena_are_refused_whatever_they_claim() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let stream = connect(&served);
    let open = br#"{"jsonrpc":"2.0","id":1,"method":"session.open"}"#;
    assert!(ask(&stream, open).unwrap()["result"].is_object());
    let arena = served.machine.memory().layout().arena();
    for at in [
        0,
        arena.start.0 - 1,
        arena.end.0 - 2,
        arena.end.0,
        u64::MAX - 1,
    ] {
        let line = format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"arena.write","params":{{"at":{at},"data":"AAAA"}}}}"#
        );
        let answer = ask(&stream, line.as_bytes()).unwrap();
        assert_eq!(answer["error"]["code"], -32602, "{at:#x}");
    }
}

#[test]
fn random_bytes_and_endless_lines_end_their_own_connection_only() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..200 {
        let mut stream = connect(&served);
        let len = if round % 50 == 0 {
            (1 << 20) + 9
        } else {
            round * 7
        };
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        };
        let endless = len > 1 << 20;
        let bytes: Vec<u8> = (0..len)
            .map(|_| next())
            .filter(|&byte| !endless || byte != b'\n')
            .collect();
        // Fails where the server has closed the connection already.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answers = Vec::new();
        let end = stream.read_to_end(&mut answers);
        let closed =
            end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
        assert!(
            closed,
            "round {round}: the server keeps a finished connection"
        );
    }
    assert_eq!(
        client::status(&served.path()).unwrap().state,
        State::Running
    );
}

#[test]
fn clients_that_stall_harm_nobody() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let silent: Vec<_> = (0..10).map(|_| connect(&served)).collect();
    // Asks and asks and never reads an answer.
    let mut deaf = connect(&served);
    deaf.set_nonblocking(true).unwrap();
    let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.status\"}\n".repeat(1000);
    let _ = deaf.write(&line);
    for _ in 0..20 {
        assert!(client::status(&served.path()).is_ok());
    }
    let target = served.target();
    let _ = target
        .stop(StopRequest::default())
        .unwrap()
        .resume()
        .unwrap();
    drop(silent);
}

#[test]
fn too_many_clients_are_turned_away_and_room_comes_back() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let many: Vec<_> = (0..32).map(|_| connect(&served)).collect();
    for stream in &many {
        assert!(ask(stream, br#"{"jsonrpc":"2.0","id":1,"method":"vm.status"}"#).is_some());
    }
    assert!(client::status(&served.path()).is_err());
    drop(many);
    eventually(|| client::status(&served.path()).is_ok());
}

#[test]
#[ignore = "the process of another user that `another_user_is_turned_away` starts"]
fn the_other_user() {
    let stream = UnixStream::connect(std::env::var(CHILD_VM).unwrap()).unwrap();
    let answer = ask(&stream, br#"{"jsonrpc":"2.0","id":1,"method":"vm.status"}"#);
    println!("answered: {}", answer.is_some());
}

#[test]
fn another_user_is_turned_away() {
    let Some(kvm) = kvm() else { return };
    let served = Served::new(guest(&kvm, &LOOP, 1, recorder()));
    let (path, socket) = (served.server.place().path(), served.server.place().socket());
    // Opens every door but the check of who knocks.
    for (path, mode) in [(served.base.path(), 0o755), (path, 0o755), (&socket, 0o777)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "the_other_user"])
        .env(CHILD_VM, &socket)
        .uid(65534)
        .output();
    let output = match child {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout).unwrap(),
        failed => {
            eprintln!("SKIPPED: cannot run a process as another user: {failed:?}");
            return;
        }
    };
    assert!(output.contains("answered: false"), "{output}");
    assert!(client::status(&served.path()).is_ok());
}
