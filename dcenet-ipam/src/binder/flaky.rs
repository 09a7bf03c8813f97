//! A binder and a store that fail at one call, or are cut off from it on as a killed process is.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, net::IpAddr};

use async_trait::async_trait;

use super::{AddressBinder, BindError, BindRequest, BindToken, Bound};
use crate::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, Watch};

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

/// Counts the calls of a store and a binder together, and makes one fail.
#[derive(Debug)]
pub struct Fuse {
    cut: Cut,
    at: u64,
    calls: AtomicU64,
}

enum Fate {
    Lives,
    /// With or without its effect.
    Fails {
        effect: bool,
    },
}

impl Fuse {
    /// Fails the call with the number `at`, counted from 1; 0 for none.
    pub fn new(cut: Cut, at: u64) -> Arc<Self> {
        Arc::new(Self { cut, at, calls: AtomicU64::new(0) })
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Whether the process counts as killed.
    pub fn is_killed(&self) -> bool {
        matches!(self.cut, Cut::KilledAfter | Cut::KilledBefore) && self.at != 0 && self.calls() >= self.at
    }

    fn burn(&self) -> Fate {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let dead = matches!(self.cut, Cut::KilledAfter | Cut::KilledBefore);
        match self.at {
            0 => Fate::Lives,
            at if call == at => Fate::Fails { effect: matches!(self.cut, Cut::After | Cut::KilledAfter) },
            at if call > at && dead => Fate::Fails { effect: false },
            _ => Fate::Lives,
        }
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
        let effect = match self.fuse.burn() {
            Fate::Lives => return call.await,
            Fate::Fails { effect } => effect,
        };
        if effect {
            call.await?;
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

/// A store behind a fuse.
#[derive(Debug)]
pub struct FusedStore {
    inner: Arc<dyn Store>,
    fuse: Arc<Fuse>,
}

impl FusedStore {
    /// Passes calls on for as long as the fuse lets them.
    pub fn new(inner: Arc<dyn Store>, fuse: Arc<Fuse>) -> Self {
        Self { inner, fuse }
    }

    fn answer(&self) -> Result<(), StoreError> {
        match self.fuse.burn() {
            Fate::Lives => Ok(()),
            Fate::Fails { .. } => Err(StoreError::Unavailable("made to fail".to_owned())),
        }
    }
}

#[async_trait]
impl Store for FusedStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.answer()?;
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.answer()?;
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        match self.fuse.burn() {
            Fate::Lives => self.inner.commit(batch).await,
            Fate::Fails { effect: true } => match self.inner.commit(batch).await? {
                Outcome::Committed { .. } => Ok(Outcome::Unknown { reason: "made to fail".to_owned() }),
                other => Ok(other),
            },
            Fate::Fails { effect: false } => Err(StoreError::Unavailable("made to fail".to_owned())),
        }
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.answer()?;
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.answer()?;
        self.inner.watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
