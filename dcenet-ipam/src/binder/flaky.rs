//! A binder that fails at one call, or is cut off from it on as a killed process is, and with it a store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, net::IpAddr};

use async_trait::async_trait;

use super::{AddressBinder, BindError, BindRequest, BindToken, Bound};
use crate::store::flaky::{Failure, Faults};

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It has its effect, and its answer is lost.
    After,
    /// It has no effect.
    Before,
    /// It has its effect, and neither it nor any later one comes back: the process was killed then.
    KilledAfter,
    /// Neither it nor any later one has an effect: the process was killed before.
    KilledBefore,
}

/// Counts the calls of a binder and a [`FlakyStore`](crate::store::flaky::FlakyStore) together, and makes one fail.
#[derive(Debug)]
pub struct Fuse {
    cut: Cut,
    at: u64,
    calls: AtomicU64,
}

impl Fuse {
    /// Fails the call with the number `at`, counted from 1; 0 for none.
    pub fn new(cut: Cut, at: u64) -> Arc<Self> {
        Arc::new(Self { cut, at, calls: AtomicU64::new(0) })
    }

    /// Whether the process counts as killed.
    pub fn is_killed(&self) -> bool {
        matches!(self.cut, Cut::KilledAfter | Cut::KilledBefore) && self.at != 0 && self.calls() >= self.at
    }
}

impl Faults for Fuse {
    fn next(&self) -> Option<Failure> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let dead = matches!(self.cut, Cut::KilledAfter | Cut::KilledBefore);
        match self.at {
            0 => None,
            at if call == at && matches!(self.cut, Cut::After | Cut::KilledAfter) => Some(Failure::After),
            at if call == at || call > at && dead => Some(Failure::Before),
            _ => None,
        }
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

/// A binder behind a fuse.
pub struct FlakyBinder {
    inner: Arc<dyn AddressBinder>,
    fuse: Arc<Fuse>,
}

impl FlakyBinder {
    /// Passes calls on for as long as the fuse lets them.
    pub fn new(inner: Arc<dyn AddressBinder>, fuse: Arc<Fuse>) -> Self {
        Self { inner, fuse }
    }

    async fn through<R>(&self, call: impl Future<Output = Result<R, BindError>>) -> Result<R, BindError> {
        match self.fuse.next() {
            None => return call.await,
            Some(Failure::After) => drop(call.await?),
            Some(Failure::Before | Failure::Lost) => {}
        }
        let source = io::Error::other("made to fail").into();
        Err(BindError::Failed { outside: self.name(), doing: "asking", source })
    }
}

#[async_trait]
impl AddressBinder for FlakyBinder {
    fn name(&self) -> String {
        self.inner.name()
    }

    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        self.through(self.inner.bind(request)).await
    }

    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        self.through(self.inner.renew(bound)).await
    }

    async fn release(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError> {
        self.through(self.inner.release(token, bound)).await
    }

    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        self.through(self.inner.decline(bound, address)).await
    }

    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        self.through(self.inner.list()).await
    }

    async fn ready(&self) -> Result<(), BindError> {
        self.through(self.inner.ready()).await
    }
}
