//! Slots, and the cell of each: what all programs of an endpoint know of it, whichever they are.
//!
//! An endpoint has one slot from when it is admitted until it is gone; the filters on both of its hooks carry it. Its
//! generations only ever grow, over all endpoints that have the slot one after the other, so that a flow of an earlier
//! one is never believed; the tenure, which is another for each of them, tells it from the endpoint's own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use dcenet_core::model::{AttachmentId, AttachmentKey};
use dcenet_core::provider::Endpoint;
use dcenet_ebpf::abi::{self, Sizes};
use dcenet_ebpf::attach::{Attacher, Hook, Owner, Tag};
use dcenet_ebpf::loader::LoadError;
use dcenet_ebpf::maps::{Map, Put};
use dcenet_ebpf::program::Program;

use super::EnforcerError;
use super::node::NodeMaps;
use super::slots::Slots;
use super::state::{Known, hooks};
use crate::model::Direction;

/// The cells of a node, and who has them.
pub(crate) struct Cells {
    map: Map,
    slots: Slots,
    /// Whose slots are to be given back when they are gone.
    holders: BTreeSet<AttachmentKey>,
    /// Those of them that are gone: whoever has such a name next is another.
    gone: BTreeSet<AttachmentKey>,
    /// How many endpoints there may be: slot 0 is nobody's.
    room: usize,
}

impl Cells {
    /// Over the map of a node, with the slots that are taken already.
    pub(crate) fn new(
        maps: &NodeMaps,
        sizes: &Sizes,
        used: BTreeMap<u16, AttachmentId>,
    ) -> Result<Self, EnforcerError> {
        Ok(Self {
            map: maps.get(abi::ENDPOINTS)?,
            slots: Slots::new(sizes.endpoints, used),
            holders: BTreeSet::new(),
            gone: BTreeSet::new(),
            room: sizes.endpoints.saturating_sub(1) as usize,
        })
    }

    /// The slot of an endpoint that has one.
    pub(crate) fn slot(&self, id: AttachmentId) -> Option<u16> {
        self.slots.of(id)
    }

    /// The endpoint's slot, with a cell that tells its addresses; `fresh` where nothing that conntrack knows of the slot
    /// is its own.
    pub(crate) fn settle(&mut self, endpoint: &Endpoint, fresh: bool) -> Result<(u16, abi::Endpoint), EnforcerError> {
        let another = self.gone.remove(&endpoint.attachment) || self.slots.of(endpoint.attachment.id()).is_none();
        let slot = self.slots.take(endpoint.attachment.id()).ok_or_else(|| self.full())?;
        self.holders.insert(endpoint.attachment.clone());
        let mut cell = of_addresses(endpoint);
        let old = self.load(slot)?;
        cell.generation_ingress = old.generation_ingress;
        cell.generation_egress = old.generation_egress;
        cell.tenure = old.tenure.wrapping_add(u16::from(another));
        if fresh {
            cell.generation_ingress = cell.generation_ingress.wrapping_add(1);
            cell.generation_egress = cell.generation_egress.wrapping_add(1);
        }
        if cell != old {
            self.store(slot, &cell)?;
        }
        Ok((slot, cell))
    }

    /// The endpoint's slot, for programs that hold it as a constant and are loaded before the endpoint is settled.
    pub(crate) fn reserve(&mut self, endpoint: &Endpoint) -> Result<u16, EnforcerError> {
        let id = endpoint.attachment.id();
        if self.slots.of(id).is_none() {
            self.slots.take(id).ok_or_else(|| self.full())?;
            // Its cell is still that of whoever had the slot before.
            self.gone.insert(endpoint.attachment.clone());
        }
        self.holders.insert(endpoint.attachment.clone());
        self.slots.of(id).ok_or_else(|| self.full())
    }

    fn full(&self) -> EnforcerError {
        EnforcerError::Full { what: "endpoints", found: self.room + 1, room: self.room }
    }

    /// Gives an endpoint its slot and cell, and tells the slot to the programs on its `bare` hooks, so that they know its
    /// addresses and let it resolve its neighbours' while its policy is not known yet.
    pub(crate) fn admit(
        &mut self,
        attacher: &dyn Attacher,
        endpoint: &Endpoint,
        bare: Vec<BareHook>,
    ) -> Result<(), EnforcerError> {
        let label = endpoint.attachment.id().to_string();
        let (slot, _) = self.settle(endpoint, true)?;
        for BareHook { hook, program } in bare {
            let Some(program) = program else { continue };
            let program =
                Program::by_id(program).map_err(|e| EnforcerError::Load(LoadError::refused(&label, e.source, "")))?;
            attacher.replace_tagged(hook, &program, Tag { label: &label, class: slot })?;
        }
        Ok(())
    }

    /// Notes that an endpoint is gone. Its slot is given back when nothing is carried out any more that knows it.
    pub(crate) fn forget(&mut self, attachment: &AttachmentKey) {
        if self.slots.of(attachment.id()).is_some() {
            self.gone.insert(attachment.clone());
            // An earlier owner may have given it.
            self.holders.insert(attachment.clone());
        }
    }

    /// Lets established flows of these directions be judged anew. The larger of the slot's generations.
    pub(crate) fn bump(&self, slot: u16, directions: &BTreeSet<Direction>) -> Result<u32, EnforcerError> {
        let mut cell = self.load(slot)?;
        for direction in directions {
            let generation = match direction {
                Direction::Ingress => &mut cell.generation_ingress,
                Direction::Egress => &mut cell.generation_egress,
            };
            *generation = generation.wrapping_add(1);
        }
        self.store(slot, &cell)?;
        Ok(cell.generation_ingress.max(cell.generation_egress))
    }

    /// Takes back the slots of all that are in neither list, but for those of which programs are in force still.
    pub(crate) fn give_back_others(
        &mut self,
        lists: [&BTreeMap<AttachmentKey, Known>; 2],
        in_force: impl Fn(AttachmentId) -> bool,
    ) -> Result<(), EnforcerError> {
        let listed = lists.iter().flat_map(|list| list.keys());
        self.holders.extend(listed.filter(|key| self.slots.of(key.id()).is_some()).cloned());
        let is_listed = |key: &&AttachmentKey| lists.iter().any(|list| list.contains_key(key));
        let gone: Vec<AttachmentKey> = self.holders.iter().filter(|key| !is_listed(key)).cloned().collect();
        for key in gone {
            if let Some(slot) = self.slots.of(key.id()) {
                if in_force(key.id()) {
                    continue;
                }
                let mut cell = self.load(slot)?;
                cell.flags = 0;
                self.store(slot, &cell)?;
                self.slots.give_back(key.id());
            }
            self.holders.remove(&key);
            self.gone.remove(&key);
        }
        Ok(())
    }

    fn load(&self, slot: u16) -> Result<abi::Endpoint, EnforcerError> {
        let mut bytes = [0; abi::Endpoint::BYTES];
        self.map
            .lookup(&u32::from(slot).to_ne_bytes(), &mut bytes)
            .map_err(|e| EnforcerError::map(abi::ENDPOINTS, e))?;
        Ok(abi::Endpoint::decode(&bytes).unwrap_or_default())
    }

    fn store(&self, slot: u16, cell: &abi::Endpoint) -> Result<(), EnforcerError> {
        self.map
            .update(&u32::from(slot).to_ne_bytes(), &cell.encode(), Put::Any)
            .map_err(|e| EnforcerError::map(abi::ENDPOINTS, e))
    }
}

/// A hook whose program, if there is one, knows no slot.
pub(crate) struct BareHook {
    hook: Hook,
    program: Option<u32>,
}

/// The hooks of an endpoint that are bare: those of a default program, and those whose program somebody took away.
pub(crate) fn bare_hooks(attacher: &dyn Attacher, endpoint: &Endpoint) -> Result<Vec<BareHook>, EnforcerError> {
    let label = endpoint.attachment.id().to_string();
    let mut bare = Vec::new();
    for hook in hooks(endpoint.ifindex) {
        let attached = attacher.attached(hook)?;
        match attached.filter(|a| a.owner == Owner::Ours(label.clone())) {
            Some(attached) if attached.class != 0 => {}
            attached => bare.push(BareHook { hook, program: attached.and_then(|a| a.program) }),
        }
    }
    Ok(bare)
}

/// The endpoint's cell, without its generations. Its link-local address is the one that the kernel makes of the address
/// of the device (RFC 4291, appendix A), unless it is told to have another.
fn of_addresses(endpoint: &Endpoint) -> abi::Endpoint {
    let Endpoint { addresses, mac, .. } = endpoint;
    let ipv4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let ipv6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    let [a, b, c, d, e, f] = mac.bytes();
    let pair = |high, low| u16::from_be_bytes([high, low]);
    let of_mac = Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f));
    let cell = abi::Endpoint::new(ipv4, ipv6, Some(endpoint.link_local.unwrap_or(of_mac))).with_mac(mac.bytes());
    if endpoint.place.is_host() { cell } else { cell.as_in_pod() }
}
