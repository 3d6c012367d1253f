//! The gate every vCPU thread passes before it enters the guest: one word that says what is wished of
//! all of them, and one word a vCPU that says which wish it has answered. Owns the two-phase kick; does
//! not own who may ask for a stop ([`super::state`]) nor what a vCPU does when it stands ([`super::vcpu`]).
//!
//! ```text
//!            close()               every vCPU has answered
//!    Run ────────────▶ Stop ────────────────────────────────▶ all stand
//!     ▲                 │ one is late                             │
//!     ├─────────────────┘ (the others are let go)                 │
//!     └──────────────────────── open() ───────────────────────────┘
//!    any ── end() ──▶ End, for good
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmpatch_introspect::call::{CallError, Called};
use vmpatch_introspect::target::Detail;
use vmpatch_introspect::vcpu::Vcpu;

use super::call::Order;
use super::futex::{self, Sharing};
use super::kick::Kicker;

/// How long a kick may go unanswered before it is repeated.
const KICK_AGAIN: Duration = Duration::from_millis(5);

/// How long letting go may take before it is no longer waited for.
const LET_GO: Duration = Duration::from_millis(100);

/// What is wished of every vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Run the guest.
    Run,
    /// Leave guest mode, store the registers, stand.
    Stop(Detail),
    /// Leave for good.
    End,
}

/// A wish: its kind, and a number that no other wish of late has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish(u32);

impl Wish {
    const END: Self = Self(2);

    const fn after(self, kind: Kind) -> Self {
        // The number starts at 1, so that a wish is never the 0 that stands for "none answered".
        let number = (self.0 >> 2).wrapping_add(1) & 0x3fff_ffff;
        let number = if number == 0 { 1 } else { number };
        match kind {
            Kind::Run => Self(number << 2),
            Kind::Stop(Detail::All) => Self(number << 2 | 1),
            Kind::Stop(Detail::Stacks) => Self(number << 2 | 3),
            Kind::End => Self::END,
        }
    }

    pub(super) const fn kind(self) -> Kind {
        match self.0 & 3 {
            0 => Kind::Run,
            1 => Kind::Stop(Detail::All),
            3 => Kind::Stop(Detail::Stacks),
            _ => Kind::End,
        }
    }
}

/// One vCPU's side of the gate.
#[derive(Debug, Default)]
pub(super) struct Post {
    /// How to get it out of guest mode.
    pub(super) kicker: Kicker,
    /// The stop it stands for, or 0 while it does not stand.
    stands_for: AtomicU32,
    /// Registers as it stored them when it came to stand.
    registers: Mutex<Option<Vcpu>>,
    /// A call that it is to make while it stands, and what came of it.
    order: Mutex<Option<Order>>,
    called: Mutex<Option<Result<Called, CallError>>>,
    /// Counts orders: what it sleeps on besides the wish.
    orders: AtomicU32,
    /// When it was out of guest mode for the last stop, in nanoseconds after the gate was made.
    left_guest: AtomicU64,
    /// When it was about to enter the guest again, in nanoseconds after the gate was made.
    released: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Gate {
    wish: AtomicU32,
    /// Counts answers: what the asker sleeps on.
    bell: AtomicU32,
    posts: Vec<Post>,
    made: Instant,
}

/// What a close cost.
#[derive(Clone, Debug)]
pub(super) struct Closed {
    /// Registers of every vCPU, by index.
    pub(super) registers: Vec<Vcpu>,
    /// From the first kick to the last vCPU out of guest mode.
    pub(super) kick: Duration,
    /// From then until the registers of all were stored.
    pub(super) reading: Duration,
}

/// Why not all stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseError {
    /// This one was late; all run.
    Late(u32),
    /// The machine has ended.
    Ended,
}

impl Gate {
    pub(super) fn new(vcpus: usize) -> Self {
        Self {
            wish: AtomicU32::new(Wish(1 << 2).0),
            bell: AtomicU32::new(0),
            posts: (0..vcpus).map(|_| Post::default()).collect(),
            made: Instant::now(),
        }
    }

    pub(super) fn posts(&self) -> &[Post] {
        &self.posts
    }

    /// What is wished now.
    pub(super) fn wish(&self) -> Wish {
        Wish(self.wish.load(Ordering::SeqCst))
    }

    /// Closes the gate and waits until every vCPU stands, kicking again those that do not answer. If
    /// one is late the gate is opened again. Only one asker may close at a time.
    pub(super) fn close(&self, deadline: Duration, detail: Detail) -> Result<Closed, CloseError> {
        let begin = Instant::now();
        let wish = self.change(Kind::Stop(detail)).ok_or(CloseError::Ended)?;
        let end = begin + deadline;
        loop {
            let bell = self.bell.load(Ordering::SeqCst);
            let Some(late) = self.first_not_standing(wish) else {
                break;
            };
            if self.wish() != wish {
                return Err(CloseError::Ended);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.open();
                return Err(CloseError::Late(late));
            }
            self.kick_those_not_standing(wish);
            self.listen(wish, bell, left.min(KICK_AGAIN));
        }
        let all_stand = Instant::now();
        let registers: Option<Vec<_>> = self.posts.iter().map(Post::stored).collect();
        let all_out = self.latest(|post| &post.left_guest).max(begin);
        Ok(Closed {
            registers: registers.ok_or(CloseError::Ended)?,
            kick: all_out - begin,
            reading: all_stand.saturating_duration_since(all_out),
        })
    }

    /// Opens the gate and waits until every vCPU has gone, and returns when the last went. Waits for a
    /// while only: on a host that is overloaded one may go later, and what is returned is then too early.
    pub(super) fn open(&self) -> Instant {
        if self.change(Kind::Run).is_none() {
            return Instant::now();
        }
        let end = Instant::now() + LET_GO;
        loop {
            let bell = self.bell.load(Ordering::SeqCst);
            if self.posts.iter().all(|post| !post.stands()) {
                return self.latest(|post| &post.released);
            }
            let now = Instant::now();
            if now >= end {
                return now;
            }
            futex::look(&self.bell, bell, end - now);
            futex::wait(&self.bell, bell, Some(end - now), Sharing::Private);
        }
    }

    /// Sends every vCPU thread home, for good. Can be called by anyone, a vCPU thread included.
    pub(super) fn end(&self) {
        self.wish.store(Wish::END.0, Ordering::SeqCst);
        futex::wake_all(&self.wish, Sharing::Private);
        for post in &self.posts {
            post.kicker.kick();
        }
        self.ring();
    }

    /// The vCPU is out of guest mode for a stop; its registers are not read yet.
    pub(super) fn left_guest(&self, post: &Post) {
        post.left_guest.store(self.nanoseconds(), Ordering::SeqCst);
    }

    /// The vCPU stands for `wish` with these registers.
    pub(super) fn stand(&self, post: &Post, wish: Wish, registers: Vcpu) {
        // What nobody waits for any more.
        *lock(&post.order) = None;
        *post.registers() = Some(registers);
        post.stands_for.store(wish.0, Ordering::SeqCst);
        self.ring();
    }

    /// Waits until the vCPU is to make a call; `None` once the wish has changed.
    pub(super) fn order(&self, post: &Post, wish: Wish) -> Option<Order> {
        let mut seen = post.orders.load(Ordering::SeqCst);
        if lock(&post.order).is_none() {
            futex::look(&self.wish, wish.0, Duration::MAX);
        }
        while self.wish() == wish {
            if let Some(order) = lock(&post.order).take() {
                return Some(order);
            }
            let words = [(&self.wish, wish.0), (&post.orders, seen)];
            futex::wait_either(
                words.map(|(word, seen)| (word, seen, Sharing::Private)),
                None,
            );
            seen = post.orders.load(Ordering::SeqCst);
        }
        None
    }

    /// The vCPU has made a call.
    pub(super) fn called(&self, post: &Post, called: Result<Called, CallError>) {
        *lock(&post.called) = Some(called);
        self.ring();
    }

    /// Lets a vCPU that stands make a call, and waits for what comes of it; kicks it when its time is over.
    pub(super) fn call(&self, order: Order) -> Result<Called, CallError> {
        let ended = || CallError::Unreachable("it has ended".to_owned());
        let index = usize::try_from(order.call.vcpu).ok();
        let post = index.and_then(|index| self.posts.get(index));
        let post = post.filter(|post| post.stands()).ok_or_else(ended)?;
        let wish = self.wish();
        *lock(&post.called) = None;
        *lock(&post.order) = Some(order);
        post.orders.fetch_add(1, Ordering::SeqCst);
        futex::wake_all(&post.orders, Sharing::Private);
        loop {
            let bell = self.bell.load(Ordering::SeqCst);
            if let Some(called) = lock(&post.called).take() {
                return called;
            }
            if self.wish() != wish {
                return Err(ended());
            }
            let left = order.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                post.kicker.kick();
            }
            let left = if left.is_zero() { KICK_AGAIN } else { left };
            futex::wait(&self.bell, bell, Some(left), Sharing::Private);
        }
    }

    /// The vCPU no longer stands.
    pub(super) fn go(&self, post: &Post) {
        post.released.store(self.nanoseconds(), Ordering::SeqCst);
        post.stands_for.store(0, Ordering::SeqCst);
        self.ring();
    }

    fn nanoseconds(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn latest(&self, of: impl Fn(&Post) -> &AtomicU64) -> Instant {
        let nanoseconds = self
            .posts
            .iter()
            .map(|post| of(post).load(Ordering::SeqCst));
        self.made + Duration::from_nanos(nanoseconds.max().unwrap_or(0))
    }

    /// Moves on to a new wish of this kind and tells everybody; `None` once the machine has ended.
    fn change(&self, kind: Kind) -> Option<Wish> {
        let next = |now| match Wish(now).kind() {
            Kind::End => None,
            Kind::Run | Kind::Stop(_) => Some(Wish(now).after(kind).0),
        };
        let before = self
            .wish
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, next)
            .ok()?;
        futex::wake_all(&self.wish, Sharing::Private);
        Some(Wish(before).after(kind))
    }

    fn first_not_standing(&self, wish: Wish) -> Option<u32> {
        let late = self.posts.iter().position(|post| !post.stands_at(wish))?;
        u32::try_from(late).ok()
    }

    fn kick_those_not_standing(&self, wish: Wish) {
        for post in self.posts.iter().filter(|post| !post.stands_at(wish)) {
            post.kicker.kick();
        }
    }

    /// Sleeps until all stand, the machine ends or the time is up.
    fn listen(&self, wish: Wish, mut bell: u32, at_most: Duration) {
        let end = Instant::now() + at_most;
        while self.first_not_standing(wish).is_some() && self.wish() == wish {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            futex::look(&self.bell, bell, left);
            futex::wait(&self.bell, bell, Some(left), Sharing::Private);
            bell = self.bell.load(Ordering::SeqCst);
        }
    }

    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        futex::wake_all(&self.bell, Sharing::Private);
    }
}

impl Post {
    fn stands(&self) -> bool {
        self.stands_for.load(Ordering::SeqCst) != 0
    }

    fn stands_at(&self, wish: Wish) -> bool {
        self.stands_for.load(Ordering::SeqCst) == wish.0
    }

    fn stored(&self) -> Option<Vcpu> {
        *self.registers()
    }

    fn registers(&self) -> MutexGuard<'_, Option<Vcpu>> {
        lock(&self.registers)
    }
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
