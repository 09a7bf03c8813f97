//! Who is told the policies of the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::engine::Engine;
use dcenet_core::netns::{Host, NetNs};
use dcenet_policy::bundle::{Accepted, Trust};
use dcenet_policy::enforcer::{Enforcer, EnforcerError, PolicyConfig, Report};
use dcenet_policy::model::Mode;
use dcenet_policy::sources::kubernetes::Documents;

use super::{Outcome, addresses_of, node_name, open_enforcer};
use crate::config::{Config, PoliciesConfig, TrustConfig};
use crate::issued::Issued;
use crate::kept::Kept;
use crate::metrics::DaemonMetrics;
use crate::policies::{self, Directories, PoliciesError, Set, Signature, Watcher};
use crate::standing::Standing;

/// The owner of the node's policy state, and what it was told last.
pub(super) struct Owner {
    pub(super) enforcer: Arc<Enforcer>,
    directories: Option<Directories>,
    pub(super) watcher: Option<Watcher>,
    metrics: DaemonMetrics,
    /// Whose bundles are taken, where they are.
    issuers: Option<Issuers>,
    pub(super) issued: Issued,
    /// What the directory said when it was read without error; nothing before.
    told: Option<Documents>,
    /// Whether policies were in force, also before this process.
    standing: Standing,
    /// Whether a directory without policies takes them all away.
    may_be_empty: bool,
    /// Whether addresses of names become known.
    learns: bool,
    /// What the directory looked like when it was read last.
    seen: Option<Signature>,
    /// Why it was refused last, if it was.
    refused: Option<String>,
    /// Not where the configuration names the node's addresses.
    addresses: Option<BTreeSet<IpAddr>>,
    node: String,
    /// When a change of the directory is read at the latest, and when at the earliest.
    pending: Option<(Instant, Instant)>,
    /// When it looks for what nobody tells it of.
    look_at: Instant,
    /// When it has something to do next.
    pub(super) due: Instant,
}

/// Those whose bundles are taken.
struct Issuers {
    trust: Trust,
    /// The sets, each with the least generation.
    wanted: BTreeMap<String, u64>,
    /// What was taken.
    accepted: Accepted,
    kept: Kept,
}

impl Issuers {
    fn open(section: &TrustConfig, state_dir: &Path) -> Result<Self, String> {
        let (trust, wanted) = (section.read()?, section.sets.clone());
        Ok(Self { trust, wanted, accepted: policies::accepted(state_dir)?, kept: Kept::of(state_dir) })
    }
}

/// A directory is read when nothing has changed in it for so long, and after so long in any case.
const QUIET: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the node's own addresses are read, and it is looked for what inotify does not tell of: another directory at the
/// path, another file behind a link, a change on another machine. What failed for a reason that may pass is tried again
/// after as long.
pub(super) const LOOK: Duration = Duration::from_secs(5);

impl Owner {
    pub(super) fn open(config: &Config, policy: &PolicyConfig, metrics: DaemonMetrics) -> Outcome<Self> {
        let directories = config.policies.as_ref().map(PoliciesConfig::directories);
        let trust = config.policies.as_ref().and_then(|p| p.trust.as_ref());
        let issuers = trust.map(|trust| Issuers::open(trust, &config.state_dir)).transpose()?;
        let node = node_name(config)?;
        // Watched before it is read: what changes in between is seen.
        let watcher = directories.as_ref().map(Watcher::new).transpose().map_err(|e| format!("policies: {e}"))?;
        Ok(Self {
            enforcer: Arc::new(open_enforcer(config, policy)?),
            directories,
            watcher,
            metrics,
            issuers,
            issued: Issued::of(&node),
            told: None,
            standing: Standing::read(&config.state_dir),
            may_be_empty: config.policies.as_ref().is_none_or(|p| p.allow_empty),
            learns: config.dns.is_some(),
            seen: None,
            refused: None,
            addresses: config.node.addresses.is_none().then(BTreeSet::new),
            node,
            pending: None,
            look_at: Instant::now(),
            due: Instant::now(),
        })
    }

    /// Takes over what was attached while nobody was here.
    pub(super) fn adopt(&self, engine: &Engine) {
        match engine.records() {
            Ok(records) => {
                report("attachments were adopted", self.enforcer.adopt(&records));
            }
            Err(error) => tracing::error!(%error, "attachments cannot be adopted"),
        }
    }

    /// Reads the directory, and puts in force what it says. Where it is refused, what was in force stays; before the first
    /// reading that is not, nothing is put in the place of the verdicts of whoever was here before.
    pub(super) fn read(&mut self) {
        let (read, seen) = match &self.directories {
            Some(directories) => policies::read(directories, self.issuers.as_ref().map(|issuers| &issuers.trust)),
            None => (Ok(Set::default()), None),
        };
        self.seen = seen;
        let is_in_force = match read.and_then(|set| self.admit(set)) {
            Ok(set) => {
                self.refused = None;
                let is_in_force = self.tell(set);
                if !is_in_force {
                    self.read_later();
                }
                is_in_force
            }
            Err(error) => {
                let reason = error.to_string();
                if self.told.is_none() {
                    self.go_on(self.refused.as_ref() != Some(&reason));
                }
                // Told once, however often it is tried again.
                if self.refused.as_ref() != Some(&reason) {
                    let is_first = self.told.is_none();
                    let stands = if is_first { "the last verdicts stand" } else { "the last good set stands" };
                    tracing::error!(%error, "policies are refused; {stands}");
                    self.issued.refuse(&reason);
                    self.refused = Some(reason);
                }
                if error.may_pass() {
                    self.read_later();
                }
                false
            }
        };
        self.metrics.count_read(is_in_force);
    }

    /// Goes on with the bundles that were taken last, as the directory has none that may be. `is_new`: why is told.
    fn go_on(&mut self, is_new: bool) {
        let (Some(Issuers { trust, wanted, accepted, kept }), Some(directories)) = (&self.issuers, &self.directories)
        else {
            return;
        };
        if accepted.sets().is_empty() {
            return;
        }
        let kept = Directories { directory: kept.directory().to_owned(), cluster: directories.cluster.clone() };
        let read = policies::read(&kept, Some(trust)).0;
        match read.and_then(|set| accepted.check(&set.bundles, wanted).map(|()| set).map_err(PoliciesError::Set)) {
            Ok(set) => {
                tracing::warn!("the bundles that were taken last stand");
                self.refused = None;
                if !self.tell(set) {
                    self.read_later();
                }
            }
            Err(error) if is_new => tracing::error!(%error, "the bundles that were taken last cannot be used"),
            Err(_) => {}
        }
    }

    fn read_later(&mut self) {
        let later = Instant::now() + LOOK;
        self.pending = Some((later, later));
    }

    /// Refuses bundles that are older than what was taken, not wanted, or missing, and notes that the others were taken; where nobody is
    /// trusted, a set without policies in force after one with some, unless the configuration lets it.
    fn admit(&mut self, set: Set) -> Result<Set, PoliciesError> {
        match (&mut self.issuers, &self.directories) {
            // All sets are there: whoever issued them without policies wants it so.
            (Some(Issuers { wanted, accepted, kept, .. }), _) => {
                accepted.check(&set.bundles, wanted).map_err(PoliciesError::Set)?;
                // First: what counts as taken is to be had.
                let failed = |source| PoliciesError::Io { path: kept.directory().to_owned(), source };
                kept.keep(&set).map_err(failed)?;
                accepted.take(&set.bundles, wanted).map_err(PoliciesError::Set)?;
            }
            (None, Some(directories))
                if in_force(&set.documents) == 0 && self.standing.is_set() && !self.may_be_empty =>
            {
                return Err(PoliciesError::NoneLeft(directories.directory.clone()));
            }
            _ => {}
        }
        Ok(set)
    }

    /// Puts a set in force, and returns whether it is.
    fn tell(&mut self, set: Set) -> bool {
        let Set { mut documents, bundles, envelopes: _ } = set;
        // What its devices say of it counts.
        documents.nodes.remove(&self.node);
        let notes: Vec<String> = policies::notes(&documents, self.learns).map(|note| note.to_string()).collect();
        for note in &notes {
            tracing::warn!(%note, "policies");
        }
        self.issued.begin();
        let (policies, in_force) = (documents.policies.len(), in_force(&documents));
        // Before they are: a daemon that dies in between must not be followed by one that takes none for all.
        if in_force > 0 {
            self.note_standing(true);
        }
        let before = self.told.take();
        let none = Documents::default();
        let told = self.enforcer.replace_documents(before.as_ref().unwrap_or(&none), &documents);
        self.told = Some(documents);
        let mut is_in_force = report("policies were read", told);
        if before.is_none() {
            is_in_force &= report("policies are in force", self.enforcer.start());
        }
        self.issued.tell(&bundles, notes);
        if in_force == 0 && is_in_force {
            self.note_standing(false);
        }
        tracing::info!(policies, in_force, "policies");
        is_in_force
    }

    fn note_standing(&mut self, are_in_force: bool) {
        if let Err(error) = self.standing.note(are_in_force) {
            tracing::warn!(%error, "the next daemon may take an empty directory for what is wanted, or refuse one that is");
        }
    }

    /// Does what is due.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        match self.watcher.as_mut().map(Watcher::changed) {
            Some(Ok(true)) => {
                let latest = self.pending.map_or(now + PATIENCE, |(latest, _)| latest.min(now + PATIENCE));
                self.pending = Some((latest, now + QUIET));
            }
            Some(Err(error)) => tracing::warn!(%error, "the directory of policies cannot be watched"),
            Some(Ok(false)) | None => {}
        }
        if now >= self.look_at {
            self.look_at = now + LOOK;
            if self.addresses.is_some() {
                self.read_addresses();
            }
            self.look_for_changes(now);
        }
        if self.pending.is_some_and(|(latest, earliest)| now >= latest.min(earliest)) {
            self.pending = None;
            self.read();
        }
        self.due = self.pending.map_or(self.look_at, |(latest, earliest)| latest.min(earliest).min(self.look_at));
    }

    /// Has the directory read where it does not look as it did, whatever inotify says.
    fn look_for_changes(&mut self, now: Instant) {
        let Some(directories) = self.directories.as_ref().filter(|_| self.pending.is_none()) else { return };
        if Signature::of(directories).ok() == self.seen {
            return;
        }
        if let Some(Err(error)) = self.watcher.as_mut().map(Watcher::renew) {
            tracing::warn!(%error, "the directory of policies cannot be watched");
        }
        self.pending = Some((now, now));
    }

    /// A bridge has its address from the first pod that comes.
    fn read_addresses(&mut self) {
        let found = NetNs::of_this_thread().map_err(Into::into).and_then(|netns| addresses_of(&Host(netns)));
        match found {
            Ok(found) if self.addresses.as_ref() != Some(&found) => {
                report("the node's addresses changed", self.enforcer.set_node(&self.node, found.clone()));
                self.addresses = Some(found);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the node's addresses cannot be read"),
        }
    }
}

/// How many of the policies change verdicts.
fn in_force(documents: &Documents) -> usize {
    documents.policies.values().filter(|policy| policy.mode == Mode::Enforce).count()
}

/// Tells what came of a change, and returns whether it is in force but for endpoints that are named. Those are tried again by
/// the owner itself.
fn report(what: &str, outcome: Result<Report, EnforcerError>) -> bool {
    let is_in_force = outcome.is_ok();
    match outcome {
        Ok(report) => {
            for (attachment, reason) in &report.failures {
                tracing::warn!(%attachment, reason, "not in force yet");
            }
            for fault in &report.faults {
                tracing::warn!(%fault, "{}", fault.effect());
            }
            tracing::debug!(enforced = report.enforced, "{what}");
        }
        Err(error) => tracing::error!(%error, "{what}, and are not in force; the last verdicts stand"),
    }
    is_in_force
}
