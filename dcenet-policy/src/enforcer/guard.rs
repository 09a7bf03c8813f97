//! Guards on the parents of macvlans ([`dcenet_ebpf::datapath::guard`]), for the endpoints that want one.
//!
//! The owner alone puts them there: a client tells it of an endpoint while the device is down, and the guard knows the pod
//! before the answer. From then on a frame that bears the pod's Ethernet address, or comes from a socket of its namespace, is judged
//! on the parent by the endpoint's own policy, however it got there.
//!
//! Where no endpoint wants one nothing is loaded, and no namespace is entered. What keeps an endpoint from having its guard is
//! remembered, for whoever asks; it keeps nothing else of the owner from working.
//!
//! Maps and links are pinned: what an owner has covered stays so when it dies, and the next one adopts it: who is in the map of
//! senders wanted it. A parent's links go with the last pod on it, and are put back where somebody has taken them off. A device that
//! outlives its attachment stays known, and nothing of it passes, until it vanishes.
//!
//! Others' programs on the parent go on as before: what the guard does not drop it leaves to them. It stands ahead of those that
//! were there; what somebody puts ahead of it later can let frames pass it by, and a check of the pod tells of that. Of unpoliced macvlans and of the host it sees no more than the Ethernet source.
//!
//! # Minimum kernel version
//! 6.13; without there is no guard, and endpoints stay
//! [`EgressBypassable`](dcenet_core::provider::Enforcement::EgressBypassable).

mod parents;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dcenet_core::model::AttachmentId;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::Endpoint;
use dcenet_ebpf::abi::{Guarded, Sender};
use dcenet_ebpf::attach::{AttachError, Attached, TcxAttacher};
use dcenet_ebpf::datapath::guard;
use dcenet_ebpf::loader::Loader;
use dcenet_ebpf::maps::{HashTable, Map, MapError};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;
use parking_lot::Mutex;

use super::config::DefaultVerdict;
use super::inside::Inside;
use super::node::NodeMaps;
use super::state::Shared;
use super::{EnforcerError, Lowering};
use parents::Guard;

/// The guards of a node, which are opened for the first endpoint that wants one.
#[derive(Debug)]
pub(crate) struct Guards {
    pins: Pins,
    links: TcxAttacher,
    guard: Mutex<Option<Arc<Guard>>>,
    refused: Mutex<BTreeMap<AttachmentId, Refusal>>,
}

/// Why an endpoint that wants a guard has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    /// Whether another attempt may succeed as things are.
    pub(crate) may_pass: bool,
}

/// What judges a pod on its parent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Judge<'a> {
    /// Its own policy.
    Own(&'a Program),
    /// As its policy is not known.
    Default(DefaultVerdict),
    /// What does already, and the default that denies where nothing does.
    Present,
}

impl Guards {
    /// Takes over what an earlier owner has left. Where that fails it stays as it is, and is tried again when a guard is wanted.
    pub(crate) fn resume(
        host: &NetNs,
        pins: &Pins,
        maps: &NodeMaps,
        loader: &dyn Loader,
        lowering: &dyn Lowering,
    ) -> Self {
        let (pins, links) = (pins.clone(), TcxAttacher::new(pins.clone()));
        let guards = Self { pins, links, guard: Mutex::default(), refused: Mutex::default() };
        let opened = match guards.are_in_use() {
            Ok(false) => return guards,
            Ok(true) => guards.open(host, maps, loader, lowering).map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = opened {
            tracing::warn!(%error, "guards on parents of macvlans stay as an earlier owner has left them");
        }
        guards
    }

    /// Whether an earlier owner has left pods or links.
    fn are_in_use(&self) -> Result<bool, EnforcerError> {
        if let Some(fd) = self.pins.get(guard::SENDERS)? {
            let map = Map::from_fd(fd).map_err(|e| EnforcerError::map(guard::SENDERS, e))?;
            let senders: HashTable<Sender, Guarded> = HashTable::new(map).map_err(senders)?;
            if !senders.entries().map_err(self::senders)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(!self.links.links_of(|label| label.starts_with(LABEL))?.is_empty())
    }

    /// What is open.
    fn get(&self) -> Option<Arc<Guard>> {
        self.guard.lock().clone()
    }

    fn open(
        &self,
        host: &NetNs,
        maps: &NodeMaps,
        loader: &dyn Loader,
        lowering: &dyn Lowering,
    ) -> Result<Arc<Guard>, EnforcerError> {
        let mut open = self.guard.lock();
        if let Some(guard) = &*open {
            return Ok(Arc::clone(guard));
        }
        let guard = Arc::new(Guard::open(&self.pins, maps, loader, lowering)?);
        guard.reconcile(host);
        *open = Some(Arc::clone(&guard));
        Ok(guard)
    }

    /// Who is covered.
    pub(crate) fn ids(&self) -> BTreeSet<AttachmentId> {
        self.get().map(|guard| guard.ids()).unwrap_or_default()
    }

    /// Whether a pod is judged on its parent, as of the last look at it.
    pub(crate) fn covers(&self, id: AttachmentId) -> bool {
        self.get().is_some_and(|guard| guard.covers(id))
    }

    /// As [`Guards::covers`], looked at now, with the programs of others that frames meet before the guard; where it is not, why.
    pub(crate) fn holds(
        &self,
        host: &NetNs,
        id: AttachmentId,
    ) -> Result<Result<Vec<Attached>, Refusal>, EnforcerError> {
        let guard = self.get();
        if let Some(guard) = &guard
            && guard.holds(id)?
        {
            return Ok(Ok(guard.before(host, id)?));
        }
        if let Some(refusal) = self.refused.lock().get(&id) {
            return Ok(Err(refusal.clone()));
        }
        let is_known = guard.is_some_and(|guard| guard.ids().contains(&id));
        let reason = if is_known { TAKEN_OFF } else { "the owner has not come to it yet" };
        Ok(Err(Refusal { reason: reason.to_owned(), may_pass: !is_known }))
    }

    /// Lets nothing of an attachment pass whose device lives on.
    pub(crate) fn shut(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        self.refused.lock().remove(&id);
        self.get().map_or(Ok(()), |guard| guard.shut(id))
    }

    /// Forgets an attachment whose device is gone, or that wants no guard.
    pub(crate) fn forget(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        self.refused.lock().remove(&id);
        self.get().map_or(Ok(()), |guard| guard.forget(id))
    }

    /// Forgets who is neither known nor has a device, and puts back what somebody has taken off.
    pub(crate) fn sweep(
        &self,
        host: &NetNs,
        inside: &Inside,
        known: &BTreeSet<AttachmentId>,
    ) -> Result<(), EnforcerError> {
        let Some(guard) = self.get() else { return Ok(()) };
        let forgotten = guard.forget_vanished(inside, known);
        guard.mend(host).and(forgotten)
    }

    /// Takes all guards off.
    pub(crate) fn clear(&self) -> Result<(), AttachError> {
        for link in self.links.links_of(|label| label.starts_with(LABEL))? {
            self.links.release(&link.label)?;
        }
        Ok(())
    }
}

/// Whether what an owner has left judges an endpoint on its parent, for one who asks while no owner runs: by what is pinned alone,
/// so that programs of others ahead of the guard stay unseen.
pub(crate) fn is_pinned(pins: &Pins, endpoint: &Endpoint) -> Result<bool, EnforcerError> {
    let Some(fd) = pins.get(guard::SENDERS)? else { return Ok(false) };
    let map = Map::from_fd(fd).map_err(|e| EnforcerError::map(guard::SENDERS, e))?;
    let table: HashTable<Sender, Guarded> = HashTable::new(map).map_err(senders)?;
    let links = TcxAttacher::new(pins.clone());
    let id = endpoint.attachment.id().get();
    for (sender, guarded) in table.entries().map_err(senders)? {
        let is_its = guarded.attachment == id && sender.mac == endpoint.mac.bytes();
        if is_its && parents::has_links(&links, sender.parent)? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Shared {
    /// Has a pod judged on its parent, too. Where that can never be, it is noted and no error: the pod's own device is under policy
    /// all the same.
    pub(crate) fn cover(&self, endpoint: &Endpoint, slot: u16, judge: Judge<'_>) -> Result<(), EnforcerError> {
        let (id, host) = (endpoint.attachment.id(), &self.host.0);
        let guard = self.guards.open(host, &self.maps, &*self.tools.loader, &*self.tools.lowering);
        let Err(error) = guard.and_then(|guard| guard.cover(host, endpoint, slot, judge)) else {
            self.guards.refused.lock().remove(&id);
            return Ok(());
        };
        let refusal = Refusal { reason: error.to_string(), may_pass: may_pass(&error) };
        if refusal.may_pass {
            self.guards.refused.lock().insert(id, refusal);
            return Err(error);
        }
        // What an earlier device of it left would be judged by a policy that nobody keeps.
        self.guards.forget(id)?;
        tracing::warn!(attachment = %endpoint.attachment, %error, "it wants a guard, and gets none");
        self.guards.refused.lock().insert(id, refusal);
        Ok(())
    }
}

fn may_pass(error: &EnforcerError) -> bool {
    !matches!(
        error,
        EnforcerError::Unguarded { .. }
            | EnforcerError::OtherLayout { .. }
            | EnforcerError::Kernel { .. }
            | EnforcerError::Lowering(_)
            | EnforcerError::Attach(AttachError::Unsupported { .. })
    )
}

fn senders(error: MapError) -> EnforcerError {
    EnforcerError::map(guard::SENDERS, error)
}

/// Before the parent's index; no attachment's id.
const LABEL: &str = "guard-";

const TAKEN_OFF: &str = "somebody has taken its links, or what they know of the pod, away; the owner puts them back";
