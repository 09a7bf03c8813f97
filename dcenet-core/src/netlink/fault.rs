//! The one gate through which every netlink request, every journal write and every call of a store on disk passes.
//!
//! With the feature `fault-injection` a test makes the n-th call fail, or the process die there; without it the gate is
//! nothing.

use std::io;

use crate::netns::NetNsError;

/// What the caller of [`gate`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// The call itself.
    Pass,
    /// Not the call, but report it as failed with this errno.
    #[cfg_attr(not(feature = "fault-injection"), expect(dead_code, reason = "no fault without the feature"))]
    Fail(i32),
    /// The call, and report its outcome as unknown.
    Lose,
    /// The call, and end the process when it is done.
    DieAfter,
}

/// Makes a change that is no netlink message through the gate.
pub(crate) fn gated(
    what: &str,
    call: impl FnOnce() -> Result<io::Result<()>, NetNsError>,
) -> Result<io::Result<()>, NetNsError> {
    match gate(what) {
        Gate::Pass => call(),
        Gate::Fail(errno) => Ok(Err(io::Error::from_raw_os_error(errno))),
        Gate::Lose => Ok(call()?.and_then(|()| Err(io::Error::other("injected: outcome unknown")))),
        Gate::DieAfter => {
            // Whatever came of it: the process ends before it could tell.
            drop(call());
            std::process::abort()
        }
    }
}

#[cfg(not(feature = "fault-injection"))]
pub(crate) fn gate(_operation: &str) -> Gate {
    Gate::Pass
}

#[cfg(feature = "fault-injection")]
pub(crate) use armed::gate;
#[cfg(feature = "fault-injection")]
pub use armed::{Fault, Injection, through_gate, with_fault};

#[cfg(feature = "fault-injection")]
mod armed {
    use std::cell::RefCell;
    use std::io::{self, Write};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::Gate;

    /// How the chosen call fails.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Fault {
        /// It is not made, and reported as refused with ENOBUFS.
        Fail,
        /// It is made, and its reply is lost.
        Lose,
        /// The process aborts before it.
        Abort,
        /// The process aborts after it took effect. For a message in a batch: after the whole batch.
        AbortAfter,
        /// The process stops before it, as by SIGSTOP, and makes it when somebody has it continue.
        Stop,
    }

    /// Which call fails, and how. Calls count from 1: netlink requests, journal writes and what other crates pass
    /// through [`through_gate`], in order.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Injection {
        /// The call; 0 for none, to count calls only.
        pub call: u64,
        /// What happens to it.
        pub fault: Fault,
    }

    impl Injection {
        /// Reads `fail:7`, `lose:7`, `abort:7`, `abort-after:7` or `stop:7`, the form of the environment variable
        /// `DCENET_FAULT`, which applies to the whole process. `DCENET_FAULT_LOG` may name a file to which the call
        /// that met the fault is appended, as a line of its number and name: without one, it was never reached.
        pub fn parse(text: &str) -> Option<Self> {
            let (fault, call) = text.split_once(':')?;
            let fault = match fault {
                "fail" => Fault::Fail,
                "lose" => Fault::Lose,
                "abort" => Fault::Abort,
                "abort-after" => Fault::AbortAfter,
                "stop" => Fault::Stop,
                _ => return None,
            };
            Some(Self { call: call.parse().ok()?, fault })
        }

        fn meet(self, count: u64, operation: &str) -> Gate {
            if self.call != count {
                return Gate::Pass;
            }
            tracing::debug!(call = count, fault = ?self.fault, operation, "injected fault");
            match self.fault {
                Fault::Fail => Gate::Fail(libc::ENOBUFS),
                Fault::Lose => Gate::Lose,
                Fault::Abort => std::process::abort(),
                Fault::AbortAfter => Gate::DieAfter,
                Fault::Stop => {
                    crate::sys::stop_process().unwrap_or_else(|e| panic!("cannot stop: {e}"));
                    Gate::Pass
                }
            }
        }
    }

    thread_local! {
        static ARMED: RefCell<Option<(Injection, u64)>> = const { RefCell::new(None) };
    }

    /// Runs `f` with the fault armed on this thread, and returns its value and the number of calls it made.
    ///
    /// # Panics
    /// If called inside itself.
    pub fn with_fault<R>(injection: Injection, f: impl FnOnce() -> R) -> (R, u64) {
        struct Disarm;
        impl Drop for Disarm {
            fn drop(&mut self) {
                ARMED.set(None);
            }
        }
        assert!(ARMED.replace(Some((injection, 0))).is_none(), "with_fault inside with_fault");
        let disarm = Disarm;
        let value = f();
        let calls = ARMED.with_borrow(|armed| armed.map_or(0, |(_, count)| count));
        drop(disarm);
        (value, calls)
    }

    /// Makes a call of another crate through the gate. A lost outcome is reported as an error of kind `Other`.
    ///
    /// # Errors
    /// Those of the call, and the injected ones.
    pub fn through_gate<T>(operation: &str, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match gate(operation) {
            Gate::Pass => call(),
            Gate::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            Gate::Lose => call().and_then(|_| Err(io::Error::other("injected: outcome unknown"))),
            Gate::DieAfter => {
                // Whatever came of it: the process ends before it could tell.
                drop(call());
                std::process::abort()
            }
        }
    }

    fn note(count: u64, operation: &str) {
        let Some(path) = std::env::var_os("DCENET_FAULT_LOG") else { return };
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
        let noted = file.and_then(|mut file| writeln!(file, "{count} {operation}"));
        noted.unwrap_or_else(|e| panic!("DCENET_FAULT_LOG {}: {e}", path.display()));
    }

    pub(crate) fn gate(operation: &str) -> Gate {
        let local = ARMED.with_borrow_mut(|armed| {
            let (injection, count) = armed.as_mut()?;
            *count += 1;
            Some((*injection, *count))
        });
        if let Some((injection, count)) = local {
            return injection.meet(count, operation);
        }
        static PROCESS: OnceLock<Option<Injection>> = OnceLock::new();
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let process = PROCESS.get_or_init(|| {
            let text = std::env::var("DCENET_FAULT").ok()?;
            Some(Injection::parse(&text).unwrap_or_else(|| panic!("DCENET_FAULT {text:?}: want KIND:N")))
        });
        match process {
            Some(injection) => {
                let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
                if count == injection.call {
                    note(count, operation);
                }
                injection.meet(count, operation)
            }
            None => Gate::Pass,
        }
    }
}
