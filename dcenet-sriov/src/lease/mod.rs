//! Giving a function to somebody, and taking it back as it was.
//!
//! ```text
//!            prepare                    move_to        commit             release
//!  free --intent written--> prepared --> prepared --> leased --> (brought home, restored, looked at) --> free
//!                              |   dropped, refused or killed                |  not as it was
//!                              +---------> taken back ---> free              +---------------> quarantine
//! ```
//!
//! What a function was when the pool first saw it is written down once, in a ledger that outlives processes and
//! reboots. From then on there is one question, what differs from that, and one answer, change it: whatever a tenant
//! did, whichever call was killed where. A function that cannot be brought back is kept in quarantine, and nobody gets
//! it.
//!
//! Every lease has a number, the incarnation, that no other lease of the function ever has. A release names it: one
//! that comes late finds that it means nothing any more.
//!
//! What differs is written and nothing else, for drivers refuse attributes that they lack even where the value would
//! change nothing.
//!
//! ```no_run
//! # use std::path::Path;
//! # use std::sync::Arc;
//! use dcenet_sriov::kernel::Kernel;
//! use dcenet_sriov::lease::{Leases, VfId, Wanted};
//! # use dcenet_core::model::AttachmentKey;
//!
//! # fn add(kernel: Arc<dyn Kernel>, pod: AttachmentKey, vf: VfId) -> Result<(), Box<dyn std::error::Error>> {
//! let leases = Leases::open(kernel, Path::new("/var/lib/dcenet"))?;
//! let mut lease = leases.prepare(&pod, vf, &Wanted { mtu: Some(9000.try_into()?), ..Wanted::default() })?;
//! // Here it is in the host's namespace and down: policy goes on it now.
//! lease.move_to(Path::new("/run/netns/pod"), &"net1".parse()?)?;
//! let incarnation = lease.commit()?;
//! // Later, in another process.
//! leases.release(&pod, vf.address, incarnation)?;
//! # Ok(())
//! # }
//! ```
//!
//! What a driver keeps and does not tell cannot be brought back: igb remembers that an address was given by its
//! administrator, and holds an untrusted function to it, also where that is the function's own again. On Linux 6.1 its
//! port may know no address of a new function until that is first set up; a function that was brought back to that
//! hears nothing until it was set up and down once, or a lease gives it an address.
//! Its driver speaks to nobody until then, and takes any address of a tenant, which the port does not know.
//!
//! Bed of everything here: igb, on Linux 6.1; modelled, with the quirks of five drivers and a fault at each call. Of
//! functions for programs: igb behind QEMU's IOMMU, on Linux 6.1 and 6.12; modelled, with a fault at each call.

mod choose;
mod claim;
mod converge;
mod counters;
mod error;
mod hand_over;
mod lent;
mod owners;
mod port;
mod record;
mod recover;
mod snapshot;
mod straight;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::journal::LedgerError;
use dcenet_core::model::{AttachmentKey, MacAddr, Mtu};
use dcenet_core::provider::DeviceScrub;
use serde::{Deserialize, Serialize};

pub use choose::{ChooseError, Chosen};
pub use counters::Counted;
pub use error::LeaseError;
pub use lent::VfLease;
pub use owners::Had;
pub use record::{Quarantine, Until};
pub use recover::{Outcome, Recovered};
pub use snapshot::{Difference, NetdevSnapshot, VfSnapshot};

use crate::address::{PciAddress, VfIndex};
use crate::config::Capabilities;
use crate::kernel::{Kernel, VfChange};
use converge::Converge;
use record::{Away, Intent, Standing, Step, VfAccount, VfLedger, VfOpen, VfPage, away, is_committed};
use snapshot::NoAddress;

/// Which function it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VfId {
    /// Its address.
    pub address: PciAddress,
    /// Its port's.
    pub port: PciAddress,
    /// Its number among the port's functions.
    pub index: VfIndex,
}

/// What a function is to be for somebody. What is `None` is not touched.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Wanted {
    /// What its port keeps.
    pub port: VfChange,
    /// The effective Ethernet address, where it is to be another than the administrator's of `port`.
    pub mac: Option<MacAddr>,
    /// The MTU.
    pub mtu: Option<Mtu>,
    /// Whether it receives all frames. Most drivers want trust for it.
    pub promisc: Option<bool>,
    /// Whether it receives all multicast frames. Most drivers want trust for it.
    pub all_multicast: Option<bool>,
    /// The driver of VFIO by which a program of the owner is to drive it, such as `vfio-pci`. It has no network device
    /// then, and what is wanted of that is not set; nor can any policy be put on it: what its port is told is all that
    /// holds it. Where the function has another driver, that is bound again when the lease ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

impl Wanted {
    /// The effective Ethernet address.
    fn mac(&self) -> Option<MacAddr> {
        self.mac.or(self.port.mac)
    }
}

/// What a function is made when its lease ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restore {
    /// What it was when the pool first saw it.
    #[default]
    Snapshot,
    /// The same, but no tag, no limit and no trust, its source addresses checked, its carrier that of its port, and
    /// down.
    Defaults,
}

impl Restore {
    fn of(self, home: VfSnapshot) -> VfSnapshot {
        match self {
            Self::Snapshot => home,
            Self::Defaults => home.with_defaults(),
        }
    }
}

/// Functions of this machine and who has them.
///
/// Any number of processes may have one on the same state directory: a function is locked while it is worked on.
#[derive(Clone)]
pub struct Leases {
    kernel: Arc<dyn Kernel>,
    scrub: Option<Arc<dyn DeviceScrub>>,
    ledger: Arc<VfLedger>,
    /// Where the ledger is.
    state: PathBuf,
    claims: Option<Arc<claim::Claims>>,
    restore: Restore,
    patience: Duration,
}

/// A lease that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The function.
    pub vf: PciAddress,
    /// Who has it.
    pub owner: AttachmentKey,
    /// The number of the lease.
    pub incarnation: u64,
    /// Whether the owner has it, or its making or its end was begun and has not finished.
    pub committed: bool,
}

/// What came of giving a function back.
#[derive(Debug)]
pub enum Released {
    /// It is what it was, as far as a [`VfSnapshot`] tells, and free. What a tenant set by ethtool, and a few
    /// attributes of links, are not among it: see [`NetdevSnapshot`].
    Clean,
    /// It is not, and in quarantine.
    Quarantined(Vec<LeaseError>),
    /// The machine has no such function any more: nothing is left to restore.
    Gone,
    /// No such lease stands. It has ended, or is another's.
    NotHeld,
}

impl Leases {
    /// The leases that are kept below a state directory, which a reboot must not empty. Creates nothing.
    ///
    /// # Errors
    /// Where the boot's id cannot be read.
    pub fn open(kernel: Arc<dyn Kernel>, state: &Path) -> Result<Self, LedgerError> {
        let ledger = Arc::new(VfLedger::open(state, LEDGER)?);
        // Others read it from elsewhere.
        let resolved = std::fs::canonicalize(state).or_else(|_| std::path::absolute(state));
        let state = resolved.unwrap_or_else(|_| state.to_owned());
        let (restore, patience) = (Restore::default(), PATIENCE);
        Ok(Self { kernel, scrub: None, ledger, state, claims: None, restore, patience })
    }

    /// With what takes foreign programs off devices. It is called in the host's namespace.
    pub fn with_scrub(self, scrub: Arc<dyn DeviceScrub>) -> Self {
        Self { scrub: Some(scrub), ..self }
    }

    /// With what functions are made when their leases end: those that are prepared from now on. It is written down with
    /// each.
    pub fn with_restore(self, restore: Restore) -> Self {
        Self { restore, ..self }
    }

    /// With another limit of the time that a network device may take to appear when its namespace has ended or its
    /// driver was bound, and that a driver may be busy; 10 s by default.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Makes a function what somebody wants, with its network device in the host's namespace and down, so that policy
    /// can be put on it. What an earlier call of a killed process left is taken back first.
    ///
    /// # Errors
    /// The function is what it was before, or in quarantine ([`LeaseError::Refused`]).
    ///
    /// # Minimum kernel version
    /// 5.14: functions are recognised by their address in any namespace.
    pub fn prepare(&self, owner: &AttachmentKey, vf: VfId, wanted: &Wanted) -> Result<VfLease<'_>, LeaseError> {
        let mut page = self.ledger.enter(&vf.address.to_string())?;
        let _claimed = self.claim(vf.address)?;
        let account = self.account(&mut page, Some(vf))?;
        let recorded = account.standing.as_ref().and_then(|standing| standing.vf).unwrap_or(vf);
        if let Some(quarantine) = account.standing.and_then(|standing| standing.quarantine) {
            return Err(LeaseError::Quarantined { vf: vf.address, reason: quarantine.reason });
        }
        if let Some(open) = account.open {
            if open.boot == self.ledger.boot() && is_committed(&open.steps) {
                let (owner, incarnation) = (Box::new(open.intent.owner), open.incarnation);
                return Err(LeaseError::Taken { vf: vf.address, owner, incarnation });
            }
            if let Released::Quarantined(errors) = self.take_back(&mut page, recorded, &open)? {
                return Err(LeaseError::Quarantined { vf: vf.address, reason: error::all(&errors) });
            }
        }
        self.confirm(vf)?;
        let work = self.work(vf, None);
        let mut seen = work.see()?;
        let home = self.home(&mut page, vf, &seen.now)?;
        let mut none = page.account()?.standing.as_ref().map(|standing| standing.no_address).unwrap_or_default();
        if !home.differences(&seen.now, none).is_empty() {
            let errors = work.restore(&home, &mut none);
            self.learn(&mut page, none)?;
            if !errors.is_empty() {
                let reason = error::all(&errors);
                self.quarantine(&mut page, vf, None, None, reason.clone())?;
                return Err(LeaseError::Quarantined { vf: vf.address, reason });
            }
            seen = work.see()?;
        }
        let group = wanted.driver.as_deref().map(|driver| self.group_for(vf, driver)).transpose()?;
        let driver = self.kernel.driver(vf.port)?.driver;
        let able = Capabilities::of(driver.as_deref(), &home.port).check_change(&wanted.port);
        able.map_err(|source| LeaseError::Unsupported { vf: vf.address, source })?;
        let intent = Intent { owner: owner.clone(), wanted: wanted.clone() };
        let incarnation = page.begin(&intent)?;
        let mut lease = VfLease::new(self, page, vf, incarnation, wanted.clone());
        match (Converge { pinned: wanted.port.mac, ..work }).reach_from(&home.with(wanted), &seen) {
            Ok(seen) => {
                lease.prepared(&seen, group);
                Ok(lease)
            }
            Err(errors) => Err(lease.refuse(errors)),
        }
    }

    /// Takes a function back from its owner: its network device comes home from wherever it is, everything is made what
    /// it was, and looked at. The caller has detached its policy before.
    ///
    /// A lease that has ended is no error, for DEL is repeated; and whoever was stopped in between cannot take the
    /// function from a later owner, because the incarnation is another.
    ///
    /// # Errors
    /// Where somebody works on the function now, or the ledger cannot be written. What the kernel refuses is none: the
    /// lease ends, and the function is in quarantine.
    pub fn release(&self, owner: &AttachmentKey, vf: PciAddress, incarnation: u64) -> Result<Released, LeaseError> {
        let Some(mut page) = self.ledger.find(&vf.to_string())? else { return Ok(Released::NotHeld) };
        let account = self.account(&mut page, None)?;
        let (Some(open), Some(standing)) = (account.open, account.standing) else { return Ok(Released::NotHeld) };
        let Some(id) = standing.vf else { return Ok(Released::NotHeld) };
        if open.incarnation != incarnation || open.intent.owner != *owner {
            return Ok(Released::NotHeld);
        }
        self.take_back(&mut page, id, &open)
    }

    /// The functions that nobody gets, whoever asks: those in quarantine, and those of which cannot be read who has them.
    ///
    /// # Errors
    /// As of [`held`](Self::held).
    pub fn quarantined(&self) -> Result<BTreeSet<PciAddress>, LeaseError> {
        let mut all = BTreeSet::new();
        for key in self.ledger.keys()? {
            let Ok(vf) = key.parse::<PciAddress>() else { continue };
            let quarantined = match self.ledger.read(&key) {
                Ok(account) => account.and_then(|a| a.standing).is_some_and(|standing| standing.quarantine.is_some()),
                Err(LedgerError::Malformed { .. }) => true,
                Err(error) => return Err(error.into()),
            };
            all.extend(quarantined.then_some(vf));
        }
        Ok(all)
    }

    /// In what a function is not what its owner was given: what its port keeps, its driver, and what was wanted of its
    /// network device, wherever that is. `None` where the owner has it no more. Nothing is locked.
    ///
    /// # Errors
    /// Where the ledger cannot be read, or the kernel does not answer.
    pub fn drift(&self, owner: &AttachmentKey, vf: PciAddress) -> Result<Option<Vec<Difference>>, LeaseError> {
        let account = match self.ledger.read(&vf.to_string()) {
            Err(LedgerError::Malformed { .. }) => None,
            account => account?,
        };
        let Some(VfAccount { standing: Some(standing), open: Some(open), .. }) = account else { return Ok(None) };
        let is_its = open.intent.owner == *owner && open.boot == self.ledger.boot() && is_committed(&open.steps);
        let (true, Some(id), Some(home)) = (is_its, standing.vf, standing.home) else { return Ok(None) };
        let wanted = &open.intent.wanted;
        let goal = standing.restore.of(home).with(wanted);
        let now = self.work(id, away(&open.steps)).snapshot_anywhere()?;
        let mut differences = goal.differences(&now, standing.no_address);
        differences.retain(|difference| match difference.what {
            // What the pod does with its device beside is its own affair, and whether there is one is seen there.
            "name" | "alternative names" | "alias" | "up" | "network device" => false,
            "effectiveMac" => wanted.mac().is_some(),
            "mtu" => wanted.mtu.is_some(),
            "promisc" => wanted.promisc.is_some(),
            "allMulticast" => wanted.all_multicast.is_some(),
            _ => true,
        });
        Ok(Some(differences))
    }

    /// Whether the machine means the same by it as the caller, whose inventory may be old: else somebody else's
    /// settings would be written.
    fn confirm(&self, vf: VfId) -> Result<(), LeaseError> {
        let there = match self.kernel.vf_address(vf.port, vf.index) {
            Err(error) if error.class == crate::kernel::ErrorClass::Gone => None,
            there => there?,
        };
        if there == Some(vf.address) {
            return Ok(());
        }
        self.work(vf, None).driver()?;
        Err(LeaseError::Another { vf: vf.address, port: vf.port, index: vf.index })
    }

    /// What the file says. One that is unreadable is set aside, and the function is nobody's until a person has looked
    /// at it: what it was is not known.
    fn account(&self, page: &mut VfPage, vf: Option<VfId>) -> Result<VfAccount, LeaseError> {
        let error = match page.account() {
            Ok(account) => return Ok(account.clone()),
            Err(error @ LedgerError::Malformed { .. }) => error,
            Err(error) => return Err(error.into()),
        };
        let Ok(address) = page.key().parse() else { return Err(error.into()) };
        let reason = format!("what it was is not known: {error}");
        let quarantine = Some(Quarantine { reason: reason.clone(), until: Until::Readmitted });
        let aside = page.set_aside(&Standing { quarantine, ..Standing::of(vf, self.ledger.boot()) })?;
        tracing::error!(vf = page.key(), aside = %aside.display(), %error, "a function's record was unreadable");
        Err(LeaseError::Quarantined { vf: address, reason })
    }

    /// What the function is while nobody has it.
    fn home(&self, page: &mut VfPage, vf: VfId, now: &VfSnapshot) -> Result<VfSnapshot, LeaseError> {
        let known = page.account()?.standing.clone();
        let known = known.filter(|standing| standing.boot == self.ledger.boot() && standing.vf == Some(vf));
        let Some((standing, home)) = known.and_then(|standing| Some((standing.clone(), standing.home?))) else {
            return self.first_see(page, vf, now);
        };
        if standing.restore != self.restore {
            page.stand(&Standing { restore: self.restore, ..standing })?;
        }
        Ok(self.restore.of(home))
    }

    /// Writes down what the function is now, and is to be whenever nobody has it.
    fn first_see(&self, page: &mut VfPage, vf: VfId, now: &VfSnapshot) -> Result<VfSnapshot, LeaseError> {
        if now.netdev.is_none()
            && now.driver.driver.as_deref().is_some_and(|driver| !crate::inventory::is_for_user_space(driver))
        {
            return Err(self.work(vf, None).unseen());
        }
        let (home, restore) = (Some(now.clone()), self.restore);
        page.stand(&Standing { home, restore, ..Standing::of(Some(vf), self.ledger.boot()) })?;
        Ok(restore.of(now.clone()))
    }

    /// Ends what was begun, whatever it takes.
    fn take_back(&self, page: &mut VfPage, vf: VfId, open: &VfOpen) -> Result<Released, LeaseError> {
        let standing = page.account()?.standing.clone();
        let mut none = standing.as_ref().map(|standing| standing.no_address).unwrap_or_default();
        let home = standing.filter(|_| open.boot == self.ledger.boot());
        let home = home.and_then(|standing| Some(standing.restore.of(standing.home?)));
        let Some(home) = home else {
            // The machine was started anew, and the function with it.
            self.forget(page, vf)?;
            page.end()?;
            return Ok(Released::Gone);
        };
        if is_committed(&open.steps) {
            page.step(&Step::Releasing)?;
        }
        let away = away(&open.steps);
        let errors = self.work(vf, away).restore(&home, &mut none);
        let released = self.settle(page, vf, away, Some(&open.intent.owner), none, errors)?;
        // Last: before, whoever finds the file does all this once more.
        page.end()?;
        Ok(released)
    }

    /// Writes down what came of restoring it, where its network device may be away with an owner.
    fn settle(
        &self,
        page: &mut VfPage,
        vf: VfId,
        away: Option<&Away>,
        owner: Option<&AttachmentKey>,
        none: NoAddress,
        errors: Vec<LeaseError>,
    ) -> Result<Released, LeaseError> {
        if errors.iter().any(|error| matches!(error, LeaseError::Gone { .. })) {
            self.forget(page, vf)?;
            return Ok(Released::Gone);
        }
        self.learn(page, none)?;
        if !errors.is_empty() {
            // Where there is no device, an owner can have none still.
            let hidden = errors.iter().any(|error| matches!(error, LeaseError::Hidden { .. }));
            let owner = owner.filter(|_| hidden);
            self.quarantine(page, vf, away, owner, error::all(&errors))?;
            return Ok(Released::Quarantined(errors));
        }
        if let Some(standing) = page.account()?.standing.clone().filter(|standing| standing.quarantine.is_some()) {
            page.stand(&Standing { quarantine: None, away: None, owner: None, ..standing })?;
        }
        Ok(Released::Clean)
    }

    /// Writes down what the driver takes an address of zeros for, where that is new.
    fn learn(&self, page: &mut VfPage, none: NoAddress) -> Result<(), LeaseError> {
        match page.account()?.standing.clone() {
            Some(standing) if standing.no_address != none => {
                Ok(page.stand(&Standing { no_address: none, ..standing })?)
            }
            _ => Ok(()),
        }
    }

    fn quarantine(
        &self,
        page: &mut VfPage,
        vf: VfId,
        away: Option<&Away>,
        owner: Option<&AttachmentKey>,
        reason: String,
    ) -> Result<(), LeaseError> {
        let boot = self.ledger.boot();
        let before = page.account()?.standing.clone();
        let standing = before.clone().unwrap_or_else(|| Standing::of(Some(vf), boot));
        let quarantine = Some(Quarantine { reason, until: Until::Restored });
        let (away, owner) = (away.cloned(), owner.cloned());
        let after = Standing { vf: Some(vf), boot: boot.to_owned(), quarantine, away, owner, ..standing };
        if before.as_ref() == Some(&after) {
            // A recovery that found nothing new must not make the file longer.
            return Ok(());
        }
        let reason = after.quarantine.as_ref().map(|quarantine| &*quarantine.reason);
        tracing::error!(vf = %vf.address, reason, "a function could not be restored and is in quarantine");
        Ok(page.stand(&after)?)
    }

    /// Forgets what the function was: the next one at this address is another.
    fn forget(&self, page: &mut VfPage, vf: VfId) -> Result<(), LedgerError> {
        page.stand(&Standing::of(Some(vf), self.ledger.boot()))
    }

    fn work<'a>(&'a self, vf: VfId, away: Option<&'a Away>) -> Converge<'a> {
        let (kernel, scrub, patience) = (&*self.kernel, self.scrub.as_deref(), self.patience);
        Converge { kernel, scrub, vf, away, patience, pinned: None }
    }
}

impl std::fmt::Debug for Leases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kernel, scrub, ledger, state: _, claims, restore, patience } = self;
        f.debug_struct("Leases")
            .field("kernel", kernel)
            .field("scrub", &scrub.is_some())
            .field("ledger", ledger)
            .field("claims", claims)
            .field("restore", restore)
            .field("patience", patience)
            .finish()
    }
}

fn holding(vf: PciAddress, open: VfOpen) -> Held {
    let committed = is_committed(&open.steps);
    Held { vf, owner: open.intent.owner, incarnation: open.incarnation, committed }
}

/// The directory below the state directory in which the ledger is.
pub(crate) const LEDGER: &str = "vfs";

const PATIENCE: Duration = Duration::from_secs(10);
