//! What has been learnt of names, for rules that allow by them.
//!
//! Whoever sees answers of the Domain Name System before pods do, such as the proxy of the feature `dns`, tells the owner of those
//! for names that some policy asks for. [`Learner::learn`] returns when the addresses are in the class tables: an answer that is
//! handed on after that can be used at once.
//!
//! # How long an answer counts
//!
//! For its time to live, and at least for [`LEAST_TTL`], as resolvers of pods have a cache of their own and a connection is made
//! some time after its name was asked for; and for [`GRACE`] beyond that. Time is the host's, and a clock that is set ends answers
//! early or late, by [`MOST_TTL`] from then at the latest. Then the owner takes the address out of the tables, and new flows are denied. Flows
//! that are established go on: what is learnt and what is over bumps no generation, so that their conntrack entries stay
//! valid. Another change of the pod's policies, or of the peers that these ask for, has the pod's flows judged anew as it does
//! all others, and a flow to an address that nobody has asked for again ends then.
//!
//! Answers are carried out by themselves, after what else has changed. Where there is no room for that, all that was learnt is given up,
//! and its names are to be asked for again. An address for which there is no room closes nobody, and one
//! that an endpoint's programs do not know together with what else rules ask for is given up: to them it would be nobody's,
//! and a rule that denies its prefix, or a pod that comes at it later, would not meet it. What is over is taken out before what is new
//! comes in, and answers that were learnt together are given up one by one: none takes another with it. What was given up is remembered
//! for some seconds, so that who asks again is told at once.
//!
//! # How much is known
//!
//! [`MOST_LEARNT`] addresses. Once half of the places are taken, an endpoint that has more than [`SHARE`] of them has to give up one
//! of its own for each that it gets; where all are taken, who has most makes room, so that a place may end before its answer does.
//! What ends first goes first, and nothing before its least time since the endpoint first asked is over, but what is beyond a share
//! where all are taken. An address for which several endpoints have asked counts for each, and stays until the last gives it up.
//! Names that no policy asks for any more are forgotten.
//!
//! # Over a restart
//!
//! What is known is written down (`policy.names` in the run directory) before an answer is released, and for how much longer a known
//! address counts some seconds later; where that fails, the log says so. The next owner begins with it, and no verdict changes. Until it has been told policies and is started, it goes by the
//! names that those of before asked for: answers for these are not released.

mod file;
mod known;
mod places;
mod refused;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

pub(super) use self::file::{path, path_of_fresh, resume};
use self::known::Fate;
pub(super) use self::known::{Answer, Client, Learnt};
use super::state::{Again, Shared};
use super::{Enforcer, EnforcerError};
use crate::model::{DomainName, Time};

/// An answer counts for this long, however short its time to live is.
pub const LEAST_TTL: Duration = Duration::from_secs(60);

/// No answer counts for longer. Whoever hands on one that lives longer lowers its time to live to this, or it is used when it is
/// over.
pub const MOST_TTL: Duration = Duration::from_secs(24 * 3600);

/// Addresses of one name at a time; where there are more, those that end first give way.
pub const MOST_ADDRESSES: usize = 256;

/// Beyond its time an answer counts for this long: whoever hears it has it for that time from then on, and asks again after that.
pub const GRACE: Duration = Duration::from_secs(30);

/// Addresses of all names.
pub const MOST_LEARNT: usize = 4096;

/// How many of them an endpoint may take where others want some, too.
pub const SHARE: usize = MOST_LEARNT / 8;

/// Until when an answer counts that is heard now.
fn until(now: Time, ttl: Duration) -> Time {
    now.saturating_add((ttl.clamp(LEAST_TTL, MOST_TTL) + GRACE).as_secs().cast_signed())
}

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

    /// Why addresses of names are allowed by although their time is over, where some are; also in each [`Report`](super::Report).
    pub fn overdue_names(&self) -> Option<String> {
        self.shared.names_failure()
    }
}

impl Learner {
    /// Whether some policy, in force or in audit, has a rule by a name that means this one. Before the owner is started, those of
    /// the owner before count.
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
        let learnt: Vec<(IpAddr, Duration)> = addresses.into_iter().collect();
        let of = {
            let now = self.shared.time_up();
            let mut state = self.shared.state.lock();
            if !state.started || state.is_stopping() {
                return Err(LearnError::NotStarted);
            }
            if learnt.is_empty() || !state.is_asked_for(name) {
                return Ok(());
            }
            let of = state.client(client);
            state.learnt.learn(of, name, &learnt, now)?;
            // What is in force is not carried out again, with all that others have changed in the meantime.
            let is_in_force = matches!(state.learnt.fate(of, name, &learnt, now), Fate::InForce);
            if is_in_force && state.failure_of(client).is_none() {
                return Ok(());
            }
            of
        };
        let others = self.shared.apply_when(Again::WhenDue);
        let now = self.shared.time_up();
        let mut state = self.shared.state.lock();
        let reason = match state.learnt.fate(of, name, &learnt, now) {
            Fate::Refused(error) => return Err(error),
            Fate::Waiting => {
                drop(state);
                others?;
                let reason = "the change is not carried out yet".to_owned();
                return Err(LearnError::NotInForce { name: name.clone(), reason });
            }
            Fate::InForce => state.failure_of(client),
        };
        // Whoever has not got the programs of the latest change goes by those that it has.
        if reason.is_some() {
            drop(state);
            let is_known = self.shared.knows(client, learnt.iter().map(|(address, _)| *address));
            state = self.shared.state.lock();
            if !is_known || !matches!(state.learnt.fate(of, name, &learnt, now), Fate::InForce) {
                drop(state);
                others?;
                return Err(LearnError::NotInForce { name: name.clone(), reason: reason.unwrap_or_default() });
            }
        }
        // The pod counts from when it hears of it.
        state.learnt.keep(of, name, &learnt, now);
        Ok(())
    }
}
