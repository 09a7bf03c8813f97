//! What is known of names, within its bounds.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use dcenet_core::model::AttachmentId;
use ipnet::IpNet;

use super::{LearnError, MOST_ADDRESSES, until};
use crate::model::{Cluster, DomainName, NamePattern, Names, Peer, Peers, Time};

/// What has been learnt, and what of it waits to be carried out, or to be written down.
#[derive(Debug, Default)]
pub(in crate::enforcer) struct Learnt {
    pub(super) names: Names,
    /// Of each pair in `names` that this owner has learnt.
    pub(super) told: BTreeMap<(DomainName, IpAddr), Told>,
    /// The addresses whose names are not what they were when names were last carried out.
    renamed: BTreeSet<IpAddr>,
    /// What is new since then.
    fresh: Vec<(DomainName, IpAddr)>,
    /// Counts changes of these.
    revision: u64,
    /// The revision that is in force.
    applied: u64,
    /// Whether the file is late.
    unwritten: bool,
    /// What policies ask for.
    asked: HashSet<NamePattern>,
    /// Whether policies are known, and these are theirs.
    is_asked_known: bool,
}

/// Who has asked for it first, and when it was answered last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    pub(super) client: Client,
    pub(super) at: Time,
}

/// Whose place an address takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::enforcer) enum Client {
    Endpoint(AttachmentId),
    /// Somebody else: an address, or what one host may choose from (RFC 4291, section 2.5.4).
    Other(IpNet),
}

impl Client {
    pub(in crate::enforcer) fn other(address: IpAddr) -> Self {
        let length = if address.is_ipv6() { 64 } else { 32 };
        Self::Other(IpNet::new(address, length).unwrap_or_else(|_| address.into()).trunc())
    }
}

/// What is to be carried out.
pub(in crate::enforcer) struct Waiting {
    pub(in crate::enforcer) renamed: BTreeSet<IpAddr>,
    pub(in crate::enforcer) fresh: Vec<(DomainName, IpAddr)>,
    pub(in crate::enforcer) revision: u64,
}

impl Learnt {
    /// With what an earlier owner has left, and what its policies asked for.
    pub(in crate::enforcer) fn new(names: Names, asked: HashSet<NamePattern>) -> Self {
        Self { names, asked, ..Self::default() }
    }

    pub(in crate::enforcer) fn names(&self) -> &Names {
        &self.names
    }

    /// What policies ask for.
    pub(super) fn asked(&self) -> &HashSet<NamePattern> {
        &self.asked
    }

    /// Policies may be others.
    pub(in crate::enforcer) fn forget_asked(&mut self) {
        self.is_asked_known = false;
    }

    /// Goes by a cluster's policies; forgets names that these do not ask for.
    pub(in crate::enforcer) fn go_by(&mut self, cluster: &Cluster) {
        if self.is_asked_known {
            return;
        }
        self.is_asked_known = true;
        let asked = patterns(cluster);
        if asked == self.asked {
            return;
        }
        self.asked = asked;
        self.unwritten = true;
        let unasked: Vec<(DomainName, IpAddr)> = self
            .names
            .iter()
            .filter(|(name, _)| !self.is_asked_for(name))
            .flat_map(|(name, known)| known.keys().map(|address| (name.clone(), *address)))
            .collect();
        self.forget(unasked);
    }

    /// Whether policies ask for the name; those of the owner before where nobody has told any yet.
    pub(in crate::enforcer) fn is_asked_for(&self, name: &DomainName) -> bool {
        NamePattern::all_of(name).any(|pattern| self.asked.contains(&pattern))
    }

    /// Notes addresses of a name; returns the revision in which they are in force.
    pub(super) fn learn(
        &mut self,
        client: Client,
        name: &DomainName,
        learnt: &[(IpAddr, Duration)],
        now: Time,
    ) -> Result<u64, LearnError> {
        let known = self.names.addresses(name);
        let told: BTreeSet<IpAddr> = learnt.iter().map(|(address, _)| *address).collect();
        let found = told.iter().filter(|address| known.is_none_or(|known| !known.contains_key(*address))).count();
        let too_many = |limit: usize, room: usize| LearnError::TooMany { name: name.clone(), found, room, limit };
        if told.len() > MOST_ADDRESSES {
            return Err(too_many(MOST_ADDRESSES, MOST_ADDRESSES));
        }
        let mut others: Vec<(Time, IpAddr)> = known
            .into_iter()
            .flatten()
            .filter(|(address, _)| !told.contains(*address))
            .map(|(address, until)| (*until, *address))
            .collect();
        others.sort_unstable();
        others.truncate((others.len() + told.len()).saturating_sub(MOST_ADDRESSES));
        let mut leaving: BTreeSet<(DomainName, IpAddr)> =
            others.into_iter().map(|(_, address)| (name.clone(), address)).collect();
        let stays = |other: &DomainName, address: IpAddr| other == name && told.contains(&address);
        let room = self.make_room(client, found, &leaving, stays, now);
        leaving.extend(room.map_err(|full| too_many(full.limit, full.room))?);
        self.forget(leaving);
        for address in told {
            if !self.names.addresses(name).is_some_and(|known| known.contains_key(&address)) {
                self.note_renamed([address]);
                self.fresh.push((name.clone(), address));
            }
        }
        self.keep(client, name, learnt, now);
        Ok(self.revision)
    }

    /// Has addresses of a name count from now on.
    pub(super) fn keep(&mut self, client: Client, name: &DomainName, learnt: &[(IpAddr, Duration)], now: Time) {
        for (address, ttl) in learnt {
            let until = until(now, *ttl);
            let before = self.names.addresses(name).and_then(|known| known.get(address)).copied();
            if before.is_none_or(|before| before < until) {
                self.names.learn(name.clone(), *address, until);
                self.unwritten = true;
            }
            let told = self.told.entry((name.clone(), *address)).or_insert(Told { client, at: now });
            told.at = now;
        }
    }

    fn forget(&mut self, pairs: impl IntoIterator<Item = (DomainName, IpAddr)>) {
        for pair in pairs {
            self.names.forget(&pair.0, pair.1);
            self.told.remove(&pair);
            self.note_renamed([pair.1]);
        }
    }

    /// Takes out what is over. Nothing counts for longer than an answer of now, whatever time it was when it was learnt.
    pub(in crate::enforcer) fn expire(&mut self, now: Time) {
        let last = until(now, Duration::MAX);
        let late = self.names.by_end().rev().take_while(|(end, ..)| *end > last);
        let late: Vec<(DomainName, IpAddr)> = late.map(|(_, name, address)| (name.clone(), *address)).collect();
        for (name, address) in late {
            self.names.forget(&name, address);
            self.names.learn(name, address, last);
            self.unwritten = true;
        }
        let over = self.names.by_end().take_while(|(end, ..)| *end <= now);
        let over: Vec<(DomainName, IpAddr)> = over.map(|(_, name, address)| (name.clone(), *address)).collect();
        self.forget(over);
    }

    /// When the first address is over.
    pub(in crate::enforcer) fn next_end(&self) -> Option<Time> {
        self.names.next_end()
    }

    fn note_renamed(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.renamed.insert(address);
            self.revision += 1;
            self.unwritten = true;
        }
    }

    /// Whether something is to be carried out.
    pub(in crate::enforcer) fn is_waiting(&self) -> bool {
        !self.renamed.is_empty()
    }

    /// What is to be carried out. Whoever takes it tells whether it was, or gives it up.
    pub(in crate::enforcer) fn take(&mut self) -> Waiting {
        let (renamed, fresh) = (std::mem::take(&mut self.renamed), std::mem::take(&mut self.fresh));
        Waiting { renamed, fresh, revision: self.revision }
    }

    pub(in crate::enforcer) fn note_applied(&mut self, revision: u64) {
        self.applied = revision;
    }

    /// Gives up what was new, and has the rest carried out later.
    pub(in crate::enforcer) fn give_up(&mut self, waiting: Waiting) {
        self.forget(waiting.fresh);
        self.note_renamed(waiting.renamed);
    }

    /// Gives up everything.
    pub(in crate::enforcer) fn give_up_all(&mut self) {
        let all = self.names.by_end().map(|(_, name, address)| (name.clone(), *address)).collect::<Vec<_>>();
        self.forget(all);
        self.fresh.clear();
    }

    /// Whether changes up to this revision are in force.
    pub(super) fn is_applied(&self, revision: u64) -> bool {
        self.applied >= revision
    }

    /// Whether the file is late; it is not any more.
    pub(super) fn take_unwritten(&mut self) -> bool {
        std::mem::take(&mut self.unwritten)
    }

    pub(super) fn note_unwritten(&mut self) {
        self.unwritten = true;
    }
}

/// The names that policies ask for.
fn patterns(cluster: &Cluster) -> HashSet<NamePattern> {
    let rules = cluster.policies.values().flat_map(|policy| policy.all_rules());
    let peers = rules.filter_map(|rule| match &rule.peers {
        Peers::Any => None,
        Peers::OneOf(peers) => Some(peers),
    });
    let patterns = peers.flatten().filter_map(|peer| match peer {
        Peer::Name(pattern) => Some(pattern.clone()),
        _ => None,
    });
    patterns.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enforcer::learnt::{GRACE, MOST_TTL};

    #[test]
    fn a_name_keeps_to_its_bounds() {
        let mut learnt = Learnt::default();
        let name: DomainName = "db.example.com".parse().unwrap();
        let (at, client) = (|n: u32| IpAddr::from(n.to_be_bytes()), Client::other([10, 0, 0, 1].into()));
        for n in 0..MOST_ADDRESSES as u32 {
            learnt.learn(client, &name, &[(at(n), Duration::from_secs(1000 + u64::from(n)))], 0).unwrap();
        }
        // What ends first gives way.
        learnt.learn(client, &name, &[(at(5000), Duration::from_secs(5000))], 0).unwrap();
        assert_eq!(learnt.names().len(), MOST_ADDRESSES);
        assert!(!learnt.names().addresses(&name).unwrap().contains_key(&at(0)));
        let many: Vec<_> = (0..=MOST_ADDRESSES as u32).map(|n| (at(n), Duration::ZERO)).collect();
        let error = learnt.learn(client, &name, &many, 0).unwrap_err();
        assert!(matches!(error, LearnError::TooMany { limit: MOST_ADDRESSES, .. }), "{error}");
    }

    /// A clock that was set back keeps nothing for longer than an answer may count.
    #[test]
    fn nothing_counts_for_longer_than_the_longest() {
        let (mut learnt, name): (Learnt, DomainName) = (Learnt::default(), "db.example.com".parse().unwrap());
        let client = Client::other([10, 0, 0, 1].into());
        learnt.learn(client, &name, &[([192, 0, 2, 1].into(), MOST_TTL * 2)], 1_000_000).unwrap();
        learnt.expire(0);
        let last = (MOST_TTL + GRACE).as_secs().cast_signed();
        assert_eq!(learnt.next_end(), Some(last));
        learnt.expire(last - 1);
        assert_eq!(learnt.names().len(), 1);
        learnt.expire(last);
        assert!(learnt.names().is_empty() && learnt.told.is_empty());
    }
}
