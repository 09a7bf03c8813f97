//! Why the plan refuses.

use std::fmt;

use dcenet_core::provider::LeaseError;
use ipnet::IpNet;

use super::model::{Level, Purpose};
use crate::model::AddressSpace;
use crate::store::StoreError;

/// Who has a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The address space.
    pub space: AddressSpace,
    /// The prefix that is held.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// The names from the top to it, as `corp/eu/prod-1`.
    pub path: String,
    /// Its owner.
    pub owner: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { space, cidr, level, path, owner } = self;
        write!(f, "{level} {path} ({cidr}) of {owner} in space {space}")
    }
}

/// A refusal, or a failure of the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A field of the request is wrong.
    #[error("{field}: {value:?} {reason}")]
    Invalid {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What is wrong, and the remedy.
        reason: String,
    },
    /// Another prefix has addresses of this one.
    #[error("{cidr} overlaps {holder}; take another prefix, or ask that owner to give it back")]
    Overlap {
        /// What was asked for.
        cidr: IpNet,
        /// Who has it.
        holder: Box<Holder>,
    },
    /// Nothing that is owned here contains the prefix.
    #[error("{cidr} lies in no prefix that {authority} owns in space {space}; have it delegated to {authority} first")]
    Outside {
        /// What was asked for.
        cidr: IpNet,
        /// The space.
        space: AddressSpace,
        /// Who was asked.
        authority: String,
    },
    /// The prefix was not claimed yet.
    #[error("{cidr} lies in {parent} and was not claimed; claim the pool {name:?} first")]
    Unclaimed {
        /// What was asked for.
        cidr: IpNet,
        /// What it lies in.
        parent: Box<Holder>,
        /// The name under which it was looked for.
        name: String,
    },
    /// No free block is large enough.
    #[error(
        "{parent} has no free /{length}{}; ask for renumbering advice, or for another prefix",
        largest.map(|l| format!(", the largest free block is a /{l}")).unwrap_or_else(|| ", it is full".to_owned())
    )]
    Exhausted {
        /// Where it was looked for.
        parent: Box<Holder>,
        /// The prefix length asked for.
        length: u8,
        /// The length of the largest free block.
        largest: Option<u8>,
    },
    /// No such prefix is known here.
    #[error("there is no prefix {cidr} in space {space}{}", level.map(|l| format!(" at level {l}")).unwrap_or_default())]
    Unknown {
        /// The prefix.
        cidr: IpNet,
        /// The level, where it was given.
        level: Option<Level>,
        /// The space.
        space: AddressSpace,
    },
    /// A prefix with others in it cannot be given away.
    #[error("{holder} still holds {count} prefixes, the first of them {first}; return those first")]
    NotEmpty {
        /// The prefix.
        holder: Box<Holder>,
        /// The first that it holds.
        first: Box<Holder>,
        /// How many it holds directly.
        count: usize,
    },
    /// The prefix is in its owner's hands.
    #[error("{holder} is delegated: only its owner claims in it and gives it back")]
    Delegated {
        /// The prefix.
        holder: Box<Holder>,
    },
    /// The prefix is being given back, or was lost.
    #[error("{holder} is being given back or is lost to its parent: nothing new is claimed in it; use another prefix")]
    Closing {
        /// The prefix.
        holder: Box<Holder>,
    },
    /// The prefix was not delegated, or is not asked back, as the call needs it.
    #[error("{holder} {reason}")]
    State {
        /// The prefix.
        holder: Box<Holder>,
        /// What it would have to be.
        reason: &'static str,
    },
    /// The request is about an earlier time: the prefix was given back, and perhaps away, since.
    #[error("{cidr}: epoch {presented} is over, {current} is current; fetch the prefix again")]
    Stale {
        /// The prefix.
        cidr: IpNet,
        /// The epoch of the request.
        presented: u64,
        /// The epoch of the record.
        current: u64,
    },
    /// A claim's purpose must be that of the prefix around it, unless that serves any.
    #[error("{purpose} cannot be claimed in {holder}, which is for {wanted} only; claim it in another prefix")]
    Purpose {
        /// The purpose asked for.
        purpose: Purpose,
        /// The prefix around it.
        holder: Box<Holder>,
        /// Its purpose.
        wanted: Purpose,
    },
    /// A sibling has the name.
    #[error("name: {name:?} is taken by {holder}; choose another name")]
    Name {
        /// The name.
        name: String,
        /// Who has it.
        holder: Box<Holder>,
    },
    /// The document is for somebody else.
    #[error("the document is for {owner}, and this is {authority}")]
    Misdirected {
        /// For whom it is.
        owner: String,
        /// Who was given it.
        authority: String,
    },
    /// The parent's store is older than what it once granted: it was restored from a copy.
    #[error(
        "{cidr} was delegated at epoch {granted}, and space {space} is at {current}: this store was restored from an \
         older copy; restore a newer one, or enter what was delegated since by an import before anything is claimed"
    )]
    Behind {
        /// The prefix that the other side holds.
        cidr: IpNet,
        /// Its epoch.
        granted: u64,
        /// The epoch of this store.
        current: u64,
        /// The space.
        space: AddressSpace,
    },
    /// A change is larger than the store takes at once.
    #[error("the change has {size} writes, and the store takes {limit} at once; split it by space or subtree")]
    TooLarge {
        /// Its guards and writes.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// Others change the plan all the time; the same call may succeed later.
    #[error("the plan is busy: {0} races were lost in a row")]
    Busy(u32),
    /// The store holds what cannot be true; people must look at it.
    #[error("the plan is damaged: {0}")]
    Damaged(String),
    /// The store failed. After an unknown outcome the call may be repeated: it finds what it did.
    #[error("store: {0}")]
    Store(#[from] StoreError),
    /// It is not known whether the change was made. The call may be repeated: it finds what it did.
    #[error("store: {0}; repeat the call")]
    OutcomeUnknown(String),
}

impl PlanError {
    /// Whether the same call may succeed later without anybody changing the plan.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy(_) | Self::OutcomeUnknown(_) => true,
            Self::Store(error) => !matches!(error, StoreError::Corrupt { .. } | StoreError::Misuse(_)),
            _ => false,
        }
    }

    /// Who stands in the way, where somebody does.
    pub fn holder(&self) -> Option<&Holder> {
        match self {
            Self::Overlap { holder, .. }
            | Self::NotEmpty { holder, .. }
            | Self::Delegated { holder }
            | Self::Closing { holder }
            | Self::State { holder, .. }
            | Self::Purpose { holder, .. }
            | Self::Name { holder, .. } => Some(holder),
            Self::Exhausted { parent, .. } | Self::Unclaimed { parent, .. } => Some(parent),
            _ => None,
        }
    }
}

/// For those who check pools before they lease from them.
impl From<PlanError> for LeaseError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Damaged(_) | PlanError::Store(StoreError::Corrupt { .. }) => Self::Damaged(Box::new(error)),
            PlanError::Store(_) | PlanError::OutcomeUnknown(_) => Self::Store(Box::new(error)),
            PlanError::Busy(_) => Self::Busy(error.to_string()),
            _ => Self::Invalid { field: "ipam.pools".to_owned(), reason: error.to_string() },
        }
    }
}
