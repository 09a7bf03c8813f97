//! What would become of an inventory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, ContainerId, IfName, NetworkName, Workload};
use dcenet_core::provider::LeaseError;
use serde::{Deserialize, Serialize};

use super::apply::{CHUNK, Verdict};
use super::{Entry, Inventory, Origin, Owner, PassedOver, Unreadable};
use crate::Ipam;
use crate::machine::{AdoptedAddress, AdoptedBy, Adoptee};
use crate::model::{Addr, AddressSpace, ClaimKey, KeepPolicy, NodeName};

/// What a source does not tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The name of the network configuration under which DEL and ADD will name the containers.
    pub network: NetworkName,
    /// The routing domain, `default` unless told.
    pub space: AddressSpace,
    /// The interface of containers whose source does not tell it, `eth0` unless told.
    pub ifname: IfName,
    /// The node of what has none in the source: that of host-local's directory.
    pub node: Option<NodeName>,
    /// The containers of pods, as the runtime knows them, for sources that know pods only.
    pub containers: BTreeMap<Workload, ContainerId>,
    /// What becomes of addresses of workloads without a known container: kept for as long as the workload exists unless
    /// told. [`KeepPolicy::Ephemeral`] would keep nothing and is refused.
    pub keep: KeepPolicy,
}

impl Options {
    /// The usual ones.
    pub fn new(network: NetworkName) -> Self {
        Self {
            network,
            space: AddressSpace::default(),
            ifname: "eth0".parse().expect("eth0 is an interface name"),
            node: None,
            containers: BTreeMap::new(),
            keep: KeepPolicy::Workload,
        }
    }
}

/// What adopting an inventory would do. It can be written down, looked over by people, and carried out by
/// [`Ipam::adopt`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What is taken over.
    pub adoptees: Vec<Adoptee>,
    /// What is so already.
    pub present: Vec<Adoptee>,
    /// Addresses that no workload has and that are reserved.
    pub outside: Vec<Outside>,
    /// What is not taken over.
    pub refused: Vec<Refusal>,
    /// Where the addresses of `adoptees` and `present` are written.
    pub origins: BTreeMap<IpAddr, Origin>,
    /// What the source holds beside.
    pub passed_over: Vec<PassedOver>,
    /// The revision of the store that it was compared with.
    pub revision: u64,
}

/// An address that something outside of all workloads needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outside {
    /// The routing domain.
    pub space: AddressSpace,
    /// The address.
    pub address: IpAddr,
    /// For people.
    pub holder: String,
    /// Where that is written.
    pub origin: Origin,
}

/// An entry that is not taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Where it is written. Whoever does without the entry names this to [`Ipam::adopt`].
    pub origin: Origin,
    /// The address, where it is clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Whose it is, for people; empty where that is not clear.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub owner: String,
    /// Why.
    pub why: Why,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.origin)?;
        if let Some(address) = self.address {
            write!(f, "{address}")?;
            if !self.owner.is_empty() {
                write!(f, " of {}", self.owner)?;
            }
            f.write_str(" ")?;
        }
        self.why.fmt(f)
    }
}

/// Why an entry is not taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
#[non_exhaustive]
pub enum Why {
    /// A pool that delegates prefixes has the address.
    #[error("is in pool {pool}, which delegates prefixes; adopt it into a pool that does not")]
    Delegates {
        /// The pool.
        pool: String,
    },
    /// Somebody has it here.
    #[error("is held by {holder}")]
    Held {
        /// Who.
        holder: String,
    },
    /// The pool has the address in its subnet and does not hand it out: it is excluded, out of the ranges, reserved, the
    /// gateway, or one that no host may have.
    #[error("is not handed out by pool {pool}: {what}; change the pool, or give the workload another address first")]
    NotHandedOut {
        /// The pool.
        pool: String,
        /// What it is there.
        what: String,
    },
    /// No pool of the configuration has the address in its subnet.
    #[error("is in no pool of space {space}; add one")]
    NoPool {
        /// The space.
        space: AddressSpace,
    },
    /// Two addresses of a family for a claim that keeps one.
    #[error("would be kept by claim {claim}, which would keep {other} as well; tell the interface or the container")]
    TwoOfClaim {
        /// The claim.
        claim: ClaimKey,
        /// The other address.
        other: IpAddr,
    },
    /// A lease has at most one address of a pool.
    #[error("is a second address of pool {pool} for {attachment}, which has {other}; split the pool")]
    TwoOfPool {
        /// The attachment.
        attachment: String,
        /// The pool.
        pool: String,
        /// The other address.
        other: IpAddr,
    },
    /// The source gives the address to two.
    #[error("belongs to {other} as well; find out who uses it, and remove the other entry")]
    TwoOwners {
        /// The other, and where that is written.
        other: String,
    },
    /// The source says of one container that it is of two workloads.
    #[error("would be of {attachment}, which is of {first} and of {second} in the source; remove the stale entry")]
    TwoWorkloads {
        /// The attachment.
        attachment: String,
        /// A workload.
        first: String,
        /// Another.
        second: String,
    },
    /// The entry makes no sense.
    #[error("{reason}")]
    Unreadable {
        /// The value, what is wrong with it, and what to do.
        reason: String,
    },
    /// Refused by the allocator for another reason.
    #[error("is refused: {reason}")]
    Unsuitable {
        /// The reason.
        reason: String,
    },
}

/// Where an address of an adoptee came from, for refusals.
type Sources = BTreeMap<Addr, (Origin, String)>;

/// Whom an entry is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Owned {
    Attachment(AttachmentKey),
    Claim(ClaimKey),
}

/// One owner's part of the inventory.
#[derive(Default)]
struct Share {
    workload: Option<Workload>,
    node: Option<NodeName>,
    addresses: Vec<AdoptedAddress>,
}

struct Planner<'a> {
    ipam: &'a Ipam,
    options: &'a Options,
    plan: Plan,
    sources: Sources,
}

impl Ipam {
    /// Tells what adopting the inventory would do. Writes nothing, neither here nor there.
    ///
    /// # Errors
    /// The store failed, or the configuration's pools cannot be registered in it.
    pub async fn plan_adoption(&self, inventory: &Inventory, options: &Options) -> Result<Plan, LeaseError> {
        if options.keep == KeepPolicy::Ephemeral {
            let reason = "ephemeral keeps nothing for a workload without a known container; use workload".to_owned();
            return Err(LeaseError::Invalid { field: "keep".to_owned(), reason });
        }
        let plan = Plan {
            adoptees: Vec::new(),
            present: Vec::new(),
            outside: Vec::new(),
            refused: inventory.unreadable.iter().map(unreadable).collect(),
            origins: BTreeMap::new(),
            passed_over: inventory.passed_over.clone(),
            revision: self.revision().await?,
        };
        let mut planner = Planner { ipam: self, options, plan, sources: Sources::new() };
        let shares = planner.share_out(inventory);
        let adoptees = planner.adoptees(shares);
        planner.compare(adoptees).await?;
        planner.look_outside().await?;
        let Planner { mut plan, sources, .. } = planner;
        plan.refused.sort_by(|a, b| a.origin.cmp(&b.origin));
        let taken = plan.adoptees.iter().chain(&plan.present).flat_map(|a| &a.addresses);
        let origin = |a: &AdoptedAddress| Some((a.address, sources.get(&Addr::from(a.address))?.0.clone()));
        plan.origins = taken.filter_map(origin).collect();
        Ok(plan)
    }
}

fn unreadable(unreadable: &Unreadable) -> Refusal {
    let Unreadable { origin, address, reason } = unreadable.clone();
    Refusal { origin, address, owner: String::new(), why: Why::Unreadable { reason } }
}

impl Planner<'_> {
    fn refuse(&mut self, entry: &Entry, why: Why) {
        let (origin, address, owner) = (entry.origin.clone(), Some(entry.address), entry.owner.to_string());
        self.plan.refused.push(Refusal { origin, address, owner, why });
    }

    fn refuse_address(&mut self, address: IpAddr, why: Why) {
        if let Some((origin, owner)) = self.sources.get(&Addr::from(address)).cloned() {
            self.plan.refused.push(Refusal { origin, address: Some(address), owner, why });
        }
    }

    /// Sorts the entries by owner, each address once.
    fn share_out(&mut self, inventory: &Inventory) -> BTreeMap<Owned, Share> {
        let mut by_address: BTreeMap<Addr, Vec<&Entry>> = BTreeMap::new();
        for entry in &inventory.entries {
            by_address.entry(Addr::from(entry.address)).or_default().push(entry);
        }
        let mut shares: BTreeMap<Owned, Share> = BTreeMap::new();
        for (address, entries) in by_address {
            let mut owner = entries[0].owner.clone();
            let stranger = entries[1..].iter().find(|entry| match merge(&owner, &entry.owner) {
                Some(merged) => {
                    owner = merged;
                    false
                }
                None => true,
            });
            if let Some(stranger) = stranger {
                for entry in &entries {
                    let other = if entry.origin == stranger.origin { entries[0] } else { stranger };
                    self.refuse(entry, Why::TwoOwners { other: format!("{} ({})", other.owner, other.origin) });
                }
                continue;
            }
            let entry = Entry { owner, ..entries[0].clone() };
            self.share(&mut shares, address, &entry);
        }
        shares
    }

    fn share(&mut self, shares: &mut BTreeMap<Owned, Share>, address: Addr, entry: &Entry) {
        let (owned, workload, node) = match &entry.owner {
            Owner::Outside { holder } => {
                let (space, holder) = (self.options.space.clone(), holder.clone());
                self.plan.outside.push(Outside { space, address: address.ip(), holder, origin: entry.origin.clone() });
                return;
            }
            Owner::Container { container, ifname, workload, node } => {
                (self.attachment(container, ifname), workload.clone(), node)
            }
            Owner::Workload { workload, ifname, node, .. } => match self.options.containers.get(workload) {
                Some(container) => (self.attachment(container, ifname), Some(workload.clone()), node),
                None => {
                    let claim = ClaimKey { ifname: ifname.clone(), ..ClaimKey::new(workload.clone()) };
                    (Owned::Claim(claim), Some(workload.clone()), node)
                }
            },
        };
        let pool = match self.pool(address) {
            Ok(pool) => pool,
            Err(why) => return self.refuse(entry, why),
        };
        let share = shares.entry(owned.clone()).or_default();
        let same_family = |a: &&AdoptedAddress| Addr::from(a.address).family == address.family;
        let clash = match &owned {
            Owned::Attachment(attachment) => match (&share.workload, &workload) {
                (Some(first), Some(second)) if first != second => Some(Why::TwoWorkloads {
                    attachment: attachment.to_string(),
                    first: first.to_string(),
                    second: second.to_string(),
                }),
                _ => share.addresses.iter().find(|a| a.pool == pool).map(|other| Why::TwoOfPool {
                    attachment: attachment.to_string(),
                    pool: pool.clone(),
                    other: other.address,
                }),
            },
            Owned::Claim(claim) => share
                .addresses
                .iter()
                .find(same_family)
                .map(|other| Why::TwoOfClaim { claim: claim.clone(), other: other.address }),
        };
        if let Some(why) = clash {
            return self.refuse(entry, why);
        }
        share.workload = share.workload.take().or(workload);
        share.node = share.node.take().or_else(|| node.clone());
        share.addresses.push(AdoptedAddress { address: address.ip(), pool });
        self.sources.insert(address, (entry.origin.clone(), entry.owner.to_string()));
    }

    fn attachment(&self, container: &ContainerId, ifname: &Option<IfName>) -> Owned {
        Owned::Attachment(AttachmentKey {
            network: self.options.network.clone(),
            container: container.clone(),
            ifname: ifname.clone().unwrap_or_else(|| self.options.ifname.clone()),
        })
    }

    /// The pool that an address is to be in.
    fn pool(&self, address: Addr) -> Result<String, Why> {
        let (layout, space) = (self.ipam.layout(), &self.options.space);
        let found = layout.pools.iter().find(|p| p.space == *space && p.subnet.contains(&address.ip()));
        let Some(pool) = found else { return Err(Why::NoPool { space: space.clone() }) };
        let name = pool.name.clone();
        if pool.delegate.is_some() {
            return Err(Why::Delegates { pool: name });
        }
        if let Some(reserved) = layout.reservation(space, address) {
            return Err(Why::Held { holder: format!("reservation {}", reserved.holder) });
        }
        if !pool.has(address) {
            let what = if pool.gateway == Some(address.ip()) {
                "the gateway"
            } else if address.ip() == pool.subnet.network() {
                "the network's own address"
            } else if address.ip() == pool.subnet.broadcast() && address.ip().is_ipv4() {
                "the broadcast address"
            } else {
                "excluded, or in none of its ranges"
            };
            return Err(Why::NotHandedOut { pool: name, what: what.to_owned() });
        }
        Ok(name)
    }

    fn adoptees(&self, shares: BTreeMap<Owned, Share>) -> Vec<Adoptee> {
        let mut adoptees = Vec::with_capacity(shares.len());
        let (space, fence) = (&self.options.space, self.plan.revision);
        for (owned, Share { workload, node, addresses }) in shares {
            match owned {
                Owned::Attachment(attachment) => {
                    let node = node.or_else(|| self.options.node.clone());
                    let by = AdoptedBy::Attachment { attachment, workload, node };
                    adoptees.push(Adoptee { by, space: space.clone(), addresses, fence });
                }
                Owned::Claim(claim) => adoptees.extend(addresses.into_iter().map(|address| {
                    let by = AdoptedBy::Claim { claim: claim.clone(), keep: self.options.keep };
                    Adoptee { by, space: space.clone(), addresses: vec![address], fence }
                })),
            }
        }
        adoptees
    }

    /// Has the allocator decide about everybody, without a commit.
    async fn compare(&mut self, adoptees: Vec<Adoptee>) -> Result<(), LeaseError> {
        self.ipam.can_register().await?;
        let mut left: Vec<Adoptee> = adoptees.into_iter().filter(|a| !a.addresses.is_empty()).collect();
        while !left.is_empty() {
            let mut again = Vec::new();
            for chunk in left.chunks(CHUNK) {
                let verdicts = self.ipam.judge(chunk).await?;
                for (adoptee, verdict) in chunk.iter().zip(verdicts) {
                    match verdict {
                        // The configuration's pools are registered first.
                        Verdict::Commit(_) | Verdict::Unregistered => self.plan.adoptees.push(adoptee.clone()),
                        Verdict::Done => self.plan.present.push(adoptee.clone()),
                        Verdict::Refused(error) => again.extend(self.leave_out(adoptee, error)),
                    }
                }
            }
            left = again;
        }
        Ok(())
    }

    /// Refuses the address that is to blame, or all; returns the rest.
    fn leave_out(&mut self, adoptee: &Adoptee, error: LeaseError) -> Option<Adoptee> {
        let blamed: BTreeSet<IpAddr> = match &error {
            LeaseError::Held { address, .. } if adoptee.addresses.iter().any(|a| a.address == *address) => {
                BTreeSet::from([*address])
            }
            _ => adoptee.addresses.iter().map(|a| a.address).collect(),
        };
        let why = match error {
            LeaseError::Held { holder, .. } => Why::Held { holder },
            error => Why::Unsuitable { reason: error.to_string() },
        };
        for address in &blamed {
            self.refuse_address(*address, why.clone());
        }
        let mut rest = adoptee.clone();
        rest.addresses.retain(|a| !blamed.contains(&a.address));
        (!rest.addresses.is_empty()).then_some(rest)
    }

    /// Refuses reservations of what somebody has here, and leaves out those that are there.
    async fn look_outside(&mut self) -> Result<(), LeaseError> {
        let all = std::mem::take(&mut self.plan.outside);
        for (outside, user) in all.iter().zip(self.ipam.users_outside(&all).await?) {
            match user {
                None => self.plan.outside.push(outside.clone()),
                Some(holder) if holder == outside.holder => {}
                Some(holder) => {
                    let Outside { address, holder: owner, origin, .. } = outside.clone();
                    self.plan.refused.push(Refusal {
                        origin,
                        address: Some(address),
                        owner,
                        why: Why::Held { holder },
                    });
                }
            }
        }
        Ok(())
    }
}

/// The owner whom two records of the source mean, if they mean one.
fn merge(a: &Owner, b: &Owner) -> Option<Owner> {
    fn agree<T: Clone + PartialEq>(a: &Option<T>, b: &Option<T>) -> Option<Option<T>> {
        match (a, b) {
            (Some(a), Some(b)) => (a == b).then(|| Some(a.clone())),
            (a, b) => Some(a.clone().or_else(|| b.clone())),
        }
    }
    match (a, b) {
        (
            Owner::Container { container, ifname, workload, node },
            Owner::Container { container: other, ifname: ifname2, workload: workload2, node: node2 },
        ) if container == other => Some(Owner::Container {
            container: container.clone(),
            ifname: agree(ifname, ifname2)?,
            workload: agree(workload, workload2)?,
            node: agree(node, node2)?,
        }),
        (
            Owner::Workload { workload, ifname, uid, node },
            Owner::Workload { workload: other, ifname: ifname2, uid: uid2, node: node2 },
        ) if workload == other => Some(Owner::Workload {
            workload: workload.clone(),
            ifname: agree(ifname, ifname2)?,
            uid: agree(uid, uid2)?,
            node: agree(node, node2)?,
        }),
        (Owner::Workload { .. }, Owner::Container { .. }) => merge(b, a),
        // One record of the source may leave the container out.
        (
            Owner::Container { container, ifname, workload: Some(workload), node },
            Owner::Workload { workload: other, ifname: ifname2, node: node2, .. },
        ) if workload == other => Some(Owner::Container {
            container: container.clone(),
            ifname: agree(ifname, ifname2)?,
            workload: Some(workload.clone()),
            node: agree(node, node2)?,
        }),
        (Owner::Outside { holder }, Owner::Outside { holder: other }) if holder == other => Some(a.clone()),
        _ => None,
    }
}
