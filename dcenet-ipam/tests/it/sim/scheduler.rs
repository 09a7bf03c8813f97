//! Runs futures in virtual time, one poll at a time, in an order that follows from a seed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use dcenet_core::test_support::Rng;
use parking_lot::Mutex;

/// The world's clock and dice, shared by everything that is simulated.
#[derive(Debug, Clone)]
pub(super) struct Clock(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    now: u64,
    rng: Rng,
    /// When the task that runs now wants to run again.
    wake: Option<u64>,
}

/// Milliseconds since 1970 at which every world begins.
pub(super) const BEGIN: u64 = 1_800_000_000_000;

impl Clock {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner { now: BEGIN, rng: Rng::new(seed), wake: None })))
    }

    pub(super) fn now(&self) -> u64 {
        self.0.lock().now
    }

    pub(super) fn bits(&self) -> u64 {
        self.0.lock().rng.bits()
    }

    pub(super) fn below(&self, end: u64) -> u64 {
        self.bits() % end
    }

    /// True in `count` of 10,000 cases.
    pub(super) fn dice(&self, count: u64) -> bool {
        self.below(10_000) < count
    }

    /// Lets others run for some milliseconds.
    pub(super) async fn sleep(&self, milliseconds: u64) {
        Sleep { clock: self.clone(), until: self.now() + milliseconds, asked: false }.await;
    }
}

struct Sleep {
    clock: Clock,
    until: u64,
    asked: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.asked && self.clock.now() >= self.until {
            return Poll::Ready(());
        }
        self.asked = true;
        self.clock.0.lock().wake = Some(self.until);
        Poll::Pending
    }
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A task, its name for the owner, and when it runs again.
struct Waiting {
    task: Task,
    name: usize,
    at: u64,
    /// Decides between tasks of the same moment.
    order: u64,
}

/// What became of the task that ran.
pub(super) enum Turn {
    /// It waits or has ended.
    Ran,
    /// It was killed before it could go on.
    Killed(usize),
    /// There is none left.
    Idle,
}

/// All tasks of a world.
pub(super) struct Scheduler {
    clock: Clock,
    waiting: Vec<Waiting>,
}

impl Scheduler {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, waiting: Vec::new() }
    }

    pub(super) fn spawn(&mut self, name: usize, task: impl Future<Output = ()> + Send + 'static) {
        let (at, order) = (self.clock.now(), self.clock.bits());
        self.waiting.push(Waiting { task: Box::pin(task), name, at, order });
    }

    /// Advances the time to the next task and lets it run up to its next wait, or kills it in `kill` of 10,000 cases.
    pub(super) fn turn(&mut self, kill: u64) -> Turn {
        let next = self.waiting.iter().enumerate().min_by_key(|(_, w)| (w.at, w.order)).map(|(i, _)| i);
        let Some(next) = next else { return Turn::Idle };
        let mut waiting = self.waiting.swap_remove(next);
        {
            let mut inner = self.clock.0.lock();
            inner.now = inner.now.max(waiting.at);
            inner.wake = None;
        }
        if self.clock.dice(kill) {
            return Turn::Killed(waiting.name);
        }
        if waiting.task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            let at = self.clock.0.lock().wake.take().expect("a task waits for nothing but time");
            waiting.at = at;
            waiting.order = self.clock.bits();
            self.waiting.push(waiting);
        }
        Turn::Ran
    }
}
