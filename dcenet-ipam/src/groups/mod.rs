//! Address groups: which addresses an application has, for firewalls outside and whoever else must follow.
//!
//! A group has a stable name, which no restart or move changes, and holds the addresses and prefixes of one application
//! in one address space. [`Ipam::groups`](crate::Ipam::groups) takes a snapshot; [`GroupFeed`] tells each change after
//! it; [`GroupDirectory`] keeps plain files; [`Groups::nft_transaction`] writes sets of nftables.
//!
//! # What is in a group
//! - What an attachment uses ([`MemberState::Bound`]), from the moment when its lease is durable.
//! - What a claim keeps while nothing is attached ([`MemberState::Kept`]): a database that restarts must not lose its
//!   rules. Claims of the configuration with a fixed address count also before they were ever used.
//! - Of a pool that delegates prefixes, the whole prefix.
//! - With [`Grouping::blocks`], of a pool whose blocks applications own, the blocks instead of the addresses.
//!
//! Not in a group is
//! - a released address of nobody's claim, from its release on, although it cools down for a while before somebody else
//!   may get it: who has let go of an address must not be allowed through any more;
//! - what a claim kept for a time that is over;
//! - an address in quarantine, for a stranger answers for it;
//! - the address of a claim that was handed out to another cluster: it is in that cluster's group.
//!
//! # Form
//! As JSON, with keys in the order of their bytes, so that equal snapshots are equal texts:
//!
//! ```json
//! { "format": "dcenet-groups/1", "space": "default", "revision": 17,
//!   "groups": { "east/shop/db":  { "10.20.0.11/32": "bound", "10.20.0.12/32": "kept" },
//!               "east/shop/web": { "10.20.1.0/24": "bound", "fd00:20::7/128": "bound" } } }
//! ```
//!
//! `revision` is the store's: the snapshot shows every commit up to it. A group without members does not exist.

mod cover;
mod directory;
mod feed;
mod fold;
mod name;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::cover::cover;
pub use self::directory::{ExportError, GroupDirectory, Written};
pub use self::feed::GroupFeed;
pub use self::name::{GroupBy, GroupName, GroupRule, Grouping};
use crate::model::{AddressSpace, Family};

/// Why an address is in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// An attachment uses it.
    Bound,
    /// A claim keeps it while nothing is attached.
    Kept,
}

/// The addresses of one group. Prefixes of different members do not overlap.
pub type Members = BTreeMap<IpNet, MemberState>;

/// All groups of an address space at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    format: Format,
    /// The address space.
    pub space: AddressSpace,
    /// The store's revision: every commit up to it is in here.
    pub revision: u64,
    /// The groups that have a member.
    pub groups: BTreeMap<GroupName, Members>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    #[serde(rename = "dcenet-groups/1")]
    V1,
}

/// What one revision, or the passing of time, did to groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// The store's revision after it. It may be that of the update before: that something was kept for a time that is
    /// over is no commit.
    pub revision: u64,
    /// One for each group that changed, in order of their names. They belong together: an address that goes from one
    /// group to another is removed and added in one update.
    pub changes: Vec<GroupChange>,
}

/// What happened to one group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupChange {
    /// The group.
    pub group: GroupName,
    /// Members that are new, or in another state than before.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub added: Members,
    /// Members that are gone. A group without members is gone itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<IpNet>,
}

/// How a list of addresses is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ListForm {
    /// One prefix for each member, in order.
    #[default]
    Members,
    /// The fewest prefixes that cover the same addresses and no other ([`cover`]).
    Cover,
}

impl Groups {
    /// None yet: whoever follows from here on is told everything.
    pub fn new(space: AddressSpace) -> Self {
        Self { format: Format::V1, space, revision: 0, groups: BTreeMap::new() }
    }

    /// Does what an update tells.
    pub fn apply(&mut self, update: &Update) {
        self.revision = update.revision;
        for GroupChange { group, added, removed } in &update.changes {
            let members = self.groups.entry(group.clone()).or_default();
            for prefix in removed {
                members.remove(prefix);
            }
            members.extend(added.iter().map(|(prefix, state)| (*prefix, *state)));
            if members.is_empty() {
                self.groups.remove(group);
            }
        }
    }

    /// What leads from `self` to `to`; `None` if no group differs.
    pub fn changes_to(&self, to: &Self) -> Option<Update> {
        let none = Members::new();
        let names: std::collections::BTreeSet<_> = self.groups.keys().chain(to.groups.keys()).collect();
        let changes = names.into_iter().filter_map(|group| {
            let old = self.groups.get(group).unwrap_or(&none);
            let new = to.groups.get(group).unwrap_or(&none);
            GroupChange::between(group, old, new)
        });
        let changes: Vec<_> = changes.collect();
        (!changes.is_empty()).then_some(Update { revision: to.revision, changes })
    }

    /// The prefixes of a group; empty if there is none of this name.
    pub fn list(&self, group: &GroupName, form: ListForm) -> Vec<IpNet> {
        let members = self.groups.get(group).into_iter().flat_map(BTreeMap::keys).copied();
        match form {
            ListForm::Members => members.collect(),
            ListForm::Cover => cover(members),
        }
    }

    /// The group as text, a prefix on each line.
    pub fn text(&self, group: &GroupName, form: ListForm) -> String {
        self.list(group, form).iter().map(|prefix| format!("{prefix}\n")).collect()
    }

    /// Commands for `nft -f`, which takes them all or none: they make each group a set of each family that it has in the
    /// table `inet TABLE`, named `v4/GROUP` and `v6/GROUP`, with exactly its addresses. What else is in the table stays.
    /// Sets of `before`, an older snapshot, that have no group any more are emptied and stay, for rules may name them.
    ///
    /// Needs Linux 4.6 or later for interval sets that merge what adjoins.
    pub fn nft_transaction(&self, table: &str, before: Option<&Self>) -> String {
        let mut sets: BTreeMap<(String, Family), Vec<IpNet>> = BTreeMap::new();
        let names =
            before.into_iter().flat_map(|before| &before.groups).map(|(group, members)| (group, members, false));
        for (group, members, now) in names.chain(self.groups.iter().map(|(group, members)| (group, members, true))) {
            let prefixes = cover(members.keys().copied());
            for family in [Family::V4, Family::V6] {
                let of_family: Vec<_> = prefixes.iter().filter(|p| Family::of(p) == family).copied().collect();
                if !of_family.is_empty() {
                    let digit = if family == Family::V4 { '4' } else { '6' };
                    let set = sets.entry((format!("v{digit}/{}", group.short('/')), family)).or_default();
                    *set = if now { of_family } else { Vec::new() };
                }
            }
        }
        let mut text = format!("add table inet {table}\n");
        for ((set, family), prefixes) in sets {
            let kind = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
            let list = prefixes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            // Writing into a String cannot fail.
            let _ = writeln!(text, "add set inet {table} {set} {{ type {kind}; flags interval; }}");
            let _ = writeln!(text, "flush set inet {table} {set}");
            if !list.is_empty() {
                let _ = writeln!(text, "add element inet {table} {set} {{ {list} }}");
            }
        }
        text
    }
}

impl GroupChange {
    /// `None` if nothing differs.
    fn between(group: &GroupName, old: &Members, new: &Members) -> Option<Self> {
        let added: Members = new.iter().filter(|(p, s)| old.get(p) != Some(s)).map(|(p, s)| (*p, *s)).collect();
        let removed: Vec<_> = old.keys().filter(|p| !new.contains_key(p)).copied().collect();
        (!added.is_empty() || !removed.is_empty()).then(|| Self { group: group.clone(), added, removed })
    }
}
