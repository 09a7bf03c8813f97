//! What is planned: prefixes, who owns them and for what, and the documents that pass between authorities.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::AddressSpace;

/// How far down the fleet a prefix belongs. A prefix lies only in prefixes of lower levels; levels may be skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All there is.
    Fleet,
    /// A region: a site, a data centre, a business.
    Region,
    /// A cluster.
    Cluster,
    /// A pool, from which addresses are leased. Nothing is claimed in it.
    Pool,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fleet => "fleet",
            Self::Region => "region",
            Self::Cluster => "cluster",
            Self::Pool => "pool",
        })
    }
}

/// What a prefix is for. Other words are refused, for a purpose decides what may overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Whatever is claimed in it.
    #[default]
    Any,
    /// Nodes, and workloads on the network of the nodes.
    Underlay,
    /// Pods on an overlay.
    Pod,
    /// Virtual addresses of services.
    Service,
    /// Addresses under which other clusters see remapped workloads.
    Mesh,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Any => "any",
            Self::Underlay => "underlay",
            Self::Pod => "pod",
            Self::Service => "service",
            Self::Mesh => "mesh",
        })
    }
}

/// Where a claimed prefix stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Claimed, and in the hands of this authority.
    Held,
    /// In the hands of its owner, who claims in it elsewhere.
    Delegated,
    /// Delegated and asked back. It stays the owner's until the owner consents.
    Revoking,
    /// Granted to this authority and asked back: nothing new is claimed in it, and it goes back once it is empty.
    Draining,
    /// Granted to this authority once, but the parent no longer knows it: others may have it. Nothing new is claimed in
    /// it, and what is in it must be renumbered now.
    Lost,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Held => "held",
            Self::Delegated => "delegated",
            Self::Revoking => "revoking",
            Self::Draining => "draining",
            Self::Lost => "LOST",
        })
    }
}

/// A prefix that was claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    /// The routing domain.
    #[serde(with = "space_text")]
    pub space: AddressSpace,
    /// The prefix.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// Its name, unique among its siblings of the family.
    pub name: String,
    /// Who owns it.
    pub owner: String,
    /// What it is for.
    pub purpose: Purpose,
    /// The names from the top to it, as `corp/eu/prod-1`.
    pub path: String,
    /// When it was claimed, counted in changes of its space: never used twice. Whoever gives it back presents it.
    pub epoch: u64,
    /// Where it stands.
    pub state: State,
}

/// Where a claim is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This prefix and no other.
    At(IpNet),
    /// A free prefix of a length, in a claimed prefix: the lowest in the smallest free block that has room.
    In {
        /// The claimed prefix.
        parent: IpNet,
        /// The prefix length.
        length: u8,
    },
}

/// A wish for a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The routing domain.
    pub space: AddressSpace,
    /// The level.
    pub level: Level,
    /// The name: 1 to 63 letters, digits, `-`, `_` and `.`. A repeated claim of the name gets the same prefix.
    pub name: String,
    /// The owner, in the same letters: a cluster's or region's name, a team.
    pub owner: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Where.
    pub place: Place,
}

impl Claim {
    /// A claim of one prefix, in the default space, for any purpose.
    pub fn at(cidr: IpNet, level: Level, name: &str, owner: &str) -> Self {
        Self::new(Place::At(cidr), level, name, owner)
    }

    /// A claim of a free prefix of a length in a claimed prefix, in the default space, for any purpose.
    pub fn within(parent: IpNet, length: u8, level: Level, name: &str, owner: &str) -> Self {
        Self::new(Place::In { parent, length }, level, name, owner)
    }

    fn new(place: Place, level: Level, name: &str, owner: &str) -> Self {
        let (name, owner) = (name.to_owned(), owner.to_owned());
        Self { space: AddressSpace::default(), level, name, owner, purpose: Purpose::Any, place }
    }

    /// For a purpose.
    #[must_use]
    pub fn purpose(self, purpose: Purpose) -> Self {
        Self { purpose, ..self }
    }

    /// In a space.
    #[must_use]
    pub fn space(self, space: AddressSpace) -> Self {
        Self { space, ..self }
    }
}

/// Makes a prefix its owner's. A document: the parent writes it, and the owner's authority accepts it, whenever it comes
/// and however often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The routing domain.
    #[serde(with = "space_text")]
    pub space: AddressSpace,
    /// Purposes of the space that overlap nothing in other spaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unique: Vec<Purpose>,
    /// The prefix.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// Who owns it from now on.
    pub owner: String,
    /// What it is for.
    pub purpose: Purpose,
    /// The names from the top to it.
    pub path: String,
    /// Who granted it.
    pub from: String,
    /// When, in the parent's epochs. The delegation ends with it: a later one of the same prefix has a higher.
    pub epoch: u64,
}

/// Asks a delegated prefix back. A document from the parent to the owner's authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    /// The routing domain.
    #[serde(with = "space_text")]
    pub space: AddressSpace,
    /// The prefix.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// Whose it is.
    pub owner: String,
    /// Of which grant.
    pub epoch: u64,
}

/// The owner's consent: it holds nothing in the prefix, and will accept no grant of it up to this epoch. A document from
/// the owner's authority to the parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The routing domain.
    #[serde(with = "space_text")]
    pub space: AddressSpace,
    /// The prefix.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// Whose it was.
    pub owner: String,
    /// Of which grant.
    pub epoch: u64,
}

/// What an authority was granted and still holds. A document from the owner's authority to the parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// Whose it is.
    pub owner: String,
    /// What it holds.
    pub holdings: Vec<Holding>,
}

/// A grant that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holding {
    /// The routing domain.
    #[serde(with = "space_text")]
    pub space: AddressSpace,
    /// The prefix.
    pub cidr: IpNet,
    /// Its level.
    pub level: Level,
    /// Of which grant.
    pub epoch: u64,
}

/// The parent's answer to a [`Statement`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orders {
    /// Granted, and not in the statement.
    pub grants: Vec<Grant>,
    /// Asked back.
    pub revocations: Vec<Revocation>,
    /// In the statement, and no longer the owner's.
    pub lost: Vec<Revocation>,
}

/// How full a prefix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Utilisation {
    /// Its addresses, `u128::MAX` for all 2^128.
    pub size: u128,
    /// Addresses in prefixes that were claimed in it, and IPv4-mapped ones, which cannot be.
    pub used: u128,
    /// Prefixes that were claimed directly in it.
    pub children: usize,
    /// The fewest blocks that what is free makes; more than one is fragmentation, or an odd share.
    pub free_blocks: usize,
    /// The prefix length of the largest free block.
    pub largest_free: Option<u8>,
}

impl Utilisation {
    /// The used part, 0 to 100.
    pub fn percent(&self) -> f64 {
        self.used as f64 / self.size as f64 * 100.0
    }
}

/// A space by its name, which is refused if it is none.
pub(crate) mod space_text {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::model::AddressSpace;

    pub(crate) fn serialize<S: Serializer>(space: &AddressSpace, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(space)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AddressSpace, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
