//! Work that blocks beside an executor, without a runtime.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::thread;

use parking_lot::Mutex;

enum Slot<R> {
    Waits(Option<Waker>),
    Done(thread::Result<R>),
}

/// Runs what blocks on a thread of its own. A future that is dropped leaves it to end by itself.
///
/// # Errors
/// No thread can be made.
pub(super) async fn off_thread<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> io::Result<R> {
    let slot = Arc::new(Mutex::new(Slot::Waits(None)));
    let answer = slot.clone();
    thread::Builder::new().name("dcenet-outside".to_owned()).spawn(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let before = std::mem::replace(&mut *answer.lock(), Slot::Done(result));
        if let Slot::Waits(Some(waker)) = before {
            waker.wake();
        }
    })?;
    let result = poll_fn(|context| {
        let mut slot = slot.lock();
        match std::mem::replace(&mut *slot, Slot::Waits(Some(context.waker().clone()))) {
            Slot::Done(result) => Poll::Ready(result),
            Slot::Waits(_) => Poll::Pending,
        }
    })
    .await;
    // A panic goes on where it would have without the thread.
    result.or_else(|panic| std::panic::resume_unwind(panic))
}
