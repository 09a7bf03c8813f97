//! Threads that the daemon cannot do without: when one ends, the main thread is woken to end the process, so that the
//! service manager starts a whole one. Where a panic aborts, as in release builds, that is so without it.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

/// Starts threads, and knows of the first that ended. Clones know of the same ones.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    first: OnceLock<&'static str>,
    waker: UnixStream,
}

impl Threads {
    /// A byte is written to `waker` when a thread ends.
    pub fn new(waker: UnixStream) -> Self {
        Self(Arc::new(Ends { first: OnceLock::new(), waker }))
    }

    /// Starts a thread. Names of more than 15 bytes are cut (`TASK_COMM_LEN`, include/linux/sched.h).
    ///
    /// # Errors
    /// Where the system has no room for it.
    pub fn spawn(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        let end = End { name, ends: Arc::clone(&self.0) };
        let work = move || {
            let _end = end;
            work();
        };
        Builder::new().name(name.to_owned()).spawn(work)
    }

    /// The first thread that ended, by whatever cause.
    pub fn ended(&self) -> Option<&'static str> {
        self.0.first.get().copied()
    }
}

/// Tells of its thread's end when it is dropped, as it also is by a panic.
struct End {
    name: &'static str,
    ends: Arc<Ends>,
}

impl Drop for End {
    fn drop(&mut self) {
        // An earlier one counts; whoever is to be woken may have gone, and then needs not be.
        let _ = self.ends.first.set(self.name);
        let _ = (&self.ends.waker).write(&[0]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_thread_that_ends_or_panics_is_told_of_and_one_that_lives_is_not() {
        for panics in [false, true] {
            let (mut wake, waker) = UnixStream::pair().unwrap();
            let threads = Threads::new(waker);
            let (ends, until) = mpsc::channel::<()>();
            let living = threads.spawn("living", move || until.recv().unwrap_err().to_string().truncate(0)).unwrap();
            wake.set_nonblocking(true).unwrap();
            assert_eq!(wake.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(threads.ended(), None);

            wake.set_nonblocking(false).unwrap();
            wake.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let short = threads.spawn("short", move || assert!(!panics, "as wanted")).unwrap();
            assert_eq!(wake.read(&mut [0]).unwrap(), 1);
            assert_eq!(threads.ended(), Some("short"));
            assert_eq!(short.join().is_err(), panics);
            drop(ends);
            living.join().unwrap();
            assert_eq!(threads.ended(), Some("short"), "the first is the cause");
        }
    }
}
