//! The tables from addresses to classes, from the side that writes them.
//!
//! [`Classes`] holds what the maps hold and answers every change with the stores that bring the maps there. Programs
//! read all the while: each store leaves every address at its old or its new class, never at another one, if the stores
//! are made one after the other and each element's store is seen as a whole. An element of 8 bytes is; of a larger one
//! only the last 4 bytes ever change while a program may look at it.
//!
//! Blocks and places that are freed are not given out again until [`Classes::settled`].

mod v4;
mod v6;

use ipnet::IpNet;

use self::v4::TrieV4;
use self::v6::TableV6;
use crate::abi::{self, CHILD, ClassId, MemberV6, NodeV6, Sizes};

/// Both families' tables.
#[derive(Debug)]
pub struct Classes {
    v4: TrieV4,
    v6: TableV6,
}

/// One store to a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Write {
    /// To [`abi::CLASS_V4`].
    ClassV4 {
        /// The element.
        index: u32,
        /// Its two entries.
        pair: [u32; 2],
    },
    /// To [`abi::CLASS_V6`].
    ClassV6 {
        /// The element.
        index: u32,
        /// Its two entries.
        pair: [u32; 2],
    },
    /// To [`abi::NODES_V6`].
    NodeV6 {
        /// The element.
        index: u32,
        /// What it becomes.
        node: NodeV6,
    },
    /// To [`abi::MEMBERS_V6`].
    MemberV6 {
        /// The element.
        index: u32,
        /// What it becomes.
        member: MemberV6,
    },
}

impl Write {
    /// Name of the map.
    pub const fn map(&self) -> &'static str {
        match self {
            Self::ClassV4 { .. } => abi::CLASS_V4,
            Self::ClassV6 { .. } => abi::CLASS_V6,
            Self::NodeV6 { .. } => abi::NODES_V6,
            Self::MemberV6 { .. } => abi::MEMBERS_V6,
        }
    }

    /// The element.
    pub const fn index(&self) -> u32 {
        match *self {
            Self::ClassV4 { index, .. }
            | Self::ClassV6 { index, .. }
            | Self::NodeV6 { index, .. }
            | Self::MemberV6 { index, .. } => index,
        }
    }

    /// Its bytes.
    pub fn value(&self) -> Vec<u8> {
        match self {
            Self::ClassV4 { pair, .. } | Self::ClassV6 { pair, .. } => pair.map(u32::to_ne_bytes).concat(),
            Self::NodeV6 { node, .. } => node.encode().to_vec(),
            Self::MemberV6 { member, .. } => member.encode().to_vec(),
        }
    }
}

/// Why a change was refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClassError {
    /// Too few blocks are free.
    #[error("map {map} has no room: {needed} blocks are needed and {free} are free; settle, or make it larger")]
    Full {
        /// The map.
        map: &'static str,
        /// Blocks that the change needs.
        needed: usize,
        /// Blocks that are free; those not settled yet are not.
        free: usize,
    },
    /// A class that an entry has no room for.
    #[error("class {class} of {prefix}: at most 2,147,483,647")]
    Class {
        /// Whose class it would be.
        prefix: IpNet,
        /// The class.
        class: ClassId,
    },
}

impl Classes {
    /// Empty tables, as maps are when they are made: every address is of class 0.
    pub fn new(sizes: &Sizes) -> Self {
        Self { v4: TrieV4::new(sizes.blocks_v4), v6: TableV6::new(sizes.members_v6, sizes.blocks_v6) }
    }

    /// Gives a prefix or a single address a class, or another one. Bits of the address beyond the prefix do not count.
    ///
    /// # Errors
    /// [`ClassError`].
    pub fn insert(&mut self, prefix: IpNet, class: ClassId) -> Result<Vec<Write>, ClassError> {
        self.apply(&[(prefix, Some(class))])
    }

    /// Takes a prefix out; what it covered falls to the next longer one. `Ok` also where it was not there.
    ///
    /// # Errors
    /// [`ClassError::Full`], as IPv6 blocks are replaced by new ones.
    pub fn remove(&mut self, prefix: IpNet) -> Result<Vec<Write>, ClassError> {
        self.apply(&[(prefix, None)])
    }

    /// Makes many changes, all or none: a class, or `None` to take the prefix out.
    ///
    /// A change costs time by the entries that it touches; for IPv6 prefixes (single addresses apart) a call costs time
    /// by all of them, but writes only blocks that differ.
    ///
    /// # Errors
    /// [`ClassError`].
    pub fn apply(&mut self, changes: &[(IpNet, Option<ClassId>)]) -> Result<Vec<Write>, ClassError> {
        let Split { v4, v6 } = split(changes)?;
        self.v4.check(&v4)?;
        let mut writes = Vec::new();
        self.v6.apply(&v6, &mut writes)?;
        for (address, length, class) in v4 {
            match class {
                Some(class) => self.v4.insert(address, length, class, &mut writes),
                None => self.v4.remove(address, length, &mut writes),
            }
        }
        Ok(writes)
    }

    /// Whether [`Classes::apply`] would make these changes, without making them.
    ///
    /// # Errors
    /// As [`Classes::apply`].
    pub fn check(&self, changes: &[(IpNet, Option<ClassId>)]) -> Result<(), ClassError> {
        let Split { v4, v6 } = split(changes)?;
        self.v4.check(&v4)?;
        if v6.is_empty() { Ok(()) } else { self.v6.clone().apply(&v6, &mut Vec::new()) }
    }

    /// Frees for reuse what earlier changes have left behind.
    ///
    /// To be called when all stores handed out so far are made, and every program that ran before the last one has ended:
    /// see [`wait_for_running`](crate::program::wait_for_running).
    pub fn settled(&mut self) {
        self.v4.settled();
        self.v6.settled();
    }
}

/// Changes by family: address, prefix length, class.
#[derive(Default)]
struct Split {
    v4: Vec<(u32, u8, Option<ClassId>)>,
    v6: Vec<(u128, u8, Option<ClassId>)>,
}

fn split(changes: &[(IpNet, Option<ClassId>)]) -> Result<Split, ClassError> {
    let mut split = Split::default();
    for &(prefix, class) in changes {
        if let Some(class) = class.filter(|class| class & CHILD != 0) {
            return Err(ClassError::Class { prefix, class });
        }
        match prefix.trunc() {
            IpNet::V4(net) => split.v4.push((u32::from(net.network()), net.prefix_len(), class)),
            IpNet::V6(net) => split.v6.push((u128::from(net.network()), net.prefix_len(), class)),
        }
    }
    Ok(split)
}

#[cfg(test)]
mod tests;
