//! Addresses that someone else hands out, or must be told of: one trait, one backend a file.
//!
//! A cloud gives traffic for a pod's address only to the machine that it was told of; a DHCP server alone knows which
//! address of its subnet is free. An [`AddressBinder`] speaks to such an outside. Two sources of addresses are built on it:
//!
//! - [`BoundSource`]: the address comes from [`Ipam`](crate::Ipam), and the outside is told of it.
//! - [`OutsideSource`]: the address comes from the outside, and the store remembers it.
//!
//! # No address is leaked, and none is used by two
//! Inside and outside cannot change in one step, so the store holds a record of each attachment, which says what may be
//! true outside:
//!
//! ```text
//!            lease                    bind                  release              undone outside
//!   (none) --------> Intent(token) ---------> Bound(token) ---------> Releasing ----------------> (none)
//!                       |                                                 ^
//!                       +---- refused, or nobody knows what became of it -+
//! ```
//!
//! - **The intent is durable before the outside hears of it**, and the record goes only when the outside has let go. What
//!   is bound outside is thus always named by a record, whoever is killed in between.
//! - **A [`BindToken`] is used for one lease only**: it carries the lease's never-reused sequence. Asking twice for the
//!   same token gives the same answer, so a step whose reply was lost is taken again; releasing a token cannot touch what
//!   a later lease of the same attachment holds.
//! - **An address goes back inside only after the outside has let go of it.** While the outside does not answer, the lease
//!   stays.
//! - [`BinderSource::recover`] finishes what others left: intents are bound, what was being released is released, and
//!   what the outside lists under a token that no record names is released there. It may run beside living callers: an
//!   intent comes before its bind, so whatever is listed without a record when the record is looked for afterwards is
//!   nobody's.
//!
//! What the outside leases for a time is renewed by a [`Renewer`], which also lets go of what was released past its source.
//!
//! A caller who is killed between its lease inside and its intent leaves a lease that the outside does not know: the
//! attachment's next lease or release goes on from it, as for any caller who died before it was answered.
//!
//! A caller who stands still between intent and bind until its lease was released, then binds, finds its record gone and
//! releases again. If it is killed in that moment too, [`AddressBinder::list`] tells of the remnant. Where an outside
//! cannot list (DHCP), the end of the time for which it leases does.

mod bound;
mod concurrent;
#[cfg(feature = "test-support")]
pub mod conformance;
#[cfg(feature = "dhcp")]
pub mod dhcp;
#[cfg(feature = "test-support")]
pub mod flaky;
mod keeper;
pub(crate) mod ledger;
#[cfg(feature = "dhcp")]
mod off_thread;
mod outside;
pub mod recording;
pub mod renewer;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, MacAddr, Workload};
use dcenet_core::provider::{AddressSource, Dns, LeaseError, LeasedRoute};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::bound::BoundSource;
pub use self::outside::OutsideSource;
pub use self::renewer::Renewer;
use crate::store::Store;

/// Whom something is bound for: one lease of one attachment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindToken {
    /// The attachment.
    pub attachment: AttachmentKey,
    /// The sequence of its lease, never used twice.
    pub sequence: u64,
}

impl std::fmt::Display for BindToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (lease {})", self.attachment, self.sequence)
    }
}

/// What is asked of the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindRequest {
    /// For whom.
    pub token: BindToken,
    /// The addresses, each with the length of its subnet's prefix; empty where the outside chooses.
    pub addresses: Vec<IpNet>,
    /// The MAC address that the attachment will have.
    pub mac: MacAddr,
    /// The workload, where it is known.
    pub workload: Option<Workload>,
}

/// What is bound outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// For whom.
    pub token: BindToken,
    /// The addresses.
    pub addresses: Vec<BoundAddress>,
    /// The MAC address that it was bound for.
    pub mac: MacAddr,
    /// Routes that the outside tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings that the outside tells.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    /// When to renew, in milliseconds since 1970; `None` if it lasts until it is released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew: Option<u64>,
    /// When it ends unless it is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// What the binder wants to know when it renews or releases; nobody else reads it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub memo: String,
}

/// One address that is bound outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoundAddress {
    /// The address with the length of its subnet's prefix.
    pub address: IpNet,
    /// The subnet's router, where the outside tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// Speaks to whoever hands addresses out, or must be told of them.
///
/// Every call may be repeated, and comes again after a crash. Calls may block the thread for as long as the outside takes
/// to answer, which an implementation bounds.
#[async_trait]
pub trait AddressBinder: Send + Sync {
    /// What the outside is, for people, such as `dhcp on eth0`.
    fn name(&self) -> String;

    /// Binds the addresses, or any if the request has none, for the token. Called after the intent is durable, and again
    /// with the same token whenever nobody knows what became of it: it then answers what is bound already. All
    /// addresses or none.
    ///
    /// # Errors
    /// [`BindError::is_certain`] tells whether something may be bound all the same. An implementation must not bind
    /// what another token has.
    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError>;

    /// Makes what is bound last longer, and checks that it is still bound. The answer takes the place of `bound`, and has
    /// the same addresses.
    ///
    /// # Errors
    /// [`BindError::Lost`] if the token has it no more: nobody may use it any longer.
    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError>;

    /// Lets go of all that the token has, and of nothing that another has; `Ok` if it has nothing. `bound` is what was
    /// bound, `None` where nobody knows whether anything was.
    async fn release(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError>;

    /// Lets go of what the token has, and tells the outside that somebody else uses the address, so that it is not handed
    /// out again soon. The next [`AddressBinder::bind`] of the token gives another where the outside chooses.
    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError>;

    /// All tokens that have something outside, for those who look for remnants; `None` if the outside does not tell.
    /// Only what this installation bound, where several share the outside.
    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError>;

    /// Whether a bind could succeed now; cheap, for STATUS is polled.
    async fn ready(&self) -> Result<(), BindError>;
}

/// A source of addresses that has a binder behind it.
#[async_trait]
pub trait BinderSource: AddressSource {
    /// Finishes what a crash left; see the [module](self). Called at the start of a daemon, and whenever. Goes on after a
    /// failure. Other sources' records in the same store are left alone, and so are those that name no source where no
    /// lease tells whose they are: the attachment's next lease or release finishes them.
    ///
    /// # Errors
    /// The first failure, after everything else was tried.
    async fn recover(&self) -> Result<Recovered, LeaseError>;

    /// Renews what is due of this source's, 16 at most, and releases outside what was released past the source. A record
    /// that cannot be read or renewed stops no other, and comes after the others in the next call. Where more is due,
    /// [`Renewals::next`] is in the past.
    ///
    /// # Errors
    /// The store cannot be listed. All else is told by record.
    async fn renew_due(&self) -> Result<Renewals, LeaseError>;

    /// The store with the records, for who waits for changes of them.
    fn records(&self) -> &Arc<dyn Store>;
}

/// What came of [`BinderSource::renew_due`].
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Renewals {
    /// How many last longer now.
    pub renewed: usize,
    /// How many were released outside, for their lease was released past the source.
    pub released: usize,
    /// Attachments whose addresses are lost, or about to be: they must not use them beyond the time given, in milliseconds
    /// since 1970.
    pub doomed: Vec<(AttachmentKey, u64)>,
    /// Records that could not be read, renewed or written, and are tried again with the next call.
    pub failures: Vec<RecordFailure>,
    /// When the first of the others is due, in milliseconds since 1970; not of those that failed.
    pub next: Option<u64>,
}

/// What is wrong with one record of a source.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {error}")]
pub struct RecordFailure {
    /// The record's key, with bytes that are no letters escaped.
    pub key: String,
    /// What is wrong.
    #[source]
    pub error: LeaseError,
}

/// What [`BinderSource::recover`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Intents that are bound now.
    pub bound: usize,
    /// Attachments whose release was finished.
    pub released: usize,
    /// Tokens that no record named, which are released now.
    pub remnants: usize,
}

/// Why the outside did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// It has no address left. Nothing is bound.
    #[error("{outside} has no address left for {token}")]
    Exhausted {
        /// The outside.
        outside: String,
        /// For whom.
        token: BindToken,
    },
    /// Another has the address. Nothing is bound.
    #[error("{outside}: {address} is bound for {holder}")]
    Held {
        /// The outside.
        outside: String,
        /// The address.
        address: IpAddr,
        /// Who has it.
        holder: BindToken,
    },
    /// What was bound is bound no more.
    #[error("{outside} gave {address} to somebody else, or forgot that {token} had it")]
    Lost {
        /// The outside.
        outside: String,
        /// The address.
        address: IpAddr,
        /// Whose it was.
        token: BindToken,
    },
    /// Nobody answered. Something may be bound if `certain` does not say otherwise.
    #[error("{outside} did not answer within {waited:?}, asked {asked} times: {advice}")]
    NoAnswer {
        /// The outside.
        outside: String,
        /// How long the answer was waited for.
        waited: Duration,
        /// How many times it was asked.
        asked: u32,
        /// Whether nothing can be bound by it.
        certain: bool,
        /// What to look at.
        advice: &'static str,
    },
    /// It refused, and will again. Nothing is bound.
    #[error("{outside} refused: {reason}")]
    Refused {
        /// The outside.
        outside: String,
        /// Why, and what would be accepted.
        reason: String,
    },
    /// The way to it is out of order. Something may be bound.
    #[error("{outside}: {doing}: {source}")]
    Failed {
        /// The outside.
        outside: String,
        /// What was being done.
        doing: &'static str,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BindError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Exhausted { .. } | Self::NoAnswer { .. } | Self::Failed { .. } | Self::Held { .. } => true,
            Self::Lost { .. } | Self::Refused { .. } => false,
        }
    }

    /// Whether nothing is bound by the call that failed.
    pub fn is_certain(&self) -> bool {
        match self {
            Self::NoAnswer { certain, .. } => *certain,
            Self::Exhausted { .. } | Self::Held { .. } | Self::Lost { .. } | Self::Refused { .. } => true,
            Self::Failed { .. } => false,
        }
    }
}

impl From<BindError> for LeaseError {
    fn from(error: BindError) -> Self {
        Self::Outside { retryable: error.is_retryable(), source: Box::new(error) }
    }
}
