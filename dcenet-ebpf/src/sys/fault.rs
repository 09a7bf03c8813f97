//! Where tests make system calls fail.

use super::SysError;

/// Makes a system call, unless a test wants it to fail.
#[cfg(not(any(test, feature = "test-support")))]
#[inline(always)]
pub(crate) fn gated<T>(call: &'static str, make: impl FnOnce() -> std::io::Result<T>) -> Result<T, SysError> {
    make().map_err(|source| SysError { call, source })
}

#[cfg(any(test, feature = "test-support"))]
pub(crate) use armed::gated;
#[cfg(any(test, feature = "test-support"))]
pub use armed::{Fault, Faults};

#[cfg(any(test, feature = "test-support"))]
mod armed {
    use std::cell::RefCell;
    use std::io;
    use std::marker::PhantomData;
    use std::ops::RangeInclusive;

    use super::SysError;

    /// What happens at the chosen call.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Fault {
        /// The call fails with this errno and has no effect.
        Fail(i32),
        /// The process ends as if killed, before the call.
        Abort,
    }

    /// Counts the system calls that this crate makes on the calling thread, and spoils one of them. Ends when dropped.
    ///
    /// A test runs its operation with `at` = 0, 1, 2... until [`Faults::calls`] shows that the run made no more than
    /// `at` calls: then every call has failed once.
    #[derive(Debug)]
    pub struct Faults {
        /// The counter belongs to the thread that made it.
        _thread: PhantomData<*const ()>,
    }

    #[derive(Debug)]
    struct State {
        calls: u64,
        spoil: Option<(RangeInclusive<u64>, Fault)>,
    }

    thread_local! {
        static STATE: RefCell<Option<State>> = const { RefCell::new(None) };
    }

    impl Faults {
        /// Counts only.
        pub fn count() -> Self {
            Self::start(None)
        }

        /// Spoils the call number `at`, counted from 0.
        pub fn at(at: u64, fault: Fault) -> Self {
            Self::start(Some((at..=at, fault)))
        }

        /// Spoils the call number `at`, counted from 0, and all behind it.
        pub fn from(at: u64, fault: Fault) -> Self {
            Self::start(Some((at..=u64::MAX, fault)))
        }

        fn start(spoil: Option<(RangeInclusive<u64>, Fault)>) -> Self {
            STATE.with_borrow_mut(|state| *state = Some(State { calls: 0, spoil }));
            Self { _thread: PhantomData }
        }

        /// How many calls there have been, the spoilt one included.
        pub fn calls(&self) -> u64 {
            STATE.with_borrow(|state| state.as_ref().map_or(0, |s| s.calls))
        }
    }

    impl Drop for Faults {
        fn drop(&mut self) {
            STATE.with_borrow_mut(|state| *state = None);
        }
    }

    pub(crate) fn gated<T>(call: &'static str, make: impl FnOnce() -> io::Result<T>) -> Result<T, SysError> {
        let failed = |source| SysError { call, source };
        let fault = STATE.with_borrow_mut(|state| {
            let state = state.as_mut()?;
            let number = state.calls;
            state.calls += 1;
            state.spoil.as_ref().filter(|(at, _)| at.contains(&number)).map(|(_, fault)| *fault)
        });
        match fault {
            None => {}
            Some(Fault::Fail(errno)) => return Err(failed(io::Error::from_raw_os_error(errno))),
            Some(Fault::Abort) => std::process::abort(),
        }
        #[cfg(feature = "fault-injection")]
        return dcenet_core::test_support::through_gate(call, make).map_err(failed);
        #[cfg(not(feature = "fault-injection"))]
        make().map_err(failed)
    }
}
