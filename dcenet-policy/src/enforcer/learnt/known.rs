//! What is known of names, within its bounds.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use super::{LearnError, MOST_ADDRESSES, MOST_LEARNT};
use crate::model::{Cluster, DomainName, NamePattern, Names, Peer, Peers, Time};

/// What has been learnt, and what of it waits to be carried out, or to be written down.
#[derive(Debug, Default)]
pub(in crate::enforcer) struct Learnt {
    names: Names,
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
    /// What policies ask for, found when it is wanted.
    patterns: Option<HashSet<NamePattern>>,
}

/// What is to be carried out.
pub(in crate::enforcer) struct Waiting {
    pub(in crate::enforcer) renamed: BTreeSet<IpAddr>,
    pub(in crate::enforcer) fresh: Vec<(DomainName, IpAddr)>,
    pub(in crate::enforcer) revision: u64,
}

impl Learnt {
    /// With what an earlier owner has left.
    pub(in crate::enforcer) fn new(names: Names) -> Self {
        Self { names, ..Self::default() }
    }

    pub(in crate::enforcer) fn names(&self) -> &Names {
        &self.names
    }

    /// Policies may be others.
    pub(in crate::enforcer) fn forget_patterns(&mut self) {
        self.patterns = None;
    }

    pub(in crate::enforcer) fn is_asked_for(&mut self, cluster: &Cluster, name: &DomainName) -> bool {
        let patterns = self.patterns.get_or_insert_with(|| patterns(cluster));
        NamePattern::all_of(name).any(|pattern| patterns.contains(&pattern))
    }

    /// Notes addresses of a name; returns the revision in which they are in force.
    pub(super) fn learn(&mut self, name: &DomainName, learnt: &[(IpAddr, Time)]) -> Result<u64, LearnError> {
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
        let room = (MOST_LEARNT + others.len()).saturating_sub(self.names.len());
        if found > room {
            return Err(too_many(MOST_LEARNT, room));
        }
        for (_, address) in others {
            self.names.forget(name, address);
            self.note_renamed([address]);
        }
        for (address, until) in learnt {
            let before = self.names.addresses(name).and_then(|known| known.get(address)).copied();
            if before.is_some_and(|before| before >= *until) {
                continue;
            }
            self.unwritten = true;
            if self.names.learn(name.clone(), *address, *until) {
                self.note_renamed([*address]);
                self.fresh.push((name.clone(), *address));
            }
        }
        Ok(self.revision)
    }

    /// Takes out what is over.
    pub(in crate::enforcer) fn expire(&mut self, now: Time) {
        let over = self.names.expire(now);
        self.note_renamed(over);
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
        for (name, address) in waiting.fresh {
            self.names.forget(&name, address);
        }
        self.note_renamed(waiting.renamed);
    }

    /// Whether changes up to this revision are in force.
    pub(super) fn is_applied(&self, revision: u64) -> bool {
        self.applied >= revision
    }

    /// What is to be written down, if it is not.
    pub(super) fn take_unwritten(&mut self) -> Option<Names> {
        std::mem::take(&mut self.unwritten).then(|| self.names.clone())
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

    #[test]
    fn a_name_keeps_to_its_bounds() {
        let mut learnt = Learnt::default();
        let name: DomainName = "db.example.com".parse().unwrap();
        let at = |n: u32| IpAddr::from(n.to_be_bytes());
        for n in 0..MOST_ADDRESSES as u32 {
            learnt.learn(&name, &[(at(n), 1000 + Time::from(n))]).unwrap();
        }
        // What ends first gives way.
        learnt.learn(&name, &[(at(5000), 5000)]).unwrap();
        let names = learnt.names();
        assert_eq!(names.len(), MOST_ADDRESSES);
        assert!(!names.addresses(&name).unwrap().contains_key(&at(0)));
        let many: Vec<_> = (0..=MOST_ADDRESSES as u32).map(|n| (at(n), 9)).collect();
        assert!(matches!(learnt.learn(&name, &many), Err(LearnError::TooMany { limit: MOST_ADDRESSES, .. })));
        let mut taken = MOST_ADDRESSES;
        for n in 0.. {
            let other: DomainName = format!("n{n}.example.com").parse().unwrap();
            let full: Vec<_> = many.iter().take(MOST_ADDRESSES).copied().collect();
            match learnt.learn(&other, &full) {
                Ok(_) => taken += MOST_ADDRESSES,
                Err(error) => {
                    assert_eq!(
                        error.to_string(),
                        format!(
                            "{other} has 256 addresses more, and 0 of {MOST_LEARNT} are left; use fewer names in policies"
                        )
                    );
                    break;
                }
            }
        }
        assert_eq!((taken, learnt.names().len()), (MOST_LEARNT, MOST_LEARNT));
    }
}
