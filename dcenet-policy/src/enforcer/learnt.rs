//! What has been learnt of names, for rules that allow by them.
//!
//! Whoever sees answers of the Domain Name System before pods do, such as the proxy of the feature `dns`, tells the owner of those
//! for names that some policy asks for. [`Learner::learn`] returns when the addresses are in the class tables: an answer that is
//! handed on after that can be used at once.
//!
//! # How long an answer counts
//!
//! For its time to live, and at least for [`LEAST_TTL`], as resolvers of pods have a cache of their own and a connection is made
//! some time after its name was asked for. Then the owner takes the address out of the tables, and new flows are denied. Flows
//! that are established go on: what is learnt and what is over bumps no generation, so that their conntrack entries stay
//! valid. Another change of the pod's policies, or of the peers that these ask for, has the pod's flows judged anew as it does
//! all others, and a flow to an address that nobody has asked for again ends then.
//!
//! That holds where nothing but names has changed since the last pass, and no endpoint waits for another attempt. In a pass with
//! other changes answers are carried out as these are: flows are judged anew, and until the programs of the pass are attached an
//! address may be nobody's to those before, so that a rule that denies its prefix does not meet it.
//!
//! # Over a restart
//!
//! What is known is written down (`policy.names` in the run directory) before an answer is released. The next owner begins
//! with it, and no verdict changes.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::state::{Shared, State};
use super::{Enforcer, EnforcerError};
use crate::model::{Cluster, DomainName, NamePattern, Names, Peer, Peers, Time};

/// An answer counts for this long, however short its time to live is.
pub const LEAST_TTL: Duration = Duration::from_secs(60);

/// No answer counts for longer. Whoever hands on one that lives longer lowers its time to live to this, or it is used when it is
/// over.
pub const MOST_TTL: Duration = Duration::from_secs(24 * 3600);

/// Addresses of one name at a time; where there are more, those that end first give way.
pub const MOST_ADDRESSES: usize = 256;

/// Addresses of all names.
pub const MOST_LEARNT: usize = 4096;

/// Tells the owner of answers; may be kept and copied.
#[derive(Clone)]
pub struct Learner {
    shared: Arc<Shared>,
}

impl fmt::Debug for Learner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Learner").finish_non_exhaustive()
    }
}

/// Why an answer is not to be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnError {
    /// The owner has not been told the policies yet, or has ended.
    #[error("no owner is at work; ask again when one is")]
    NotStarted,
    /// There are too many addresses.
    #[error("{name} has {found} addresses more, and {room} of {limit} are left; use fewer names in policies")]
    TooMany {
        /// The name.
        name: DomainName,
        /// How many are new.
        found: usize,
        /// How many more there may be.
        room: usize,
        /// The limit.
        limit: usize,
    },
    /// It is not in force for who asked.
    #[error("{name} is not in force: {reason}")]
    NotInForce {
        /// The name.
        name: DomainName,
        /// Why.
        reason: String,
    },
    /// The change could not be carried out.
    #[error(transparent)]
    Enforcer(#[from] EnforcerError),
}

impl Enforcer {
    /// Who tells the owner of answers for names.
    pub fn learner(&self) -> Learner {
        Learner { shared: Arc::clone(&self.shared) }
    }
}

impl Learner {
    /// Whether some policy, in force or in audit, has a rule by a name that means this one.
    pub fn is_asked_for(&self, name: &DomainName) -> bool {
        self.shared.state.lock().is_asked_for(name)
    }

    /// Whether the address is an endpoint's of this owner.
    pub fn is_endpoint(&self, address: IpAddr) -> bool {
        self.shared.state.lock().is_endpoints(address)
    }

    /// Tells that a name has these addresses, each for so long, as somebody at the address `client` is about to hear. When it
    /// returns, they are in force for that endpoint, if it is one. Of a name that no policy asks for nothing is kept.
    ///
    /// May be called at once by many; they share changes.
    ///
    /// # Errors
    /// The answer must not be handed on then: its addresses are not, or not all, in force.
    pub fn learn(
        &self,
        client: IpAddr,
        name: &DomainName,
        addresses: impl IntoIterator<Item = (IpAddr, Duration)>,
    ) -> Result<(), LearnError> {
        let now = self.shared.time();
        let until = |ttl: Duration| now.saturating_add(ttl.clamp(LEAST_TTL, MOST_TTL).as_secs().cast_signed());
        let learnt: Vec<(IpAddr, Time)> = addresses.into_iter().map(|(address, ttl)| (address, until(ttl))).collect();
        let revision = {
            let mut state = self.shared.state.lock();
            if !state.started || state.is_stopping() {
                return Err(LearnError::NotStarted);
            }
            if learnt.is_empty() || !state.is_asked_for(name) {
                return Ok(());
            }
            let known = state.revision();
            let revision = state.learn(name, &learnt)?;
            // What is in force is not carried out again, with all that others have changed in the meantime.
            if revision == known && state.is_applied(revision) && state.failure_of(client).is_none() {
                return Ok(());
            }
            revision
        };
        self.shared.apply()?;
        let state = self.shared.state.lock();
        let refused = |reason: String| LearnError::NotInForce { name: name.clone(), reason };
        let known = state.cluster_ref().names.addresses(name);
        if !learnt.iter().all(|(address, _)| known.is_some_and(|known| known.contains_key(address))) {
            return Err(refused("it was given up, as the node's maps have no room for it".to_owned()));
        }
        match state.failure_of(client) {
            Some(reason) => Err(refused(reason)),
            None if state.is_applied(revision) => Ok(()),
            None => Err(refused("the change is not carried out yet".to_owned())),
        }
    }
}

/// What of names waits to be carried out, or to be written down.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The addresses whose names are not what they were when a change was last carried out.
    pub(super) renamed: BTreeSet<IpAddr>,
    /// What is new since then.
    pub(super) fresh: Vec<(DomainName, IpAddr)>,
    /// Whether the file is late.
    unwritten: bool,
    /// What policies ask for, found when it is wanted.
    patterns: Option<HashSet<NamePattern>>,
}

impl Pending {
    /// Policies may be others.
    pub(super) fn forget_patterns(&mut self) {
        self.patterns = None;
    }
}

impl State {
    fn is_asked_for(&mut self, name: &DomainName) -> bool {
        let cluster = self.cluster();
        let patterns = self.pending.patterns.get_or_insert_with(|| patterns(&cluster));
        NamePattern::all_of(name).any(|pattern| patterns.contains(&pattern))
    }

    /// Notes addresses of a name; returns the revision in which they are in force.
    fn learn(&mut self, name: &DomainName, learnt: &[(IpAddr, Time)]) -> Result<u64, LearnError> {
        let names = &self.cluster_ref().names;
        let known = names.addresses(name);
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
        let room = (MOST_LEARNT + others.len()).saturating_sub(names.len());
        if found > room {
            return Err(too_many(MOST_LEARNT, room));
        }
        for (_, address) in others {
            self.names_mut().forget(name, address);
            self.pending.renamed.insert(address);
            self.pending.unwritten = true;
        }
        for (address, until) in learnt {
            let before = self.cluster_ref().names.addresses(name).and_then(|known| known.get(address)).copied();
            if before.is_some_and(|before| before >= *until) {
                continue;
            }
            self.pending.unwritten = true;
            if self.names_mut().learn(name.clone(), *address, *until) {
                self.pending.renamed.insert(*address);
                self.pending.fresh.push((name.clone(), *address));
            }
        }
        Ok(self.count_names())
    }

    /// Takes out what is over.
    pub(super) fn expire_names(&mut self, now: Time) {
        if !self.are_names_late(now) {
            return;
        }
        let over = self.names_mut().expire(now);
        self.pending.renamed.extend(over);
        self.pending.unwritten = true;
        self.count_names();
    }

    /// Whether something that was learnt is over.
    pub(super) fn are_names_late(&self, now: Time) -> bool {
        self.started && self.cluster_ref().names.next_end().is_some_and(|end| end <= now)
    }

    /// Gives up what no room was found for, and tries again to carry out the rest.
    pub(super) fn give_up_names(&mut self, renamed: BTreeSet<IpAddr>, fresh: Vec<(DomainName, IpAddr)>) {
        self.pending.renamed.extend(renamed);
        for (name, address) in fresh {
            self.names_mut().forget(&name, address);
        }
        self.pending.unwritten = true;
        self.count_names();
    }
}

impl Shared {
    /// Writes down what is known, where that is not what the file says. Where it fails, the next change tries again: only an owner
    /// that starts before that does not know all.
    pub(super) fn write_names(&self) {
        let names = {
            let mut state = self.state.lock();
            if !std::mem::take(&mut state.pending.unwritten) {
                return;
            }
            state.cluster_ref().names.clone()
        };
        let told: Vec<(&DomainName, &IpAddr, &Time)> =
            names.iter().flat_map(|(name, known)| known.iter().map(move |(at, until)| (name, at, until))).collect();
        let (path, fresh) = (path(&self.config.run_dir), self.config.run_dir.join("policy.names,new"));
        let written = serde_json::to_vec(&told).map_err(io::Error::from);
        if let Err(error) = written.and_then(|text| fs::write(&fresh, text)).and_then(|()| fs::rename(&fresh, &path)) {
            tracing::warn!(path = %path.display(), %error, "names that were learnt are not written down yet");
            self.state.lock().pending.unwritten = true;
        }
    }
}

/// Where names are kept for the next owner.
pub(super) fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("policy.names")
}

/// What an earlier owner has left. A file that cannot be read is as good as none: nobody is allowed by names until they are asked
/// for again.
pub(super) fn resume(run_dir: &Path) -> Names {
    let path = path(run_dir);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Names::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the names that were learnt are lost");
            return Names::default();
        }
    };
    match serde_json::from_slice::<Vec<(DomainName, IpAddr, Time)>>(&text) {
        Ok(told) => {
            let mut names = Names::default();
            for (name, address, until) in told {
                names.learn(name, address, until);
            }
            names
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the names that were learnt are lost");
            Names::default()
        }
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
    fn names_are_found_again_and_a_file_that_is_broken_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(resume(directory.path()), Names::default());
        let text = r#"[["db.example.com","192.0.2.1",100],["db.example.com","2001:db8::1",90]]"#;
        fs::write(path(directory.path()), text).unwrap();
        let names = resume(directory.path());
        assert_eq!((names.len(), names.next_end()), (2, Some(90)));
        fs::write(path(directory.path()), "[[\"com\",\"192.0.2.1\",100]]").unwrap();
        assert_eq!(resume(directory.path()), Names::default());
    }

    #[test]
    fn a_name_keeps_to_its_bounds() {
        let mut state = State::default();
        let name: DomainName = "db.example.com".parse().unwrap();
        let at = |n: u32| IpAddr::from(n.to_be_bytes());
        for n in 0..MOST_ADDRESSES as u32 {
            state.learn(&name, &[(at(n), 1000 + Time::from(n))]).unwrap();
        }
        // What ends first gives way.
        state.learn(&name, &[(at(5000), 5000)]).unwrap();
        let names = &state.cluster_ref().names;
        assert_eq!(names.len(), MOST_ADDRESSES);
        assert!(!names.addresses(&name).unwrap().contains_key(&at(0)));
        let many: Vec<_> = (0..=MOST_ADDRESSES as u32).map(|n| (at(n), 9)).collect();
        assert!(matches!(state.learn(&name, &many), Err(LearnError::TooMany { limit: MOST_ADDRESSES, .. })));
        let mut taken = MOST_ADDRESSES;
        for n in 0.. {
            let other: DomainName = format!("n{n}.example.com").parse().unwrap();
            let full: Vec<_> = many.iter().take(MOST_ADDRESSES).copied().collect();
            match state.learn(&other, &full) {
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
        assert_eq!((taken, state.cluster_ref().names.len()), (MOST_LEARNT, MOST_LEARNT));
    }
}
