//! Calls about one attachment, one after the other.
//!
//! A runtime that gave an ADD up calls DEL, which must not be done before the ADD: it would find nothing, and the ADD would
//! make what nobody deletes. So a call has its place from before its plugin can leave it to the daemon, and begins when
//! those before it have ended.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A container and its interface. Calls about the same in two networks wait for each other, which harms nobody.
pub(super) type Subject = (OsString, OsString);

/// The calls that wait or are under way.
#[derive(Debug, Default)]
pub(super) struct Queue {
    calls: Mutex<Calls>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    by_subject: BTreeMap<Subject, VecDeque<u64>>,
}

/// A place in the queue, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    subject: Subject,
    number: u64,
}

impl Queue {
    /// Takes the last place.
    pub(super) fn enter(self: &Arc<Self>, subject: Subject) -> Place {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let number = calls.next;
        calls.next += 1;
        calls.by_subject.entry(subject.clone()).or_default().push_back(number);
        drop(calls);
        Place { queue: Arc::clone(self), subject, number }
    }
}

impl Place {
    /// Waits until it is the first, or so long. Returns whether it is.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let calls = self.queue.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let is_behind = |calls: &mut Calls| {
            let first = calls.by_subject.get(&self.subject).and_then(VecDeque::front);
            first.is_some_and(|first| *first != self.number)
        };
        let waited = self.queue.left.wait_timeout_while(calls, limit, is_behind);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut calls = self.queue.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(numbers) = calls.by_subject.get_mut(&self.subject) {
            numbers.retain(|number| *number != self.number);
            if numbers.is_empty() {
                calls.by_subject.remove(&self.subject);
            }
        }
        drop(calls);
        self.queue.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_about_one_attachment_wait_in_order_and_others_do_not() {
        let queue = Arc::<Queue>::default();
        let subject = |name: &str| (OsString::from(name), OsString::from("eth0"));
        let first = queue.enter(subject("web"));
        let second = queue.enter(subject("web"));
        let third = queue.enter(subject("web"));
        let other = queue.enter(subject("db"));
        let moment = Duration::from_millis(1);
        assert!(first.wait(moment) && other.wait(moment));
        assert!(!second.wait(moment) && !third.wait(moment));
        // One that leaves before its turn lets nobody pass another.
        drop(second);
        assert!(!third.wait(moment));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| third.wait(Duration::from_secs(60)));
            drop(first);
            assert!(waits.join().unwrap());
        });
        drop((third, other));
        assert!(queue.calls.lock().unwrap().by_subject.is_empty());
    }
}
