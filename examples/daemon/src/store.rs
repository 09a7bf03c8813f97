//! A store of addresses that may not be there yet: on a disk that is mounted late, or with files that come later. The daemon
//! works without it, and finds it when it is asked for the next time.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use dcenet_ipam::config::StoreConfig;
use dcenet_ipam::store::{Batch, Caps, Durability, Entry, Key, Outcome, Sharing, Store, StoreError, Watch};

/// Opened when it is asked for anything and is not open.
#[derive(Debug)]
pub struct LateStore {
    config: StoreConfig,
    state_dir: PathBuf,
    open: Mutex<Option<Arc<dyn Store>>>,
}

impl LateStore {
    /// Tries to open it. Where that does not work for now it is told, and tried again at each call.
    ///
    /// # Errors
    /// Where the configuration is wrong, which another try does not mend.
    pub fn new(config: &StoreConfig, state_dir: &Path) -> Result<Self, StoreError> {
        let this = Self { config: config.clone(), state_dir: state_dir.to_owned(), open: Mutex::default() };
        match this.get() {
            Err(error @ StoreError::Misuse(_)) => return Err(error),
            Err(error) => tracing::warn!(%error, "ipam.store: not to be opened for now; it is tried again"),
            Ok(_) => {}
        }
        Ok(this)
    }

    fn get(&self) -> Result<Arc<dyn Store>, StoreError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = &*open {
            return Ok(Arc::clone(store));
        }
        let store = self.config.open(&self.state_dir)?;
        Ok(Arc::clone(open.insert(store)))
    }
}

#[async_trait]
impl Store for LateStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.get()?.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.get()?.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.get()?.commit(batch).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.get()?.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.get()?.watch(prefix, after).await
    }

    /// While it is not open: what every store can that a configuration can name and processes can share.
    fn caps(&self) -> Caps {
        self.get().map_or_else(
            |_| Caps {
                max_operations: 16,
                max_bytes: 64 << 10,
                multi_key_atomic: true,
                sharing: match &self.config {
                    StoreConfig::Etcd(_) => Sharing::Machines,
                    _ => Sharing::Processes,
                },
                durability: Durability::Power,
            },
            |store| store.caps(),
        )
    }
}
