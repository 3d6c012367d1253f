//! Output on its way from COM1 to the host: vCPUs fill a queue without ever waiting, a thread empties it.
//! Owns the queue and the thread; what file it writes to is [`super::console`]'s.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes of output kept for a slow reader; what comes on top is lost, as on a serial line.
pub(super) const QUEUE_LIMIT: usize = 1 << 20;
/// How long output is gathered before it is written: a UART sends single bytes, and to write each by itself would wake two threads
/// for it. Nobody at a terminal notices.
const GATHER: Duration = Duration::from_millis(4);

/// Output on its way: filled by vCPUs without waiting, emptied by the writer thread.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    bytes: VecDeque<u8>,
    closed: bool,
    /// The writer has written all there was, after the close.
    finished: bool,
}

impl Queue {
    /// A queue that is written to `output` by a thread of its own.
    pub(super) fn start(output: File) -> io::Result<Arc<Self>> {
        let queue = Arc::new(Self::default());
        let drain = Arc::clone(&queue);
        thread::Builder::new()
            .name("console-out".into())
            .spawn(move || drain.write_to(output))?;
        Ok(queue)
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let room = QUEUE_LIMIT
            .saturating_sub(state.bytes.len())
            .min(bytes.len());
        let idle = state.bytes.is_empty();
        state.bytes.extend(bytes.iter().take(room));
        if idle {
            self.changed.notify_all();
        }
    }

    /// The next bytes to write, when there are any; `None` after the close.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        while state.bytes.is_empty() && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, GATHER, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = state.bytes.drain(..).collect();
        (!bytes.is_empty()).then_some(bytes)
    }

    fn write_to(&self, mut output: File) {
        while let Some(bytes) = self.next() {
            if let Err(error) = output.write_all(&bytes) {
                tracing::warn!(%error, "the console's output is lost from here on");
                break;
            }
        }
        self.lock().finished = true;
        self.changed.notify_all();
    }

    /// Takes no more, and waits until all is written or `limit` has passed.
    pub(super) fn close(&self, limit: Duration) {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        drop(
            self.changed
                .wait_timeout_while(state, limit, |state| !state.finished),
        );
    }
}

/// The end that COM1 writes to.
pub(super) struct QueueWriter(pub(super) Arc<Queue>);

impl Write for QueueWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
