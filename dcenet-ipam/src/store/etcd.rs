//! An etcd cluster (v3 API, 3.4 or later): shared by any number of processes on any number of machines.
//!
//! ```json
//! { "kind": "etcd", "endpoints": ["https://10.0.0.1:2379", "https://10.0.0.2:2379"], "prefix": "/dcenet/ipam/",
//!   "ca": "/etc/dcenet/ca.pem", "cert": "/etc/dcenet/client.pem", "key": "/etc/dcenet/client.key",
//!   "username": "dcenet", "passwordFile": "/etc/dcenet/password", "timeout": "10s" }
//! ```
//!
//! # Keys
//! | Key | Value |
//! |---|---|
//! | prefix + `k/` + key | what the store holds |
//! | prefix + `r/` + four hexadecimal digits | the id (16 bytes) of the last request that was committed in this lane |
//!
//! A version is etcd's `mod_revision`, a guard a compare of it, a batch one transaction. The other branch of the
//! transaction reads the guarded keys, so that a conflict costs no second trip. Reads are linearizable; several keys
//! are read in one transaction.
//!
//! # Requests that may have been carried out
//! When a connection breaks, a member stops or the leader changes, nobody knows what became of a transaction, and it
//! may still be carried out later. To send it again safely, two more things are in every transaction, after the
//! sessions of NFSv4.1 (RFC 8881, section 2.10.6): its id chooses one of [`LANES`] keys, and it
//! - puts its id there: who finds it knows that the request was committed, and by which revision;
//! - asks that the lane was not written since a revision that was the newest before the first try: so of all tries only
//!   one can be carried out, and a write to the lane makes sure that none still can.
//!
//! So a failed try is repeated at the next member with nothing but its outcome in doubt, and what cannot be settled
//! within the timeout is [`Outcome::Unknown`](super::Outcome::Unknown). The price is one compare and one small put in a
//! transaction that goes to the disk anyway, and at most 16,384 small keys in all; a key per request would have to be
//! reaped, by a lease that costs each short-lived plugin two more commits of the cluster. Two requests that meet in one
//! lane cost a second trip, and a request that must be settled after another has used its lane stays unknown.
//!
//! # Many batches
//! [`Store::commit_many`] puts batches that have no key in common into one transaction of etcd, as transactions within it:
//! one trip and one entry of its log for all, each committed or refused by itself. Those that are committed together have
//! one revision.
//!
//! # First gap
//! What was seen to be taken is remembered for ten seconds, and own commits are noted, so that a search begins beyond
//! what is known to be taken and costs one trip for a page of keys without values. What is not known is not walked
//! through: one transaction counts keys in many intervals, and the first that is not full is divided again. There is no
//! watch behind it, for with many processes every commit would be sent to all of them: 250 watchers were measured to
//! bring etcd down to 131 writes a second.
//!
//! # Why no client crate
//! `etcd-client` declares the same few messages from the whole of etcd's `.proto` files: it needs `protoc`, a code
//! generator and a server stack to build (133 packages against 90), and hides from which member an answer came and
//! whether a request was sent, on which the outcome of a commit depends.
//!
//! # Rotation
//! Certificates and keys are read for each new connection, the password for each new token: a file that is replaced needs
//! no restart. Connections and tokens that are in use stay until the cluster ends them.
//!
//! The store runs its connections on one thread of its own, so that it can be used with any executor.

#[cfg(feature = "etcd")]
mod client;
#[cfg(all(feature = "etcd", feature = "test-support"))]
pub mod cluster;
#[cfg(feature = "etcd")]
mod gaps;
#[cfg(feature = "etcd")]
mod many;
#[cfg(feature = "etcd")]
mod store;
#[cfg(feature = "etcd")]
mod watch;
#[cfg(feature = "etcd")]
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Store, StoreError};

#[cfg(feature = "etcd")]
pub use self::store::EtcdStore;

/// How to reach a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EtcdConfig {
    /// The members, `http://HOST:PORT` or `https://HOST:PORT`. One is used until it fails.
    pub endpoints: Vec<String>,
    /// What all keys begin with, `/dcenet/ipam/` unless told. Who shares addresses must name the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// A file of certificates (PEM) by which the servers are known; needed for `https`, and refused with `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// A file with the client's own certificate (PEM), where the cluster asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// A file with the key of `cert` (PEM).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// The user, where the cluster has authentication enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// A file with the user's password; a newline at its end is not part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// How long a call may take over all members and tries, 10 s unless told.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "crate::config::duration_text")]
    pub timeout: Option<Duration>,
    /// The most operations of a transaction, 128 unless told: the cluster's `--max-txn-ops`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_operations: Option<usize>,
}

impl EtcdConfig {
    /// [`EtcdConfig::prefix`] unless told.
    pub const PREFIX: &str = "/dcenet/ipam/";
    /// [`EtcdConfig::timeout`] unless told.
    pub const TIMEOUT: Duration = Duration::from_secs(10);
    /// [`EtcdConfig::max_operations`] unless told, as in etcd.
    pub const MAX_OPERATIONS: usize = 128;

    /// Opens the store. Files are read, the cluster is not asked for anything yet.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] or [`StoreError::Io`] with the field and the file.
    #[cfg(feature = "etcd")]
    pub fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(EtcdStore::open(self)?))
    }

    /// Refuses, for this build has no etcd.
    ///
    /// # Errors
    /// Always [`StoreError::Misuse`].
    #[cfg(not(feature = "etcd"))]
    pub fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        Err(StoreError::Misuse(
            "ipam.store.kind: \"etcd\" is not in this build; build it with the feature etcd, of dcenet-ipam or of \
             the CNI plugin"
                .to_owned(),
        ))
    }

    /// For one call over all tries.
    #[cfg(feature = "etcd")]
    fn total(&self) -> Duration {
        self.timeout.unwrap_or(Self::TIMEOUT)
    }

    /// For one try: a member that is stopped must leave time for others.
    #[cfg(feature = "etcd")]
    fn patience(&self) -> Duration {
        self.total() / 4
    }
}

/// Keys that requests are remembered in.
pub const LANES: u128 = 1 << 14;
