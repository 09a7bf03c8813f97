//! Several futures at a time, and one on a thread, without a runtime.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

/// Awaits all futures, `width` of them at a time, and answers in the order in which they end.
pub(super) async fn each<'a, R>(
    futures: impl IntoIterator<Item = Pin<Box<dyn Future<Output = R> + Send + 'a>>>,
    width: usize,
) -> Vec<R> {
    let mut waiting: Vec<_> = futures.into_iter().collect();
    waiting.reverse();
    let (mut running, mut done) = (Vec::with_capacity(width), Vec::with_capacity(waiting.len()));
    poll_fn(move |context| {
        loop {
            while running.len() < width
                && let Some(next) = waiting.pop()
            {
                running.push(next);
            }
            let before = running.len();
            running.retain_mut(|future: &mut Pin<Box<dyn Future<Output = R> + Send + 'a>>| {
                match future.as_mut().poll(context) {
                    Poll::Ready(result) => {
                        done.push(result);
                        false
                    }
                    Poll::Pending => true,
                }
            });
            if running.is_empty() && waiting.is_empty() {
                return Poll::Ready(std::mem::take(&mut done));
            }
            // Those that took the place of others have not been polled yet.
            if running.len() == before || waiting.is_empty() {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Runs a future on this thread.
pub(super) fn block_on<R>(future: impl Future<Output = R>) -> R {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => return result,
            Poll::Pending => thread::park(),
        }
    }
}
