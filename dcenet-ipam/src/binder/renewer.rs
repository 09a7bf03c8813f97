//! Renews what a source has bound outside, for as long as a process lives.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dcenet_core::provider::LeaseError;
use parking_lot::{Condvar, Mutex};

use super::ledger::{PREFIX, due_of};
use super::{BinderSource, Renewals, concurrent};
use crate::ipam::random_id;
use crate::store::{Batch, Change, Outcome, Store, StoreError, Watch};

/// Calls [`BinderSource::renew_due`] whenever something is due: one for each store and outside, in the process that lives
/// longest there, as the node's daemon.
///
/// [`Renewer::run`] is a future for the executor or thread of its owner, and does not block it for longer than the store
/// takes. It sleeps until the next record is due, by a thread that watches the store meanwhile, so that what other
/// processes lease is renewed too. It never ends by itself.
///
/// - A round that fails in part comes again after 1 s, then after twice as long each time up to 60 s; what is due
///   meanwhile is not kept waiting.
/// - Each lease is renewed later than its outside says by up to a twentieth of what is left of it then and at most 10 s,
///   so that what was bound together is not renewed together.
/// - A round takes 16 leases at most, those first whose time ends first, and tells of them before the next one begins.
/// - What has no time at which it is to be renewed is not looked at: where it may be released past the source, call
///   [`BinderSource::recover`] now and then.
/// - Where the store cannot be watched, its records are looked at every 30 s.
///
/// ```no_run
/// # use std::{sync::Arc, thread};
/// # use dcenet_ipam::binder::{BinderSource, Renewer};
/// # fn example(source: Arc<dyn BinderSource>) -> Result<(), Box<dyn std::error::Error>> {
/// let renewer = Renewer::new(source).reporting(|round| match round {
///     Ok(round) => for (attachment, until) in &round.doomed {
///         // Its addresses must not be used beyond that time.
///         println!("{attachment}: {until}");
///     },
///     Err(error) => println!("{error}"),
/// });
/// let stop = renewer.stopper();
/// let thread = thread::spawn(move || pollster::block_on(renewer.run()));
/// // ...
/// stop.stop();
/// thread.join().unwrap();
/// # Ok(())
/// # }
/// ```
pub struct Renewer {
    source: Arc<dyn BinderSource>,
    bell: Arc<Bell>,
    tell: Tell,
}

/// Is told each round's outcome.
type Tell = Box<dyn FnMut(&Result<Renewals, LeaseError>) + Send>;

impl std::fmt::Debug for Renewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renewer").finish_non_exhaustive()
    }
}

/// Ends a [`Renewer`], from any thread.
#[derive(Debug, Clone)]
pub struct RenewerStop(Arc<Bell>);

impl RenewerStop {
    /// Lets [`Renewer::run`] end after what it is doing. May be called before it runs, and again.
    pub fn stop(&self) {
        self.0.ring(|state| state.stopped = true);
    }
}

impl Renewer {
    /// For a source.
    pub fn new(source: Arc<dyn BinderSource>) -> Self {
        Self { source, bell: Arc::default(), tell: Box::new(log) }
    }

    /// Tells each round's outcome to `tell` instead of the log.
    #[must_use]
    pub fn reporting(self, tell: impl FnMut(&Result<Renewals, LeaseError>) + Send + 'static) -> Self {
        Self { tell: Box::new(tell), ..self }
    }

    /// What ends it.
    pub fn stopper(&self) -> RenewerStop {
        RenewerStop(self.bell.clone())
    }

    /// Renews until it is stopped. Dropping the future stops it too.
    ///
    /// # Errors
    /// Its thread cannot be made. All else is told and tried again.
    pub async fn run(self) -> Result<(), LeaseError> {
        let Self { source, bell, mut tell } = self;
        let failed = |error: std::io::Error| LeaseError::Store(Box::new(error));
        let (records, of_thread) = (source.records().clone(), bell.clone());
        thread::Builder::new()
            .name("dcenet-renewer".to_owned())
            .spawn(move || of_thread.keep_time(records))
            .map_err(failed)?;
        // The thread ends with this, also where the future is dropped.
        let _stop = StopOnDrop(bell.clone());
        let mut failures = 0;
        while !bell.state.lock().stopped {
            let round = source.renew_due().await;
            let (failed, next) = match &round {
                Ok(round) => (!round.failures.is_empty() || !round.doomed.is_empty(), round.next),
                Err(_) => (true, None),
            };
            tell(&round);
            let now = now();
            failures = match failed {
                false => 0,
                // The next round takes others.
                true if next.is_some_and(|at| at <= now) => failures.max(1),
                true => failures + 1,
            };
            let again = failed.then(|| now.saturating_add(back_off(failures)));
            let due = next.into_iter().chain(again).min();
            bell.ring(|state| {
                state.due = state.due.into_iter().chain(due).min();
                (state.earliest, state.armed) = (Some(Instant::now() + PACE), true);
            });
            bell.rings().await;
        }
        Ok(())
    }
}

struct StopOnDrop(Arc<Bell>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        RenewerStop(self.0.clone()).stop();
    }
}

fn log(round: &Result<Renewals, LeaseError>) {
    match round {
        Ok(round) => {
            for failure in &round.failures {
                tracing::warn!(%failure, "what is bound outside could not be renewed");
            }
            for (attachment, until) in &round.doomed {
                tracing::error!(%attachment, until, "an address is lost, or about to be");
            }
        }
        Err(error) => tracing::warn!(%error, "what is bound outside could not be listed"),
    }
}

/// Wakes the renewer when something is due.
#[derive(Debug, Default)]
struct Bell {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    /// The renewer waits for `due`; `None` is never, until the store changes.
    armed: bool,
    due: Option<u64>,
    /// Not before this, whatever an outside says.
    earliest: Option<Instant>,
    waker: Option<Waker>,
}

impl State {
    fn pause_left(&self) -> Duration {
        self.earliest.map_or(Duration::ZERO, |earliest| earliest.saturating_duration_since(Instant::now()))
    }
}

impl Bell {
    /// Changes the state, and tells both the thread and the renewer.
    fn ring(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until something is due, or the renewer is stopped.
    async fn rings(&self) {
        poll_fn(|context| {
            let mut state = self.state.lock();
            if state.stopped || !state.armed {
                return Poll::Ready(());
            }
            state.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The thread's: rings when the time has come.
    fn keep_time(&self, records: Arc<dyn Store>) {
        let mut watch = None;
        loop {
            let mut opened = false;
            if watch.is_none() {
                watch = concurrent::block_on(open(&*records)).ok();
                opened = watch.is_some();
            }
            let left = {
                let mut state = self.state.lock();
                if opened {
                    // What was written before it was opened is not told.
                    state.due = Some(0);
                }
                while !state.armed && !state.stopped {
                    self.changed.wait(&mut state);
                }
                if state.stopped {
                    return;
                }
                let due = state.due.map_or(Duration::MAX, |at| Duration::from_millis(at.saturating_sub(now())));
                due.max(state.pause_left())
            };
            let changed = match &mut watch {
                Some(watch) => match concurrent::block_on(watch.next(left.min(LINGER))) {
                    Ok(change) => change.and_then(|change| due_by(&change)),
                    Err(error) => {
                        tracing::debug!(%error, "changes of what is bound outside are not told");
                        self.pause(left.min(RETRY));
                        None
                    }
                },
                None => {
                    self.pause(left.min(UNWATCHED));
                    Some(0)
                }
            };
            let mut state = self.state.lock();
            state.due = state.due.into_iter().chain(changed).min();
            if state.due.is_some_and(|at| at <= now()) && state.pause_left().is_zero() {
                drop(state);
                self.ring(|state| (state.due, state.armed) = (None, false));
            }
        }
    }

    /// Waits for so long, or until the renewer is stopped.
    fn pause(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !state.stopped && !self.changed.wait_until(&mut state, deadline).timed_out() {}
    }
}

async fn open(records: &dyn Store) -> Result<Box<dyn Watch>, StoreError> {
    let barrier = Batch { request_id: random_id(), ..Batch::default() };
    match records.commit(&barrier).await? {
        Outcome::Committed { revision } => records.watch(PREFIX, revision).await,
        _ => Err(StoreError::Unavailable("the store does not tell its revision".to_owned())),
    }
}

/// When the first of the records that were written is due; at once where nobody knows.
fn due_by(change: &Change) -> Option<u64> {
    match change {
        Change::Gap { .. } => Some(0),
        Change::Writes { writes, .. } => writes.iter().filter_map(|(key, entry)| due_of(key, entry.as_ref()?)).min(),
    }
}

/// Milliseconds after so many failed rounds.
fn back_off(failures: u32) -> u64 {
    (RETRY.as_millis() as u64).saturating_mul(1 << (failures - 1).min(16)).min(RETRY_MOST)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A watch cannot be interrupted: so long may the thread outlive its renewer, or not notice that the clock was set.
const LINGER: Duration = Duration::from_secs(10);
/// Between two looks at a store that cannot be watched.
const UNWATCHED: Duration = Duration::from_secs(30);
/// After the first failed round, and after a watch that failed.
const RETRY: Duration = Duration::from_secs(1);
/// The most, in milliseconds.
const RETRY_MOST: u64 = 60_000;
/// The least between two rounds.
const PACE: Duration = Duration::from_millis(100);
