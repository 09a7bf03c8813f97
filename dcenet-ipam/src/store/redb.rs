//! A store in a [redb](https://www.redb.org) database: for an embedder whose one process owns the addresses.
//!
//! Exclusive: redb locks its file, and a second process (or a second handle in this one) is refused by
//! [`RedbStore::open`] until the first has ended; the kernel lets go of the lock of a process that was killed. Use the
//! [log](super::log) where short-lived processes share a store.
//!
//! A commit is one write transaction of redb with immediate durability, that is, flushed to the medium before the
//! reply. Reads see the last such transaction, so all that was read is durable, and a barrier costs no flush. A process
//! that was killed leaves the last acknowledged commit or the one after it, whole; redb then walks over its file once
//! at the next open.
//!
//! Watches live in the process: what was committed before the store was opened is a gap to them.

use std::fs::{DirBuilder, File, OpenOptions};
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::history::History;
use super::{
    Batch, Caps, Durability, Entry, Guard, Key, Outcome, Sharing, Store, StoreError, Watch, Write, check, commit_sound,
};

/// Keys with the version and the bytes of their values.
const RECORDS: TableDefinition<'_, &[u8], (u64, &[u8])> = TableDefinition::new("records");
/// The newest revision, under one key.
const REVISION: TableDefinition<'_, (), u64> = TableDefinition::new("revision");
/// The newest requests: revision by id, and id by revision.
const REQUESTS: TableDefinition<'_, u128, u64> = TableDefinition::new("requests");
const REQUESTS_BY_REVISION: TableDefinition<'_, u64, u128> = TableDefinition::new("requests by revision");
/// Requests that are remembered.
const REMEMBERED: u64 = 1024;
const FILE: &str = "ipam.redb";

/// A store in a database file that this process has for itself.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
    path: PathBuf,
    history: Arc<History>,
    /// Held from the first look at the guards until the history knows the outcome.
    writing: Mutex<()>,
    durability: redb::Durability,
}

impl RedbStore {
    /// Opens the database `ipam.redb` in a directory. Directory (mode 0700) and file (mode 0600) are made if absent.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if another has it open, [`StoreError::Corrupt`] if it is damaged, otherwise
    /// [`StoreError::Io`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, redb::Durability::Immediate)
    }

    /// As [`RedbStore::open`], but nothing is flushed: the twin that shows that a test would see a lost commit.
    #[cfg(feature = "test-support")]
    pub fn open_without_durability(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, redb::Durability::None)
    }

    fn open_with(dir: &Path, durability: redb::Durability) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        let io = |verb: &str, path: &Path| {
            let doing = format!("cannot {verb} {}", path.display());
            move |source| StoreError::Io { doing, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create", dir))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        let failed = |e: redb::Error| store_error(&path, e);
        let database = FileBackend::new(file)
            .and_then(|file| Database::builder().create_with_backend(file))
            .map_err(|e| failed(e.into()))?;
        // The name of the file is to last as long as what is written to it.
        for dir in dir.ancestors().filter(|d| !d.as_os_str().is_empty()).take(2) {
            File::open(dir).and_then(|d| d.sync_all()).map_err(io("flush", dir))?;
        }
        let revision = (|| -> Result<u64, redb::Error> {
            let transaction = database.begin_write()?;
            transaction.open_table(RECORDS)?;
            transaction.open_table(REQUESTS)?;
            transaction.open_table(REQUESTS_BY_REVISION)?;
            let revision = revision_of(&transaction.open_table(REVISION)?)?;
            transaction.commit()?;
            Ok(revision)
        })()
        .map_err(failed)?;
        let history = Arc::new(History::since(revision));
        Ok(Self { database, path, history, writing: Mutex::new(()), durability })
    }

    fn failed(&self, error: redb::Error) -> StoreError {
        store_error(&self.path, error)
    }

    fn revision(&self) -> Result<u64, redb::Error> {
        revision_of(&self.database.begin_read()?.open_table(REVISION)?)
    }

    fn find(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, redb::Error> {
        let table = self.database.begin_read()?.open_table(RECORDS)?;
        keys.iter().map(|key| entry_of(&table, key)).collect()
    }

    fn page(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, redb::Error> {
        let table = self.database.begin_read()?.open_table(RECORDS)?;
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut found = Vec::new();
        for record in table.range::<&[u8]>((from, Bound::Unbounded))? {
            let (key, value) = record?;
            if found.len() == limit || !key.value().starts_with(prefix) {
                break;
            }
            let (version, value) = value.value();
            found.push((key.value().to_vec(), Entry { value: value.to_vec(), version }));
        }
        Ok(found)
    }

    /// Applies a batch within a transaction.
    fn apply(transaction: &WriteTransaction, batch: &Batch) -> Result<Outcome, redb::Error> {
        let mut requests = transaction.open_table(REQUESTS)?;
        let repeated = requests.get(batch.request_id)?.map(|revision| revision.value());
        if let Some(revision) = repeated {
            return Ok(Outcome::Committed { revision });
        }
        let mut records = transaction.open_table(RECORDS)?;
        let mut current = Vec::with_capacity(batch.guards.len());
        for guard in &batch.guards {
            current.push(entry_of(&records, &guard.key)?);
        }
        let held = |(guard, entry): (&Guard, &Option<Entry>)| entry.as_ref().map(|e| e.version) == guard.version;
        if !batch.guards.iter().zip(&current).all(held) {
            return Ok(Outcome::Conflict(current));
        }
        let mut newest = transaction.open_table(REVISION)?;
        let mut revision = revision_of(&newest)?;
        if batch.writes.is_empty() {
            return Ok(Outcome::Committed { revision });
        }
        revision += 1;
        for write in &batch.writes {
            match write {
                Write::Delete(key) => drop(records.remove(key.as_slice())?),
                Write::Put(key, value) => drop(records.insert(key.as_slice(), (revision, value.as_slice()))?),
            }
        }
        newest.insert((), revision)?;
        requests.insert(batch.request_id, revision)?;
        let mut order = transaction.open_table(REQUESTS_BY_REVISION)?;
        order.insert(revision, batch.request_id)?;
        if let Some(forgotten) = revision.checked_sub(REMEMBERED) {
            forget(&mut requests, &mut order, forgotten)?;
        }
        Ok(Outcome::Committed { revision })
    }

    /// One transaction for all: an error undoes it, and nothing has happened.
    fn stage(&self, batches: &[Batch]) -> Result<(WriteTransaction, Vec<Outcome>), redb::Error> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(self.durability)?;
        let outcomes =
            batches.iter().map(|batch| Self::apply(&transaction, batch)).collect::<Result<_, redb::Error>>()?;
        Ok((transaction, outcomes))
    }

    fn commit_all(&self, batches: &[Batch]) -> Result<Vec<Outcome>, StoreError> {
        let _turn = self.writing.lock();
        let before = self.revision().map_err(|e| self.failed(e))?;
        let (transaction, mut outcomes) = self.stage(batches).map_err(|e| self.failed(e))?;
        let mut applied: Vec<(u64, &Batch)> = Vec::new();
        for (batch, outcome) in batches.iter().zip(&outcomes) {
            if let Outcome::Committed { revision } = outcome
                && *revision > applied.last().map_or(before, |(newest, _)| *newest)
            {
                applied.push((*revision, batch));
            }
        }
        if applied.is_empty() {
            // What was read is durable; there is nothing to flush.
            transaction.abort().map_err(|e| self.failed(e.into()))?;
            return Ok(outcomes);
        }
        if let Err(error) = transaction.commit() {
            let reason = self.failed(error.into()).to_string();
            outcomes.iter_mut().for_each(|outcome| *outcome = Outcome::Unknown { reason: reason.clone() });
            return Ok(outcomes);
        }
        for (revision, batch) in applied {
            self.history.remember(revision, &batch.writes);
        }
        Ok(outcomes)
    }
}

fn forget(
    requests: &mut Table<'_, u128, u64>,
    order: &mut Table<'_, u64, u128>,
    revision: u64,
) -> Result<(), redb::Error> {
    let id = order.remove(revision)?.map(|id| id.value());
    if let Some(id) = id {
        requests.remove(id)?;
    }
    Ok(())
}

fn revision_of(table: &impl ReadableTable<(), u64>) -> Result<u64, redb::Error> {
    Ok(table.get(())?.map_or(0, |revision| revision.value()))
}

fn entry_of(
    table: &impl ReadableTable<&'static [u8], (u64, &'static [u8])>,
    key: &[u8],
) -> Result<Option<Entry>, redb::Error> {
    Ok(table.get(key)?.map(|found| {
        let (version, value) = found.value();
        Entry { value: value.to_vec(), version }
    }))
}

fn store_error(path: &Path, error: redb::Error) -> StoreError {
    let file = path.display().to_string();
    match error {
        // redb does not say where.
        redb::Error::Corrupted(reason) => StoreError::Corrupt { file, offset: 0, reason },
        redb::Error::Io(source) => StoreError::Io { doing: format!("cannot use {file}"), source },
        redb::Error::DatabaseAlreadyOpen => StoreError::Unavailable(format!(
            "{file} is open in another process or by another handle of this one; a redb store has one owner: close the \
             other one, or use a store of kind log"
        )),
        error => StoreError::Unavailable(format!("{file}: {error}")),
    }
}

#[async_trait]
impl Store for RedbStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.find(keys).map_err(|e| self.failed(e))
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.page(prefix, after, limit).map_err(|e| self.failed(e))
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        check(batch, &self.caps())?;
        Ok(self.commit_all(std::slice::from_ref(batch))?.remove(0))
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        commit_sound(batches, &self.caps(), |sound| self.commit_all(sound))
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        Ok(self.history.watch(prefix, after))
    }

    fn caps(&self) -> Caps {
        Caps {
            max_operations: 4096,
            max_bytes: 8 << 20,
            multi_key_atomic: true,
            sharing: Sharing::Exclusive,
            durability: Durability::Power,
        }
    }
}
