//! Where bindings live: one trait, one backend a file.
//!
//! A [`Store`] is a sorted map from short keys to small values with one way to change it: an atomic batch of writes
//! that applies only if every guard holds. There are no locks and no leases in the contract, so nobody can act on a
//! lock that was lost in the meantime; whoever lost a race learns it from the guard.
//!
//! All cleverness is above the trait, in [`crate::machine`].

#[cfg(feature = "test-support")]
pub mod conformance;
pub mod etcd;
#[cfg(feature = "test-support")]
pub mod flaky;
pub mod group;
mod history;
pub mod log;
#[cfg(feature = "metrics")]
pub mod measured;
pub mod memory;
#[cfg(feature = "redb")]
pub mod redb;
mod runs;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

use async_trait::async_trait;

pub(crate) use self::runs::Runs;

/// A key: compared as bytes, at most [`MAX_KEY`] of them.
pub type Key = Vec<u8>;

/// The longest key in bytes.
pub const MAX_KEY: usize = 1024;

/// The longest value in bytes.
pub const MAX_VALUE: usize = 1 << 20;

/// A value and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The bytes.
    pub value: Vec<u8>,
    /// The revision of the commit that wrote it. Revisions of a store only grow, so a version is never used twice,
    /// also not for a key that was deleted and made again.
    pub version: u64,
}

/// What must be true of a key for a batch to apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// The key.
    pub key: Key,
    /// `None`: the key is absent. `Some(v)`: it was last written by revision `v`.
    pub version: Option<u64>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Removes the key; nothing happens if it is absent.
    Delete(Key),
    /// Sets the key.
    Put(Key, Vec<u8>),
}

impl Write {
    /// The key that it changes.
    pub fn key(&self) -> &[u8] {
        match self {
            Self::Delete(key) | Self::Put(key, _) => key,
        }
    }
}

/// Guards and writes that happen together or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// All must hold.
    pub guards: Vec<Guard>,
    /// Applied in order. Without any, the commit is a barrier; see [`Store::commit`].
    pub writes: Vec<Write>,
    /// Identifies the attempt, drawn at random by the caller. A store that still remembers a committed batch of the
    /// same id answers `Committed` again and applies nothing, so a caller may send a batch again after `Unknown`.
    pub request_id: u128,
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is applied, and durable as far as [`Caps::durability`] says. For a barrier the revision is the newest one.
    Committed {
        /// The revision given to all its writes.
        revision: u64,
    },
    /// A guard failed and nothing was applied: what every guarded key holds now, in the order of the guards, so that
    /// the caller can decide again without reading.
    Conflict(Vec<Option<Entry>>),
    /// It may or may not be applied, now or a little later. The caller reads to find out.
    Unknown {
        /// What went wrong, for people.
        reason: String,
    },
}

/// What a backend can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// The most guards plus writes in one batch.
    pub max_operations: usize,
    /// The most bytes of keys and values in one batch.
    pub max_bytes: usize,
    /// Whether a batch with several keys is atomic. Where it is not, only the first write and its guard are, and
    /// [`Ipam`](crate::Ipam) and [`Plan`](crate::plan::Plan) refuse the store: a lease and its claim are two keys.
    pub multi_key_atomic: bool,
    /// Who may open it at once.
    pub sharing: Sharing,
    /// What a committed batch survives.
    pub durability: Durability,
}

/// Who may use a store at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// One process.
    Exclusive,
    /// Any number of processes on any number of machines; a call is a trip over the network.
    Machines,
    /// Any number of processes of one machine.
    Processes,
}

/// What a committed batch survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The loss of power, if the medium keeps what it said it flushed.
    Power,
    /// Nothing: it ends with the process.
    Volatile,
}

/// A sorted map with guarded batches.
///
/// Wrong answers that are permitted, and that callers must live with:
/// - `read`, `scan` and `first_gap` may show a commit whose caller has no reply yet, and which a loss of power may
///   still undo. A caller that replies on the strength of what it read, without a write of its own, sends a barrier
///   first.
/// - A watch may tell such a commit too; see [`Watch`].
/// - `scan` over several pages and `first_gap` are not one moment: a key may appear or vanish between calls. A guard
///   tells.
/// - `Conflict` may be answered although a second try would succeed, if the guards failed at some moment between call
///   and answer.
///
/// Never permitted: half a batch, in any answer, at any time; a committed batch that a later call does not see;
/// `Committed` for a batch whose guards did not hold; a version that repeats.
///
/// Calls may block the thread for as long as the medium takes. All may be repeated; `commit` under the rules of
/// [`Batch::request_id`].
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// What each key holds, in the order of the keys, all at one moment. An absent key is `None`.
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError>;

    /// Up to `limit` entries whose key begins with `prefix` and is greater than `after`, in key order. Fewer than
    /// `limit` means that there are no more.
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError>;

    /// Applies a batch if all its guards hold. A batch without writes is a barrier: after `Committed`, everything that
    /// the caller has read from this store is durable, and the guards held at one moment.
    ///
    /// # Errors
    /// Nothing was applied. Whatever may have been applied is [`Outcome::Unknown`], never an error.
    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError>;

    /// Applies batches one after the other, and answers each as [`Store::commit`] would have if it had been sent when
    /// the one before was answered. A later one sees what an earlier one did, and an earlier failure stops no later one.
    /// They are several commits, not one: a crash may leave some of them without the others. Each has a revision of its
    /// own, but for those that have no key in common: these have no order between them, and may share one.
    ///
    /// The default does just that. A backend overrides it where many batches can share a flush or a trip.
    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        let mut outcomes = Vec::with_capacity(batches.len());
        for batch in batches {
            outcomes.push(self.commit(batch).await);
        }
        outcomes
    }

    /// The lowest number of the range for which no key `prefix + number (16 bytes, big-endian)` exists. All keys under
    /// the prefix must have that form. A hint: somebody may take it at once.
    ///
    /// The default walks over the keys; a backend that can count overrides it.
    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let (mut candidate, last) = range.into_inner();
        loop {
            // The page begins just below the candidate, so that it holds the candidate if that exists.
            let after = candidate.checked_sub(1).map(|below| numbered(prefix, below));
            let page = self.scan(prefix, after.as_deref(), 512).await?;
            for (key, _) in &page {
                if number_of(prefix, key)? != candidate || candidate > last {
                    break;
                }
                match candidate.checked_add(1) {
                    Some(next) if candidate < last => candidate = next,
                    _ => return Ok(None),
                }
            }
            let dense = page.last().map(|(key, _)| number_of(prefix, key)).transpose()?;
            if candidate > last {
                return Ok(None);
            }
            if page.len() < 512 || dense.is_none_or(|d| d >= candidate) {
                return Ok(Some(candidate));
            }
        }
    }

    /// Watches the keys that begin with `prefix`; an empty prefix is all keys. The watch tells what every revision
    /// greater than `after` did to them, beginning with those that are committed already. Of what came up to and with
    /// `after` it tells nothing: 0 asks for everything since the store was made.
    ///
    /// It answers with a [`Change::Gap`] where that cannot be had: if the store does not remember that far back, and if
    /// it has not come as far as `after`, which is then not a revision of this store (it was made anew, or is an older
    /// copy). Either way the first call of [`Watch::next`] says so; a watch is never silent about what it cannot tell.
    ///
    /// To follow a prefix: take a revision (a barrier tells the newest), scan, and watch after that revision; see
    /// [`Change`] for how what is scanned and what is watched fit together.
    ///
    /// The default refuses, for wrappers and stores that nobody watches; the conformance suite asks for more.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the store cannot watch.
    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let _ = (prefix, after);
        Err(StoreError::Misuse("this store cannot be watched; scan it at intervals instead".to_owned()))
    }

    /// What the backend can do; constant.
    fn caps(&self) -> Caps;
}

/// Changes under a prefix, in the order of their revisions; made by [`Store::watch`].
///
/// - Order: the revisions of successive changes rise strictly, those of gaps among them, but for one case: a gap that
///   answers an `after` which the store has not reached, or that tells that the store was replaced by another, names
///   the revision where it stands, which may be lower.
/// - Whole batches: a revision comes once, with all its writes under the prefix.
/// - Nothing is left out: between two changes there is no revision that wrote under the prefix. What cannot be told,
///   for it is compacted or the watcher was too slow, is a [`Change::Gap`].
/// - What is told may be a commit whose caller has no reply yet and which a loss of power may still undo, as for
///   [`Store::read`]. Whoever carries it off the machine, or writes down a revision to go on from after a restart,
///   sends a barrier first. Writes of a batch that was refused, or torn, are never told.
/// - What is told is there: a [`Store::read`] that begins after `next` has answered with a revision sees that revision
///   or a later one.
/// - A slow watcher costs the store nothing: there is no queue of its own that grows, and no writer waits for it. Once
///   the store has forgotten what comes next for it, it gets a gap. A gap may also be told where no write under the
///   prefix was missed.
///
/// Dropping it ends it. Several watches of one store do not know of each other.
#[async_trait]
pub trait Watch: Send {
    /// Waits for what comes next, at most `limit`; `None` when nothing came. A `limit` of zero looks without waiting.
    ///
    /// May block the thread for as long as it waits: a program with an executor gives it a thread of its own. The future
    /// may be dropped: what it had not returned is told by the next call.
    ///
    /// # Errors
    /// Nothing is lost by one: the next call goes on where this one could not, with a gap if it must.
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError>;
}

/// What happened under a prefix.
///
/// A scan that begins at revision r shows r and perhaps parts of what came later, which the watch then tells again. So
/// whoever keeps a copy drops what it has of a key when a change with a higher revision than the copy's version names
/// it, and ignores the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Changes up to `revision` are not to be had any more (compacted, or the watcher was too slow): forget the copy,
    /// scan again, then go on with this watch, which tells what every later revision did.
    Gap {
        /// The next change has a higher one.
        revision: u64,
    },
    /// All writes of one revision under the prefix (never half a batch).
    Writes {
        /// The revision of the commit.
        revision: u64,
        /// What each key holds after the batch, in key order, a key once and at least one: an entry whose version is
        /// the revision, or `None` if the batch deleted it. A deletion of what was absent before may be told or not.
        writes: Vec<(Key, Option<Entry>)>,
    },
}

impl Change {
    /// What a batch that was committed as `revision` did to the keys under the prefix; `None` if nothing.
    pub(crate) fn of_batch(revision: u64, writes: &[Write], prefix: &[u8]) -> Option<Self> {
        let last: BTreeMap<&[u8], &Write> =
            writes.iter().filter(|w| w.key().starts_with(prefix)).map(|w| (w.key(), w)).collect();
        let writes: Vec<_> = last
            .into_iter()
            .map(|(key, write)| match write {
                Write::Delete(_) => (key.to_vec(), None),
                Write::Put(_, value) => (key.to_vec(), Some(Entry { value: value.clone(), version: revision })),
            })
            .collect();
        (!writes.is_empty()).then_some(Self::Writes { revision, writes })
    }

    /// The revision that it is about.
    pub fn revision(&self) -> u64 {
        match self {
            Self::Gap { revision } | Self::Writes { revision, .. } => *revision,
        }
    }
}

/// The key `prefix + number` of [`Store::first_gap`].
pub fn numbered(prefix: &[u8], number: u128) -> Key {
    [prefix, &number.to_be_bytes()].concat()
}

/// The number of a key made by [`numbered`].
pub fn number_of(prefix: &[u8], key: &[u8]) -> Result<u128, StoreError> {
    key.strip_prefix(prefix)
        .and_then(|rest| <[u8; 16]>::try_from(rest).ok())
        .map(u128::from_be_bytes)
        .ok_or_else(|| StoreError::Misuse(format!("key {:?} is not its prefix and 16 bytes", key.escape_ascii())))
}

/// Refuses a store whose batches could come apart.
///
/// # Errors
/// [`StoreError::Misuse`].
pub(crate) fn require_atomic(store: &dyn Store) -> Result<(), StoreError> {
    if store.caps().multi_key_atomic {
        return Ok(());
    }
    Err(StoreError::Misuse(format!(
        "{store:?}: its caps() say multi_key_atomic: false, and half a batch is an address with two holders or none; \
         use a store that applies a batch whole or not at all"
    )))
}

/// Checks a batch against limits. Backends call it before anything else.
pub fn check(batch: &Batch, caps: &Caps) -> Result<(), StoreError> {
    let operations = batch.guards.len() + batch.writes.len();
    if operations > caps.max_operations {
        return Err(StoreError::Misuse(format!(
            "a batch of {operations} operations exceeds the store's limit of {}; split it",
            caps.max_operations
        )));
    }
    let mut bytes = 0;
    for key in batch.guards.iter().map(|g| g.key.as_slice()).chain(batch.writes.iter().map(Write::key)) {
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(StoreError::Misuse(format!("a key of {} bytes; 1 to {MAX_KEY} are allowed", key.len())));
        }
        bytes += key.len();
    }
    for write in &batch.writes {
        if let Write::Put(_, value) = write {
            if value.len() > MAX_VALUE {
                return Err(StoreError::Misuse(format!(
                    "a value of {} bytes; up to {MAX_VALUE} are allowed",
                    value.len()
                )));
            }
            bytes += value.len();
        }
    }
    if bytes > caps.max_bytes {
        return Err(StoreError::Misuse(format!(
            "a batch of {bytes} bytes exceeds the store's limit of {}; split it",
            caps.max_bytes
        )));
    }
    Ok(())
}

/// Answers [`Store::commit_many`] by a function for batches that are within the limits, which either answers every one
/// of them or has changed nothing.
fn commit_sound(
    batches: &[Batch],
    caps: &Caps,
    commit: impl FnOnce(&[Batch]) -> Result<Vec<Outcome>, StoreError>,
) -> Vec<Result<Outcome, StoreError>> {
    let checks: Vec<_> = batches.iter().map(|batch| check(batch, caps)).collect();
    let sound: Cow<'_, [Batch]> = if checks.iter().all(Result::is_ok) {
        batches.into()
    } else {
        batches.iter().zip(&checks).filter(|(_, check)| check.is_ok()).map(|(batch, _)| batch.clone()).collect()
    };
    let answers: Vec<_> = match commit(&sound) {
        Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
        Err(error) => sound.iter().map(|_| Err(error.again())).collect(),
    };
    let mut answers = answers.into_iter();
    let unanswered = || Err(StoreError::Unavailable("the store left a batch unanswered".to_owned()));
    checks.into_iter().map(|check| check.and_then(|()| answers.next().unwrap_or_else(unanswered))).collect()
}

/// Why a store gave no answer. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file is damaged in a place that had been durable. It is not repaired silently, for what is lost may be in use.
    #[error(
        "{file} is damaged at byte {offset}: {reason}; restore it from a copy, or remove the directory once nothing \
         that it recorded runs any more"
    )]
    Corrupt {
        /// The file.
        file: String,
        /// Where.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The backend does not let this user do it, or does not know him.
    #[error("{0}")]
    Denied(String),
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, to which file.
        doing: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The caller broke the contract.
    #[error("{0}")]
    Misuse(String),
    /// The backend cannot be reached or is out of order for now.
    #[error("{0}")]
    Unavailable(String),
}

impl StoreError {
    /// The same, for another who waits for the same thing.
    fn again(&self) -> Self {
        match self {
            Self::Corrupt { file, offset, reason } => {
                Self::Corrupt { file: file.clone(), offset: *offset, reason: reason.clone() }
            }
            Self::Denied(text) => Self::Denied(text.clone()),
            Self::Io { doing, source } => {
                let again = || io::Error::new(source.kind(), source.to_string());
                let source = source.raw_os_error().map_or_else(again, io::Error::from_raw_os_error);
                Self::Io { doing: doing.clone(), source }
            }
            Self::Misuse(text) => Self::Misuse(text.clone()),
            Self::Unavailable(text) => Self::Unavailable(text.clone()),
        }
    }
}
