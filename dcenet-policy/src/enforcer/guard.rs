//! Guards on the parents of macvlans ([`dcenet_ebpf::datapath::guard`]).
//!
//! The owner alone puts them there: a client tells it of an endpoint while the device is down, and the guard knows the pod
//! before the answer. From then on a frame that bears the pod's Ethernet address, or comes from a socket of its namespace, is judged
//! on the parent by the endpoint's own policy, however it got there.
//!
//! Maps and links are pinned: what an owner has covered stays so when it dies, and the next one adopts it. A parent's links go with
//! the last pod on it. A device that outlives its attachment stays known, and nothing of it passes, until it vanishes.
//!
//! Others' programs on the parent go on as before: what the guard does not drop it leaves to them. It stands ahead of them, and
//! of unpoliced macvlans and of the host it sees no more than the Ethernet source.
//!
//! # Minimum kernel version
//! 6.13; without there is no guard, and endpoints stay
//! [`EgressBypassable`](dcenet_core::provider::Enforcement::EgressBypassable).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;

use dcenet_core::model::{AttachmentId, IfIndex};
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::{Endpoint, Place};
use dcenet_ebpf::abi::{Guarded, Namespace, Sender};
use dcenet_ebpf::attach::{AttachError, Attacher, Direction, Hook, TcxAttacher};
use dcenet_ebpf::datapath::{DatapathError, Slot, guard};
use dcenet_ebpf::loader::{LoadRequest, Loader};
use dcenet_ebpf::maps::{HashTable, Map, MapError, ProgramArray, Put};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use parking_lot::Mutex;

use super::config::DefaultVerdict;
use super::inside::Inside;
use super::node::{NodeMaps, open_or_make};
use super::{EnforcerError, LoweredObject, Lowering};

/// The guards of a node.
#[derive(Debug)]
pub(crate) struct Guard {
    senders: HashTable<Sender, Guarded>,
    namespaces: HashTable<Namespace, u64>,
    judges: ProgramArray,
    program: Program,
    deny: Program,
    allow: Program,
    links: TcxAttacher,
    covered: Mutex<Covered>,
}

#[derive(Debug, Default)]
struct Covered {
    pods: BTreeMap<AttachmentId, (Sender, Guarded)>,
    /// Parents that this owner has put the program on.
    parents: BTreeSet<u32>,
}

impl Covered {
    fn is_parent(&self, parent: u32) -> bool {
        self.pods.values().any(|(sender, _)| sender.parent == parent)
    }

    fn has_namespace(&self, namespace: Namespace) -> bool {
        self.pods.values().any(|(sender, pod)| of_pod(sender, pod) == namespace)
    }
}

impl Guard {
    /// Opens what is pinned and makes what is missing; none where the kernel lacks what it needs.
    pub(crate) fn open(
        pins: &Pins,
        maps: &NodeMaps,
        loader: &dyn Loader,
        lowering: &dyn Lowering,
    ) -> Result<Option<Self>, EnforcerError> {
        let has_all = Features::probe().is_ok_and(|features| features.tcx && features.netns_cookie);
        if !has_all {
            tracing::debug!(
                "the kernel has no bpf_get_netns_cookie for classifiers (Linux 6.13): no guards on parents"
            );
            return Ok(None);
        }
        let sizes = lowering.sizes();
        let [senders, namespaces, judges] = guard::maps(&sizes);
        let [senders, namespaces, judges] =
            [open_or_make(pins, &senders)?, open_or_make(pins, &namespaces)?, open_or_make(pins, &judges)?];
        let object = guard::program(&sizes).map_err(lowered)?;
        let object = LoweredObject::new(&object).map_err(|e| EnforcerError::Lowering(e.into()))?;
        let own = [(guard::SENDERS, &senders), (guard::NAMESPACES, &namespaces), (guard::JUDGES, &judges)];
        let program = load(maps, &own, loader, &object, guard::GUARD)?;
        let default = |verdict| {
            let object = lowering.default_object(verdict, Slot::Guarded).map_err(EnforcerError::Lowering)?;
            load(maps, &[], loader, &object, guard::FROM_GUARDED)
        };
        let (deny, allow) = (default(DefaultVerdict::Deny)?, default(DefaultVerdict::Allow)?);
        let senders: HashTable<Sender, Guarded> =
            HashTable::new(senders).map_err(|e| EnforcerError::map(guard::SENDERS, e))?;
        let mut covered = Covered::default();
        for (sender, pod) in senders.entries().map_err(|e| EnforcerError::map(guard::SENDERS, e))? {
            if let Ok(id) = format!("{:013x}", pod.attachment).parse() {
                covered.pods.insert(id, (sender, pod));
            }
        }
        Ok(Some(Self {
            senders,
            namespaces: HashTable::new(namespaces).map_err(|e| EnforcerError::map(guard::NAMESPACES, e))?,
            judges: ProgramArray::new(judges).map_err(|e| EnforcerError::map(guard::JUDGES, e))?,
            program,
            deny,
            allow,
            links: TcxAttacher::new(pins.clone()),
            covered: Mutex::new(covered),
        }))
    }

    /// What judges a pod whose policy is not known.
    pub(crate) fn default(&self, verdict: DefaultVerdict) -> &Program {
        match verdict {
            DefaultVerdict::Deny => &self.deny,
            DefaultVerdict::Allow => &self.allow,
        }
    }

    /// Has a pod judged on its parent, too. An endpoint that is no macvlan, or whose namespace cannot be reached any more, stays as
    /// it is.
    pub(crate) fn cover(
        &self,
        host: &NetNs,
        endpoint: &Endpoint,
        slot: u16,
        judge: &Program,
    ) -> Result<(), EnforcerError> {
        let id = endpoint.attachment.id();
        self.judges.set(slot.into(), judge).map_err(|e| EnforcerError::map(guard::JUDGES, e))?;
        let mut covered = self.covered.lock();
        if let Some((sender, pod)) = covered.pods.get(&id)
            && sender.mac == endpoint.mac.bytes()
            && pod.slot == u32::from(slot)
            && covered.parents.contains(&sender.parent)
        {
            return Ok(());
        }
        let Some((parent, netns)) = below(endpoint)? else { return Ok(()) };
        let sender = Sender { mac: endpoint.mac.bytes(), parent: parent.get() };
        if !covered.parents.contains(&parent.get()) {
            host.run_here_or_there(|| self.attach(parent))??;
            covered.parents.insert(parent.get());
        }
        let pod = Guarded { attachment: id.get(), netns, slot: slot.into() };
        self.namespaces
            .store(&of_pod(&sender, &pod), &1, Put::Any)
            .map_err(|e| EnforcerError::map(guard::NAMESPACES, e))?;
        self.senders.store(&sender, &pod, Put::Any).map_err(senders)?;
        let before = covered.pods.insert(id, (sender, pod));
        match before {
            Some((old, _)) if old != sender => self.forget_sender(&covered, old, id),
            _ => Ok(()),
        }
    }

    fn attach(&self, device: IfIndex) -> Result<(), AttachError> {
        for direction in [Direction::Ingress, Direction::Egress] {
            self.links.attach(Hook { device, direction }, &self.program, &label(device.get()))?;
        }
        Ok(())
    }

    /// Whether a pod is judged on its parent.
    pub(crate) fn covers(&self, id: AttachmentId) -> bool {
        let covered = self.covered.lock();
        covered.pods.get(&id).is_some_and(|(sender, _)| covered.parents.contains(&sender.parent))
    }

    /// As [`Guard::covers`], where the parent's links are looked at. One that somebody has taken away is put back with the next change.
    pub(crate) fn holds(&self, id: AttachmentId) -> Result<bool, AttachError> {
        let mut covered = self.covered.lock();
        let Some(parent) = covered.pods.get(&id).map(|(sender, _)| sender.parent) else { return Ok(false) };
        let links = self.links.links_of(|of| of == label(parent))?;
        let living: BTreeSet<Direction> =
            links.iter().filter(|link| link.device.is_some()).map(|link| link.direction).collect();
        if living.len() < 2 {
            covered.parents.remove(&parent);
        }
        Ok(covered.parents.contains(&parent))
    }

    /// Lets nothing of an attachment pass whose device lives on.
    pub(crate) fn shut(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        let mut covered = self.covered.lock();
        let Some((sender, pod)) = covered.pods.get_mut(&id) else { return Ok(()) };
        pod.slot = 0;
        self.senders.store(sender, pod, Put::Any).map_err(senders)
    }

    /// Forgets an attachment whose device is gone, and takes the guard off with the last one of its parent.
    pub(crate) fn forget(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        let mut covered = self.covered.lock();
        let Some((sender, pod)) = covered.pods.remove(&id) else { return Ok(()) };
        let namespace = of_pod(&sender, &pod);
        if !covered.has_namespace(namespace) {
            self.namespaces.remove(&namespace).map_err(|e| EnforcerError::map(guard::NAMESPACES, e))?;
        }
        self.forget_sender(&covered, sender, id)?;
        if !covered.is_parent(sender.parent) {
            covered.parents.remove(&sender.parent);
            self.links.release(&label(sender.parent))?;
        }
        Ok(())
    }

    fn forget_sender(&self, covered: &Covered, sender: Sender, id: AttachmentId) -> Result<(), EnforcerError> {
        // Another may have the address since.
        let is_others = covered.pods.iter().any(|(other, (known, _))| *other != id && *known == sender);
        if !is_others {
            self.senders.remove(&sender).map_err(senders)?;
        }
        Ok(())
    }

    /// Forgets who is neither known nor has a device.
    pub(crate) fn forget_vanished(&self, inside: &Inside, known: &BTreeSet<AttachmentId>) -> Result<(), EnforcerError> {
        let mut gone: Vec<AttachmentId> =
            self.covered.lock().pods.keys().filter(|id| !known.contains(id)).copied().collect();
        if gone.is_empty() {
            return Ok(());
        }
        let living = inside.living()?;
        gone.retain(|id| !living.contains(id));
        gone.into_iter().try_for_each(|id| self.forget(id))
    }

    /// Takes all guards off.
    pub(crate) fn clear(&self) -> Result<(), AttachError> {
        for link in self.links.links_of(|label| label.starts_with(LABEL))? {
            self.links.release(&link.label)?;
        }
        Ok(())
    }
}

/// The parent of an endpoint's macvlan, and the cookie of its namespace.
fn below(endpoint: &Endpoint) -> Result<Option<(IfIndex, u64)>, EnforcerError> {
    let Place::Pod { path, netns } = &endpoint.place else { return Ok(None) };
    let pod = match NetNs::open(path) {
        Ok(pod) if pod.id() == *netns => pod,
        // Its policy goes on, by its links.
        Ok(_) => return Ok(None),
        Err(error) if error.is_gone() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let links = pod.socket(Family::Route)?.links().map_err(AttachError::from)?;
    let device = links.into_iter().find(|link| link.index == endpoint.ifindex);
    let Some(parent) = device.filter(|link| link.kind.as_deref() == Some("macvlan")).and_then(|link| link.peer) else {
        return Ok(None);
    };
    let cookie = pod.run(guard::netns_cookie)?.map_err(AttachError::from)?;
    Ok(Some((parent, cookie)))
}

fn of_pod(sender: &Sender, pod: &Guarded) -> Namespace {
    Namespace { netns: pod.netns, parent: sender.parent }
}

fn load(
    maps: &NodeMaps,
    own: &[(&str, &Map)],
    loader: &dyn Loader,
    object: &LoweredObject,
    name: &str,
) -> Result<Program, EnforcerError> {
    let has = |name: &str| object.maps.iter().any(|map| map == name);
    let all = maps.all().chain(own.iter().copied());
    let used: Vec<_> = all.filter(|(name, _)| has(name)).map(|(name, map)| (name, map.as_fd())).collect();
    let mut loaded = loader.load(&object.elf, &LoadRequest { maps: &used })?;
    let missing = || EnforcerError::Lowering(format!("the object has no program {name:?}").into());
    loaded.take_program(name).ok_or_else(missing)
}

fn label(parent: u32) -> String {
    format!("{LABEL}{parent}")
}

fn senders(error: MapError) -> EnforcerError {
    EnforcerError::map(guard::SENDERS, error)
}

fn lowered(error: DatapathError) -> EnforcerError {
    EnforcerError::Lowering(error.into())
}

/// Before the parent's index; no attachment's id.
const LABEL: &str = "guard-";
