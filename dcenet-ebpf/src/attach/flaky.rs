//! A wrapper that makes an attacher worse, to see whether what stands on it holds.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use dcenet_core::model::IfIndex;

use super::{AttachError, Attached, Attacher, Hook, Tag};
use crate::program::Program;
use crate::sys::SysError;

/// When a failing call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Before it had any effect.
    Before,
    /// After it took effect, as when the answer is lost.
    After,
}

/// An attacher of which one call fails, with `EIO`.
pub struct FlakyAttacher<'a> {
    inner: &'a dyn Attacher,
    failure: Failure,
    fail_at: u64,
    calls: AtomicU64,
}

impl<'a> FlakyAttacher<'a> {
    /// Fails the call with the number `fail_at`, counted from 1; 0 for none.
    pub fn new(inner: &'a dyn Attacher, failure: Failure, fail_at: u64) -> Self {
        Self { inner, failure, fail_at, calls: AtomicU64::new(0) }
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn pass<T>(&self, call: impl FnOnce(&dyn Attacher) -> Result<T, AttachError>) -> Result<T, AttachError> {
        let fails = self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.fail_at;
        if fails && self.failure == Failure::Before {
            return Err(made_to_fail());
        }
        let done = call(self.inner)?;
        if fails { Err(made_to_fail()) } else { Ok(done) }
    }
}

impl Attacher for FlakyAttacher<'_> {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        self.pass(|inner| inner.attach_tagged(hook, program, tag))
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        self.pass(|inner| inner.replace_tagged(hook, program, tag))
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        self.pass(|inner| inner.devices())
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        self.pass(|inner| inner.chain(hook))
    }

    fn forget_vanished(&self) -> Result<usize, AttachError> {
        self.pass(|inner| inner.forget_vanished())
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        self.pass(|inner| inner.detach(hook))
    }
}

fn made_to_fail() -> AttachError {
    SysError { call: "made to fail", source: io::Error::from_raw_os_error(libc::EIO) }.into()
}
