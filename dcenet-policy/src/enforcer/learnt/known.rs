//! What is known of names, within its bounds.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use dcenet_core::model::AttachmentId;
use ipnet::IpNet;

use super::places::Room;
use super::refused::Refusals;
use super::{LearnError, MOST_ADDRESSES, until};
use crate::enforcer::EnforcerError;
use crate::model::{Cluster, DomainName, NamePattern, Names, Peer, Peers, Time};

/// What has been learnt, and what of it waits to be carried out, or to be written down.
#[derive(Debug, Default)]
pub(in crate::enforcer) struct Learnt {
    pub(super) names: Names,
    /// Who has asked for each pair in `names` that this owner has learnt, and when first.
    pub(super) told: BTreeMap<(DomainName, IpAddr), BTreeMap<Client, Time>>,
    /// The addresses that have lost names since what is over was last taken out.
    renamed: BTreeSet<IpAddr>,
    /// What of `names` is not in force, and waits for that.
    pub(super) fresh: BTreeSet<(DomainName, IpAddr)>,
    /// What was given up lately.
    refused: Refusals,
    /// Whether the file is late.
    unwritten: bool,
    /// What policies ask for.
    asked: HashSet<NamePattern>,
    /// Whether policies are known, and these are theirs.
    is_asked_known: bool,
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

/// An answer that waits.
#[derive(Debug)]
pub(in crate::enforcer) struct Answer {
    /// Nobody where an owner before has learnt it.
    pub(super) client: Option<Client>,
    pub(super) name: DomainName,
    pub(super) addresses: BTreeSet<IpAddr>,
}

impl Answer {
    pub(in crate::enforcer) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().copied()
    }
}

/// What has become of an answer.
pub(super) enum Fate {
    InForce,
    Waiting,
    /// It was given up.
    Refused(LearnError),
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

    /// Notes addresses of a name.
    pub(super) fn learn(
        &mut self,
        client: Client,
        name: &DomainName,
        learnt: &[(IpAddr, Duration)],
        now: Time,
    ) -> Result<(), LearnError> {
        let known = self.names.addresses(name);
        let told: BTreeSet<IpAddr> = learnt.iter().map(|(address, _)| *address).collect();
        let found = told.iter().filter(|address| known.is_none_or(|known| !known.contains_key(*address))).count();
        let too_many = |limit: usize, room: usize| LearnError::TooMany { name: name.clone(), found, room, limit };
        if told.len() > MOST_ADDRESSES {
            return Err(too_many(MOST_ADDRESSES, MOST_ADDRESSES));
        }
        if found > 0
            && let Some(error) = self.refused.of(client, name, now)
        {
            return Err(error.into());
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
        let Room { forgotten, left } = room.map_err(|full| too_many(full.limit, full.room))?;
        leaving.extend(forgotten);
        for (pair, client) in left {
            if let Some(told) = self.told.get_mut(&pair) {
                told.remove(&client);
            }
        }
        self.forget(leaving);
        for address in told {
            if !self.names.addresses(name).is_some_and(|known| known.contains_key(&address)) {
                self.fresh.insert((name.clone(), address));
                self.unwritten = true;
            }
        }
        self.keep(client, name, learnt, now);
        Ok(())
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
            let told = self.told.entry((name.clone(), *address)).or_default();
            if told.len() < MOST_CLIENTS {
                told.entry(client).or_insert(now);
            }
        }
    }

    fn forget(&mut self, pairs: impl IntoIterator<Item = (DomainName, IpAddr)>) {
        for pair in pairs {
            self.names.forget(&pair.0, pair.1);
            self.told.remove(&pair);
            self.fresh.remove(&pair);
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
        for at in self.told.values_mut().flat_map(BTreeMap::values_mut) {
            *at = now.min(*at);
        }
        let over = self.names.by_end().take_while(|(end, ..)| *end <= now);
        let over: Vec<(DomainName, IpAddr)> = over.map(|(_, name, address)| (name.clone(), *address)).collect();
        self.forget(over);
    }

    /// When the first address is over.
    pub(in crate::enforcer) fn next_end(&self) -> Option<Time> {
        self.names.next_end()
    }

    /// Has what is over of these addresses taken out.
    pub(in crate::enforcer) fn note_renamed(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            self.renamed.insert(address);
            self.unwritten = true;
        }
    }

    /// Whether something that is over is in force, or may be.
    pub(in crate::enforcer) fn is_over(&self) -> bool {
        !self.renamed.is_empty()
    }

    /// Whether an answer waits.
    pub(in crate::enforcer) fn is_waiting(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The addresses that have lost names. Whoever takes them has that carried out, or notes them again.
    pub(in crate::enforcer) fn take_renamed(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.renamed)
    }

    /// What is known, without what waits.
    pub(in crate::enforcer) fn settled(&self) -> Names {
        let mut names = self.names.clone();
        for (name, address) in &self.fresh {
            names.forget(name, *address);
        }
        names
    }

    /// Notes what is in force.
    pub(in crate::enforcer) fn settle(&mut self, in_force: &Names) {
        let is_in_force = |(name, address): &(DomainName, IpAddr)| {
            in_force.addresses(name).is_some_and(|known| known.contains_key(address))
        };
        self.fresh.retain(|pair| !is_in_force(pair));
    }

    /// Has the names of these addresses wait: they are not in force any more.
    pub(in crate::enforcer) fn have_wait(&mut self, addresses: &BTreeSet<IpAddr>) {
        for address in addresses {
            self.fresh.extend(self.names.of_address(*address).map(|(name, _)| (name.clone(), *address)));
        }
    }

    /// The answers that wait, those of a client side by side.
    pub(in crate::enforcer) fn answers(&self) -> Vec<Answer> {
        let mut answers: BTreeMap<(Option<Client>, &DomainName), BTreeSet<IpAddr>> = BTreeMap::new();
        for pair in &self.fresh {
            let client = self.told.get(pair).and_then(|told| told.keys().next().copied());
            answers.entry((client, &pair.0)).or_default().insert(pair.1);
        }
        let answer =
            |((client, name), addresses): ((_, &DomainName), _)| Answer { client, name: name.clone(), addresses };
        answers.into_iter().map(answer).collect()
    }

    /// What of answers waits still, but for those of clients of whom too many were given up lately: theirs are, too.
    pub(in crate::enforcer) fn still_waiting(&mut self, answers: Vec<Answer>, now: Time) -> Vec<Answer> {
        let mut left = Vec::new();
        for mut answer in answers {
            let Answer { client, name, addresses } = &mut answer;
            addresses.retain(|address| self.fresh.contains(&(name.clone(), *address)));
            if client.is_some_and(|client| self.refused.is_full(client, now)) {
                self.forget(addresses.iter().map(|address| (name.clone(), *address)).collect::<Vec<_>>());
            } else if !addresses.is_empty() {
                left.push(answer);
            }
        }
        left
    }

    /// The names that are in force with these answers.
    pub(in crate::enforcer) fn with(&self, in_force: &Names, answers: &[Answer]) -> Names {
        let mut names = in_force.clone();
        for Answer { name, addresses, .. } in answers {
            for (address, until) in self.names.addresses(name).into_iter().flatten() {
                if addresses.contains(address) {
                    names.learn(name.clone(), *address, *until);
                }
            }
        }
        names
    }

    /// Gives an answer up, and remembers why where that is the answer's doing: asked for again, it costs no pass.
    pub(in crate::enforcer) fn give_up(&mut self, answer: &Answer, error: &EnforcerError, now: Time) {
        let waiting = answer.addresses.iter().map(|address| (answer.name.clone(), *address));
        let waiting: Vec<_> = waiting.filter(|pair| self.fresh.contains(pair)).collect();
        self.forget(waiting);
        if let Some(client) = answer.client {
            self.refused.note(client, &answer.name, error, now);
        }
    }

    /// Something else has changed, so that there may be room for what was given up.
    pub(in crate::enforcer) fn forget_refused(&mut self) {
        self.refused = Refusals::default();
    }

    /// What has become of an answer that this client waits for.
    pub(super) fn fate(&self, client: Client, name: &DomainName, learnt: &[(IpAddr, Duration)], now: Time) -> Fate {
        let known = self.names.addresses(name);
        if !learnt.iter().all(|(address, _)| known.is_some_and(|known| known.contains_key(address))) {
            let why = self.refused.of(client, name, now).or_else(|| self.refused.of_anybody(name, now));
            return Fate::Refused(why.map_or_else(
                || LearnError::NotInForce {
                    name: name.clone(),
                    reason: "it was given up meanwhile; ask again".to_owned(),
                },
                LearnError::from,
            ));
        }
        let waits = learnt.iter().any(|(address, _)| self.fresh.contains(&(name.clone(), *address)));
        if waits { Fate::Waiting } else { Fate::InForce }
    }

    /// Gives up everything.
    pub(in crate::enforcer) fn give_up_all(&mut self) {
        let all = self.names.by_end().map(|(_, name, address)| (name.clone(), *address)).collect::<Vec<_>>();
        self.forget(all);
    }

    /// Whether the file is late; it is not any more.
    pub(super) fn take_unwritten(&mut self) -> bool {
        std::mem::take(&mut self.unwritten)
    }

    pub(super) fn note_unwritten(&mut self) {
        self.unwritten = true;
    }
}

/// Who has asked for a pair is noted of so many.
const MOST_CLIENTS: usize = 8;

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
