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
//! tcx-egress-4711-0d5e6f7a8b9c0_12         the programs of slot 12, which is a constant in them
//! ```
//! tcx has no place for a class, so the slot stands in the pin's name behind the attachment's id. An owner that starts reads
//! there who has which slot, as it does in the classes of filters on the host. The name is changed before the program: a
//! process that dies in between leaves default programs under a slot that is taken, and never programs of a slot that nobody
//! knows to be.
//!
//! # When a device is gone
//! The kernel ends the link with its device, and the pin says so (no device). Then the endpoint is gone, and its pins are removed
//! by whoever detaches or, at the latest, by the owner's sweep. Pins of a device that still lives are left alone when an
//! attachment is detached, so that one in a namespace which can no longer be reached keeps its policy until it ends.
//!
//! # What it does not hold
//! [`Enforcement::EgressBypassable`](dcenet_core::provider::Enforcement): a process with CAP_NET_RAW in the pod sends past its
//! own device's programs, and one with CAP_NET_ADMIN makes another device beside it. What is sent *to* the pod's device is judged
//! in any case. Only a guard on the parent closes that.
//!
//! # Minimum kernel version
//! 6.6 (tcx).

use std::collections::BTreeMap;

use dcenet_core::model::AttachmentId;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::{Endpoint, Place};
use dcenet_ebpf::attach::{AttachError, Direction, PinnedLink, TcxAttacher};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

/// Programs on devices that live in pods.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    links: TcxAttacher,
}

/// A program on a device in a pod.
#[derive(Debug, Clone)]
pub(crate) struct InsideLink {
    pub(crate) id: AttachmentId,
    /// None for the default programs of whoever is not admitted yet.
    pub(crate) slot: Option<u16>,
    pub(crate) link: PinnedLink,
}

impl InsideLink {
    fn read(link: PinnedLink) -> Option<Self> {
        let (id, slot) = read_label(&link.label)?;
        Some(Self { id, slot, link })
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

    /// Who has which slot.
    pub(crate) fn slots(&self) -> Result<BTreeMap<u16, AttachmentId>, AttachError> {
        let links = self.links.links_of(|label| read_label(label).is_some_and(|(_, slot)| slot.is_some()))?;
        let links = links.into_iter().filter_map(InsideLink::read).filter(InsideLink::lives);
        Ok(links.filter_map(|link| Some((link.slot?, link.id))).collect())
    }

    /// Gives a link another program, and the slot that it knows.
    pub(crate) fn replace(&self, link: &InsideLink, program: &Program, slot: u16) -> Result<(), AttachError> {
        let label = label(link.id, Some(slot));
        if link.slot != Some(slot) {
            self.links.replace_link(&link.link, &Program::by_id(link.link.program)?, &label)?;
        }
        self.links.replace_link(&link.link, program, &label)
    }

    /// Removes the pins of an attachment's vanished devices, and tells how many links of living ones stay.
    pub(crate) fn forget(&self, id: AttachmentId) -> Result<usize, AttachError> {
        let links = self.of(id)?;
        if links.iter().any(|link| !link.lives()) {
            self.links.remove_vanished()?;
        }
        Ok(links.iter().filter(|link| link.lives()).count())
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
        (Place::Pod { .. }, Direction::Ingress) => Direction::Egress,
        (Place::Pod { .. }, Direction::Egress) => Direction::Ingress,
    }
}

/// What a link of an attachment is pinned under.
pub(crate) fn label(id: AttachmentId, slot: Option<u16>) -> String {
    slot.map_or_else(|| id.to_string(), |slot| format!("{id}{BEFORE_SLOT}{slot}"))
}

/// Whether a label is of the attachment, on the host or in a pod.
pub(crate) fn is_of(label: &str, id: AttachmentId) -> bool {
    read_label(label).is_some_and(|(of, _)| of == id)
}

fn read_label(label: &str) -> Option<(AttachmentId, Option<u16>)> {
    match label.split_once(BEFORE_SLOT) {
        None => Some((label.parse().ok()?, None)),
        Some((id, slot)) => Some((id.parse().ok()?, Some(slot.parse().ok().filter(|slot| *slot != 0)?))),
    }
}

const BEFORE_SLOT: char = '_';

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_tells_the_attachment_and_its_slot() {
        let id: AttachmentId = "0d5e6f7a8b9c0".parse().unwrap();
        let other: AttachmentId = "0d5e6f7a8b9c1".parse().unwrap();
        for slot in [None, Some(1), Some(u16::MAX)] {
            let label = label(id, slot);
            assert_eq!(read_label(&label), Some((id, slot)), "{label}");
            assert!(is_of(&label, id) && !is_of(&label, other), "{label}");
        }
        for wrong in
            ["", "_", "_7", "0d5e6f7a8b9c0_", "0d5e6f7a8b9c0_0", "0d5e6f7a8b9c0_65536", "0d5e6f7a8b9c0_7_7", "pod"]
        {
            assert_eq!(read_label(wrong), None, "{wrong}");
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
