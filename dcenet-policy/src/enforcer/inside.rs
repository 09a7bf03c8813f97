//! Devices that live in pods: their programs are held by tcx links, which are pinned beside the maps.
//!
//! A macvlan or ipvlan has no end on the host, so that its programs run on the device itself: what the pod sends goes *out*
//! there, and what it receives comes in, the other way round than on a host's end. Whoever attaches does so on a thread in
//! the pod's namespace, for bpf(2) finds a device by its index there, while the device is down. From then on nobody enters the
//! namespace: a pinned link is found by its name, takes another program wherever its device is, and tells when that has
//! vanished. So neither a namespace whose path is gone nor one whose device was renamed or moved is a problem for the owner,
//! and an index that another namespace has, too, is never mistaken.
//!
//! # The name of a link
//! ```text
//! tcx-egress-4711-0d5e6f7a8b9c0            the default programs, which know no slot and let nothing of the pod pass
//! tcx-egress-4711-0d5e6f7a8b9c0_12d        the default programs of slot 12, which is a constant in them
//! tcx-egress-4711-0d5e6f7a8b9c0_12         the endpoint's own programs, of slot 12
//! ```
//! tcx has no place for a class, so the slot stands in the pin's name behind the attachment's id. An owner that starts reads
//! there who has which slot, as it does in the classes of filters on the host, and adopts the endpoints whose programs are their
//! own. The name is changed before the program: a process that dies in between leaves default programs under a slot that is
//! taken, and never programs of a slot that nobody knows to be.
//!
//! # When a device is gone
//! The kernel ends the link with its device, and the pin says so (no device). Then the endpoint is gone, and its pins are removed
//! by whoever detaches or, at the latest, by the owner's sweep. Pins of a device that still lives stay when an attachment is
//! detached, with the default that denies: its own programs would go on with class tables that nobody keeps for them.
//!
//! # The own node
//! What comes from the node's own addresses is let in on the host's end of a pair, where only the node can send from them. On a
//! segment anybody can, so no such rule is in ingress policies here: allow the node's addresses by an `ipBlock` where the
//! segment is trusted.
//!
//! # What it does not hold
//! [`Enforcement::EgressBypassable`](dcenet_core::provider::Enforcement): a process with CAP_NET_RAW in the pod sends past its
//! own device's programs, and reads by a packet socket what they deny on its way in. One with CAP_NET_ADMIN makes another device
//! on the same parent, which is judged in neither direction. What comes to the pod's stack by its own device is judged in any case.
//! A guard on the parent ([`guard`](super::guard)) judges what they send once more.
//!
//! # Minimum kernel version
//! 6.6 (tcx).

use std::collections::{BTreeMap, BTreeSet};

use dcenet_core::model::AttachmentId;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::{Endpoint, Place};
use dcenet_ebpf::attach::{AttachError, Direction, PinnedLink, TcxAttacher};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

use super::config::DefaultVerdict;
use super::node::default_pin;

/// Programs on devices that live in pods.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    links: TcxAttacher,
}

/// A program on a device in a pod.
#[derive(Debug, Clone)]
pub(crate) struct InsideLink {
    pub(crate) id: AttachmentId,
    pub(crate) holds: Holds,
    pub(crate) link: PinnedLink,
}

/// Which programs a link holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds {
    /// The default programs of whoever is not admitted yet, or not any more.
    Nobodys,
    /// The default programs of a slot.
    Default(u16),
    /// The endpoint's own.
    Own(u16),
}

impl Holds {
    fn slot(self) -> Option<u16> {
        match self {
            Self::Nobodys => None,
            Self::Default(slot) | Self::Own(slot) => Some(slot),
        }
    }
}

/// Who has a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) id: AttachmentId,
    /// Whether all its links hold its own programs.
    pub(crate) is_judged: bool,
}

impl InsideLink {
    fn read(link: PinnedLink) -> Option<Self> {
        let (id, holds) = read_label(&link.label)?;
        Some(Self { id, holds, link })
    }

    pub(crate) fn slot(&self) -> Option<u16> {
        self.holds.slot()
    }

    pub(crate) fn lives(&self) -> bool {
        self.link.device.is_some()
    }
}

impl Inside {
    /// Links that are pinned, or will be, in a directory.
    pub(crate) fn new(pins: Pins) -> Self {
        Self { links: TcxAttacher::new(pins) }
    }

    /// As for any device, by a thread in the namespace that the device is in.
    pub(crate) fn attacher(&self) -> &TcxAttacher {
        &self.links
    }

    /// The links of an attachment, also those whose device has vanished.
    pub(crate) fn of(&self, id: AttachmentId) -> Result<Vec<InsideLink>, AttachError> {
        let links = self.links.links_of(|label| is_of(label, id))?;
        Ok(links.into_iter().filter_map(InsideLink::read).collect())
    }

    /// The attachments that have a device.
    pub(crate) fn living(&self) -> Result<BTreeSet<AttachmentId>, AttachError> {
        let links = self.links.links_of(|label| read_label(label).is_some())?;
        Ok(links.into_iter().filter_map(InsideLink::read).filter(InsideLink::lives).map(|link| link.id).collect())
    }

    /// Who has which slot.
    pub(crate) fn slots(&self) -> Result<BTreeMap<u16, Holder>, AttachError> {
        let links = self.links.links_of(|label| read_label(label).is_some_and(|(_, holds)| holds.slot().is_some()))?;
        let mut slots: BTreeMap<u16, Holder> = BTreeMap::new();
        for link in links.into_iter().filter_map(InsideLink::read).filter(InsideLink::lives) {
            let Some(slot) = link.slot() else { continue };
            let is_judged = matches!(link.holds, Holds::Own(_));
            let holder = slots.entry(slot).or_insert(Holder { id: link.id, is_judged });
            holder.is_judged &= is_judged;
        }
        Ok(slots)
    }

    /// Gives a link another program, and the slot that it knows.
    pub(crate) fn replace(&self, link: &InsideLink, program: &Program, holds: Holds) -> Result<(), AttachError> {
        if let Some(slot) = holds.slot().filter(|slot| link.slot() != Some(*slot)) {
            let between = label(link.id, Holds::Default(slot));
            self.links.replace_link(&link.link, &Program::by_id(link.link.program)?, &between)?;
        }
        self.links.replace_link(&link.link, program, &label(link.id, holds))
    }

    /// Gives the links of an attachment's living devices the default that denies, where it is pinned, and tells how many there
    /// are: the numbers that its own programs know will mean something else.
    pub(crate) fn shut(&self, pins: &Pins, id: AttachmentId) -> Result<usize, AttachError> {
        let mut living = 0;
        for link in self.of(id)?.iter().filter(|link| link.lives()) {
            let pin = default_pin(DefaultVerdict::Deny, in_pod(link.link.direction), false);
            let Some(deny) = pins.get(pin)? else {
                tracing::debug!(%id, pin, "no default is pinned for a device that lives on");
                living += 1;
                continue;
            };
            match self.replace(link, &Program::from_fd(deny)?, Holds::Nobodys) {
                Ok(()) => living += 1,
                // It has vanished since.
                Err(AttachError::NoLink { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(living)
    }

    /// Removes the pins of an attachment's vanished devices.
    pub(crate) fn forget(&self, id: AttachmentId) -> Result<(), AttachError> {
        if self.of(id)?.iter().any(|link| !link.lives()) {
            self.links.remove_vanished()?;
        }
        Ok(())
    }

    /// Removes the pins of all vanished devices.
    pub(crate) fn forget_vanished(&self) -> Result<usize, AttachError> {
        Ok(self.links.remove_vanished()?.len())
    }

    /// Takes all of it off.
    pub(crate) fn clear(&self) -> Result<(), AttachError> {
        let links = self.links.links()?;
        for link in links.iter().filter(|link| read_label(&link.label).is_some()) {
            self.links.release(&link.label)?;
        }
        Ok(())
    }

    /// Whether the endpoint's device is there, as far as can be told.
    pub(crate) fn exists(&self, endpoint: &Endpoint) -> bool {
        match self.of(endpoint.attachment.id()) {
            Ok(links) if links.is_empty() => is_in_its_namespace(endpoint),
            Ok(links) => links.iter().any(InsideLink::lives),
            Err(error) => {
                tracing::debug!(attachment = %endpoint.attachment, %error, "cannot tell whether its device is there");
                true
            }
        }
    }
}

/// For a device whose links are pinned no longer, as where somebody has removed the pins.
fn is_in_its_namespace(endpoint: &Endpoint) -> bool {
    let Place::Pod { path, netns } = &endpoint.place else { return false };
    match NetNs::open(path) {
        Ok(found) if found.id() != *netns => false,
        Ok(found) => found.run(|| super::apply::is_here(endpoint)).unwrap_or(true),
        Err(error) => !error.is_gone(),
    }
}

/// The way of packets through the device on which a program of the host's end is: `Ingress` is what the pod sends.
pub(crate) fn on_device(at_host: Direction, place: &Place) -> Direction {
    match (place, at_host) {
        (Place::Host, direction) => direction,
        (Place::Pod { .. }, direction) => in_pod(direction),
    }
}

/// The other way: what comes in on the host's end goes out of the pod's device.
fn in_pod(direction: Direction) -> Direction {
    match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    }
}

/// What a link of an attachment is pinned under.
pub(crate) fn label(id: AttachmentId, holds: Holds) -> String {
    match holds {
        Holds::Nobodys => id.to_string(),
        Holds::Default(slot) => format!("{id}{BEFORE_SLOT}{slot}{OF_DEFAULT}"),
        Holds::Own(slot) => format!("{id}{BEFORE_SLOT}{slot}"),
    }
}

/// Whether a label is of the attachment, on the host or in a pod.
pub(crate) fn is_of(label: &str, id: AttachmentId) -> bool {
    read_label(label).is_some_and(|(of, _)| of == id)
}

fn read_label(label: &str) -> Option<(AttachmentId, Holds)> {
    let Some((id, rest)) = label.split_once(BEFORE_SLOT) else { return Some((label.parse().ok()?, Holds::Nobodys)) };
    let slot = |text: &str| text.parse().ok().filter(|slot| *slot != 0);
    let holds = match rest.strip_suffix(OF_DEFAULT) {
        Some(rest) => Holds::Default(slot(rest)?),
        None => Holds::Own(slot(rest)?),
    };
    Some((id.parse().ok()?, holds))
}

const BEFORE_SLOT: char = '_';
const OF_DEFAULT: char = 'd';

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_tells_the_attachment_and_its_slot() {
        let id: AttachmentId = "0d5e6f7a8b9c0".parse().unwrap();
        let other: AttachmentId = "0d5e6f7a8b9c1".parse().unwrap();
        assert_eq!(label(id, Holds::Default(12)), "0d5e6f7a8b9c0_12d");
        for holds in [Holds::Nobodys, Holds::Own(1), Holds::Own(u16::MAX), Holds::Default(1), Holds::Default(u16::MAX)]
        {
            let label = label(id, holds);
            assert_eq!(read_label(&label), Some((id, holds)), "{label}");
            assert!(is_of(&label, id) && !is_of(&label, other), "{label}");
        }
        for wrong in ["", "_", "_7", "_7d", "pod"] {
            assert_eq!(read_label(wrong), None, "{wrong}");
        }
        for wrong in ["", "0", "65536", "7_7", "d", "0d", "7dd", "d7", "65536d"] {
            assert_eq!(read_label(&format!("{id}_{wrong}")), None, "{wrong}");
        }
    }

    #[test]
    fn inside_a_pod_what_it_sends_goes_out() {
        let inside = Place::Pod { path: "/run/netns/pod".into(), netns: NetNs::of_this_thread().unwrap().id() };
        for (at_host, in_pod) in [(Direction::Ingress, Direction::Egress), (Direction::Egress, Direction::Ingress)] {
            assert_eq!(on_device(at_host, &Place::Host), at_host);
            assert_eq!(on_device(at_host, &inside), in_pod);
        }
    }
}
