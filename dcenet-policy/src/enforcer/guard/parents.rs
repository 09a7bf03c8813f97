//! The guard's program on parents of macvlans, and what its maps hold of the pods below.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;

use dcenet_core::model::{AttachmentId, IfIndex};
use dcenet_core::netlink::Family;
use dcenet_core::netns::{NetNs, NetNsId};
use dcenet_core::provider::{Endpoint, Place};
use dcenet_ebpf::abi::{Guarded, Namespace, Sender};
use dcenet_ebpf::attach::{AttachError, Attached, Attacher, Direction, Hook, TcxAttacher, Via, XdpMode};
use dcenet_ebpf::datapath::{DatapathError, Slot, guard};
use dcenet_ebpf::loader::{LoadRequest, Loader};
use dcenet_ebpf::maps::{HashTable, Map, MapError, ProgramArray, Put};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use parking_lot::Mutex;

use super::super::config::DefaultVerdict;
use super::super::inside::Inside;
use super::super::node::{NodeMaps, open_or_make};
use super::super::{EnforcerError, LoweredObject, Lowering};
use super::{Judge, LABEL, senders};

/// The guard's program, its maps, and whom they cover.
#[derive(Debug)]
pub(super) struct Guard {
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
    pods: BTreeMap<AttachmentId, Pod>,
    /// Parents whose links were both there at the last look.
    parents: BTreeSet<u32>,
}

/// What the maps hold of a pod.
#[derive(Debug, Clone, Copy)]
struct Pod {
    sender: Sender,
    guarded: Guarded,
    /// The device that it was read from; none where an earlier owner has, of a device that may be another by now.
    device: Option<(NetNsId, IfIndex)>,
}

impl Pod {
    fn namespace(&self) -> Namespace {
        of_pod(&self.sender, &self.guarded)
    }
}

impl Covered {
    fn has_slot(&self, slot: u32, but: Option<AttachmentId>) -> bool {
        self.others(but).any(|pod| pod.guarded.slot == slot)
    }

    fn others(&self, but: Option<AttachmentId>) -> impl Iterator<Item = &Pod> {
        self.pods.iter().filter(move |(id, _)| Some(**id) != but).map(|(_, pod)| pod)
    }
}

impl Guard {
    /// Opens what is pinned and makes what is missing.
    pub(super) fn open(
        pins: &Pins,
        maps: &NodeMaps,
        loader: &dyn Loader,
        lowering: &dyn Lowering,
    ) -> Result<Self, EnforcerError> {
        let features = Features::probe()?;
        if !features.tcx || !features.netns_cookie {
            let reason = "the kernel has no bpf_get_netns_cookie for classifiers (Linux 6.13)".to_owned();
            return Err(EnforcerError::Unguarded { reason });
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
        let senders: HashTable<Sender, Guarded> = HashTable::new(senders).map_err(self::senders)?;
        let mut covered = Covered::default();
        for (sender, guarded) in senders.entries().map_err(self::senders)? {
            if let Some(id) = id_of(&guarded) {
                covered.pods.insert(id, Pod { sender, guarded, device: None });
            }
        }
        Ok(Self {
            senders,
            namespaces: HashTable::new(namespaces).map_err(self::namespaces)?,
            judges: ProgramArray::new(judges).map_err(self::judges)?,
            program,
            deny,
            allow,
            links: TcxAttacher::new(pins.clone()),
            covered: Mutex::new(covered),
        })
    }

    /// Gives the parents this owner's program, and takes away what an earlier owner that died in the middle has left of no pod. What
    /// fails is told, and nothing else suffers.
    pub(super) fn reconcile(&self, host: &NetNs) {
        let mut covered = self.covered.lock();
        let parents: BTreeSet<u32> = covered.pods.values().map(|pod| pod.sender.parent).collect();
        for parent in parents.iter().copied() {
            if let Err(error) = self.put_on(host, &mut covered, parent) {
                let holds = self.look_at(&mut covered, parent).unwrap_or(false);
                tracing::warn!(parent, holds, %error, "this parent has not got this owner's guard");
            }
        }
        drop(covered);
        let outcomes = [self.drop_entries(), self.drop_judges(), self.drop_links(&parents)];
        for error in outcomes.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "what an earlier owner's guards have left stays");
        }
    }

    fn drop_entries(&self) -> Result<(), EnforcerError> {
        let (known, strange): (Vec<_>, Vec<_>) =
            self.senders.entries().map_err(senders)?.into_iter().partition(|(_, pod)| id_of(pod).is_some());
        for (sender, _) in strange {
            self.senders.remove(&sender).map_err(senders)?;
        }
        let needed: Vec<Namespace> = known.iter().map(|(sender, pod)| of_pod(sender, pod)).collect();
        for (namespace, _) in self.namespaces.entries().map_err(namespaces)? {
            if !needed.contains(&namespace) {
                self.namespaces.remove(&namespace).map_err(namespaces)?;
            }
        }
        Ok(())
    }

    fn drop_judges(&self) -> Result<(), EnforcerError> {
        let used: BTreeSet<u32> = self.covered.lock().pods.values().map(|pod| pod.guarded.slot).collect();
        for slot in (0..self.judges.entries()).filter(|slot| !used.contains(slot)) {
            self.judges.clear(slot).map_err(judges)?;
        }
        Ok(())
    }

    fn drop_links(&self, parents: &BTreeSet<u32>) -> Result<(), EnforcerError> {
        let is_needed = |of: &str| parents.iter().any(|parent| of == label(*parent));
        for link in self.links.links_of(|label| label.starts_with(LABEL) && !is_needed(label))? {
            self.links.release(&link.label)?;
        }
        Ok(())
    }

    /// Has a pod judged on its parent, too. One whose namespace cannot be reached any more stays as it was written down.
    pub(super) fn cover(
        &self,
        host: &NetNs,
        endpoint: &Endpoint,
        slot: u16,
        judge: Judge<'_>,
    ) -> Result<(), EnforcerError> {
        let id = endpoint.attachment.id();
        let Place::Pod { path, netns } = &endpoint.place else {
            return Err(EnforcerError::Unguarded { reason: "its device is on the host".to_owned() });
        };
        let (device, slot) = ((*netns, endpoint.ifindex), u32::from(slot));
        let mut covered = self.covered.lock();
        let before = covered.pods.get(&id).copied();
        let has_judge = before.is_some_and(|pod| pod.guarded.slot == slot);
        // Of an endpoint that is told of now the numbers alone prove nothing: its namespace may have those of an earlier one.
        let is_told = !matches!(judge, Judge::Own(_));
        let is_same = !is_told
            && before.is_some_and(|pod| {
                pod.device == Some(device) && pod.sender.mac == endpoint.mac.bytes() && pod.guarded.slot == slot
            });
        let pod = match (before, is_same) {
            (Some(pod), true) => pod,
            _ => match (below(host, endpoint)?, before) {
                (Some((parent, netns)), _) => Pod {
                    sender: Sender { mac: endpoint.mac.bytes(), parent: parent.get() },
                    guarded: Guarded { attachment: id.get(), netns, slot },
                    device: Some(device),
                },
                (None, Some(pod)) => Pod { guarded: Guarded { slot, ..pod.guarded }, device: None, ..pod },
                (None, None) => {
                    let reason = format!("its namespace {} cannot be reached", path.display());
                    return Err(EnforcerError::Unguarded { reason });
                }
            },
        };
        let judge = match judge {
            Judge::Own(program) => Some(program),
            Judge::Default(DefaultVerdict::Allow) => Some(&self.allow),
            Judge::Present if has_judge => None,
            Judge::Default(DefaultVerdict::Deny) | Judge::Present => Some(&self.deny),
        };
        if let Err(error) = self.enter(host, &mut covered, &pod, judge) {
            if before.is_none()
                && let Err(left) = self.let_go(&mut covered, &pod, None)
            {
                tracing::warn!(attachment = %endpoint.attachment, error = %left, "parts of its guard stay");
            }
            return Err(error);
        }
        covered.pods.insert(id, pod);
        match before.filter(|_| !is_same) {
            Some(old) => {
                self.remove_senders(id, Some(pod.sender))?;
                self.let_go(&mut covered, &old, None)
            }
            None => Ok(()),
        }
    }

    /// What is called first, the sender last: from then on its frames are judged.
    fn enter(
        &self,
        host: &NetNs,
        covered: &mut Covered,
        pod: &Pod,
        judge: Option<&Program>,
    ) -> Result<(), EnforcerError> {
        if let Some(program) = judge {
            self.judges.set(pod.guarded.slot, program).map_err(judges)?;
        }
        if !covered.parents.contains(&pod.sender.parent) {
            self.put_on(host, covered, pod.sender.parent)?;
        }
        self.write(pod)
    }

    /// The namespace first: without it the sender's frames are believed by their source alone.
    fn write(&self, pod: &Pod) -> Result<(), EnforcerError> {
        self.namespaces.store(&pod.namespace(), &1, Put::Any).map_err(namespaces)?;
        self.senders.store(&pod.sender, &pod.guarded, Put::Any).map_err(senders)
    }

    /// Puts the program on both hooks of a parent, or in the place of an earlier owner's.
    fn put_on(&self, host: &NetNs, covered: &mut Covered, parent: u32) -> Result<(), EnforcerError> {
        covered.parents.remove(&parent);
        let gone = || EnforcerError::Unguarded { reason: "its parent has no index".to_owned() };
        let device = IfIndex::new(parent).ok_or_else(gone)?;
        host.run_here_or_there(|| {
            for direction in [Direction::Ingress, Direction::Egress] {
                self.links.attach(Hook { device, direction }, &self.program, &label(parent))?;
            }
            Ok::<_, AttachError>(())
        })??;
        covered.parents.insert(parent);
        Ok(())
    }

    /// Whether a parent has both links now.
    fn look_at(&self, covered: &mut Covered, parent: u32) -> Result<bool, AttachError> {
        let both = has_links(&self.links, parent)?;
        covered.parents.remove(&parent);
        covered.parents.extend(both.then_some(parent));
        Ok(both)
    }

    pub(super) fn ids(&self) -> BTreeSet<AttachmentId> {
        self.covered.lock().pods.keys().copied().collect()
    }

    pub(super) fn covers(&self, id: AttachmentId) -> bool {
        let covered = self.covered.lock();
        covered.pods.get(&id).is_some_and(|pod| pod.guarded.slot != 0 && covered.parents.contains(&pod.sender.parent))
    }

    pub(super) fn holds(&self, id: AttachmentId) -> Result<bool, EnforcerError> {
        let mut covered = self.covered.lock();
        let Some(pod) = covered.pods.get(&id).copied() else { return Ok(false) };
        let is_written = self.senders.load(&pod.sender).map_err(senders)? == Some(pod.guarded);
        Ok(self.look_at(&mut covered, pod.sender.parent)? && is_written)
    }

    /// Programs of others that frames of a pod meet on its parent before the guard: not those in the driver, where only what
    /// the wire brings comes by.
    pub(super) fn before(&self, host: &NetNs, id: AttachmentId) -> Result<Vec<Attached>, EnforcerError> {
        let parent = self.covered.lock().pods.get(&id).and_then(|pod| IfIndex::new(pod.sender.parent));
        let Some(device) = parent else { return Ok(Vec::new()) };
        let before = host.run_here_or_there(|| {
            let mut all = Vec::new();
            for direction in [Direction::Ingress, Direction::Egress] {
                all.extend(self.links.before(Hook { device, direction })?);
            }
            all.retain(|program| !is_in_driver(program));
            Ok::<_, AttachError>(all)
        })??;
        Ok(before)
    }

    pub(super) fn shut(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        let mut covered = self.covered.lock();
        let Some(pod) = covered.pods.get(&id).copied() else { return Ok(()) };
        let guarded = Guarded { slot: 0, ..pod.guarded };
        self.senders.store(&pod.sender, &guarded, Put::Any).map_err(senders)?;
        covered.pods.insert(id, Pod { guarded, ..pod });
        self.drop_judge(&covered, pod.guarded.slot, None)
    }

    pub(super) fn forget(&self, id: AttachmentId) -> Result<(), EnforcerError> {
        let mut covered = self.covered.lock();
        let Some(pod) = covered.pods.get(&id).copied() else { return Ok(()) };
        self.remove_senders(id, None)?;
        self.let_go(&mut covered, &pod, Some(id))?;
        // Last: what has failed is tried again.
        covered.pods.remove(&id);
        Ok(())
    }

    /// Removes what the map holds of an attachment, but for one entry. Another pod may have an address since, and keeps it.
    fn remove_senders(&self, id: AttachmentId, but: Option<Sender>) -> Result<(), EnforcerError> {
        for (sender, pod) in self.senders.entries().map_err(senders)? {
            if pod.attachment == id.get() && Some(sender) != but {
                self.senders.remove(&sender).map_err(senders)?;
            }
        }
        Ok(())
    }

    /// Takes away what a pod had that none of the others has.
    fn let_go(&self, covered: &mut Covered, old: &Pod, but: Option<AttachmentId>) -> Result<(), EnforcerError> {
        if !covered.others(but).any(|pod| pod.namespace() == old.namespace()) {
            self.namespaces.remove(&old.namespace()).map_err(namespaces)?;
        }
        self.drop_judge(covered, old.guarded.slot, but)?;
        let parent = old.sender.parent;
        if !covered.others(but).any(|pod| pod.sender.parent == parent) {
            covered.parents.remove(&parent);
            self.links.release(&label(parent))?;
        }
        Ok(())
    }

    fn drop_judge(&self, covered: &Covered, slot: u32, but: Option<AttachmentId>) -> Result<(), EnforcerError> {
        if slot != 0 && !covered.has_slot(slot, but) {
            self.judges.clear(slot).map_err(judges)?;
        }
        Ok(())
    }

    pub(super) fn forget_vanished(&self, inside: &Inside, known: &BTreeSet<AttachmentId>) -> Result<(), EnforcerError> {
        let mut gone: Vec<AttachmentId> =
            self.covered.lock().pods.keys().filter(|id| !known.contains(id)).copied().collect();
        if gone.is_empty() {
            return Ok(());
        }
        let living = inside.living()?;
        gone.retain(|id| !living.contains(id));
        gone.into_iter().try_for_each(|id| self.forget(id))
    }

    /// Puts back links and entries that somebody has taken away. The first error is told when all is tried.
    pub(super) fn mend(&self, host: &NetNs) -> Result<(), EnforcerError> {
        let mut covered = self.covered.lock();
        let parents: BTreeSet<u32> = covered.pods.values().map(|pod| pod.sender.parent).collect();
        let mut first = None;
        for parent in parents {
            let mended = match self.look_at(&mut covered, parent) {
                Ok(true) => continue,
                Ok(false) => self.put_on(host, &mut covered, parent),
                Err(error) => Err(error.into()),
            };
            match mended {
                Ok(()) => tracing::warn!(parent, "somebody had taken the guard off this parent; it is there again"),
                Err(error) => drop(first.get_or_insert(error)),
            }
        }
        for pod in covered.pods.values() {
            let written = match self.senders.load(&pod.sender).map_err(senders) {
                Ok(found) if found == Some(pod.guarded) => continue,
                Ok(_) => self.write(pod),
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }
}

/// Whether a parent has both links now.
pub(super) fn has_links(links: &TcxAttacher, parent: u32) -> Result<bool, AttachError> {
    let links = links.links_of(|of| of == label(parent))?;
    let lives = |direction| {
        let is_it = |device: IfIndex| device.get() == parent;
        links.iter().any(|link| link.direction == direction && link.device.is_some_and(is_it))
    };
    Ok(lives(Direction::Ingress) && lives(Direction::Egress))
}

/// The parent of an endpoint's macvlan, and the cookie of its namespace; none where that cannot be reached.
fn below(host: &NetNs, endpoint: &Endpoint) -> Result<Option<(IfIndex, u64)>, EnforcerError> {
    let Place::Pod { path, netns } = &endpoint.place else { return Ok(None) };
    let pod = match NetNs::open(path) {
        Ok(pod) if pod.id() == *netns => pod,
        Ok(_) => return Ok(None),
        Err(error) if error.is_gone() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let refused = |reason: String| EnforcerError::Unguarded { reason };
    let links = pod.socket(Family::Route)?.links().map_err(AttachError::from)?;
    let device = links.into_iter().find(|link| link.index == endpoint.ifindex);
    let device = device.ok_or_else(|| refused(format!("its device has left the namespace {}", path.display())))?;
    let kind = device.kind.unwrap_or_default();
    let parent = match (kind.as_str(), device.peer) {
        ("macvlan", Some(parent)) => parent,
        _ => {
            return Err(refused(format!(
                "guards are for macvlans, and its device {} is of kind {kind:?}",
                device.name
            )));
        }
    };
    let parents = host.socket(Family::Route)?.links().map_err(AttachError::from)?;
    let above = parents.into_iter().find(|link| link.index == parent);
    let above = above.ok_or_else(|| refused("its parent is not in the host's namespace".to_owned()))?;
    if above.mac == Some(endpoint.mac) {
        return Err(refused(format!(
            "its device {} has the Ethernet address of the parent {} (mode passthru), so that its frames cannot be told from those \
             of the host; use another mode",
            device.name, above.name
        )));
    }
    let cookie = pod.run(guard::netns_cookie)?.map_err(AttachError::from)?;
    Ok(Some((parent, cookie)))
}

/// Whether a program runs before the stack has a frame. What a pod sends to another on the same parent is in the stack already
/// (drivers/net/macvlan.c, `macvlan_queue_xmit`; net/core/dev.c, `dev_forward_skb`), and meets XDP in the stack alone.
fn is_in_driver(program: &Attached) -> bool {
    matches!(program.via, Via::Xdp { mode: XdpMode::Native | XdpMode::Offloaded })
}

fn id_of(guarded: &Guarded) -> Option<AttachmentId> {
    format!("{:013x}", guarded.attachment).parse().ok()
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

fn namespaces(error: MapError) -> EnforcerError {
    EnforcerError::map(guard::NAMESPACES, error)
}

fn judges(error: MapError) -> EnforcerError {
    EnforcerError::map(guard::JUDGES, error)
}

fn lowered(error: DatapathError) -> EnforcerError {
    EnforcerError::Lowering(error.into())
}
