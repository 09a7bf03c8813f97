//! Pinned links to devices: what tcx, netkit and XDP have in common.

use std::fmt;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;

use super::pinned::{self, Swap};
use super::{AttachError, Attached, Attacher, Direction, Hook, Owner, Tag, Via, XdpMode, check_kind};
use crate::datapath;
use crate::object::ProgramKind;
use crate::pin::Pins;
use crate::program::Program;
use crate::sys::{self, LinkInfo};

/// A link that is pinned, wherever its device is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinnedLink {
    /// What it was attached under.
    pub label: String,
    /// Its direction.
    pub direction: Direction,
    /// The link's number.
    pub link: u32,
    /// The program's number.
    pub program: u32,
    /// The device's index in whichever namespace the device is now; none once the device has vanished, or somebody has
    /// detached the link. For [`Direction::Ingress`] of netkit it is the pod's end, whose packets the program meets
    /// (drivers/net/netkit.c, `netkit_link_attach`), and not the end that it was attached to. That a device of this
    /// namespace has the same index says nothing: ask [`Attacher::attached`](super::Attacher::attached).
    pub device: Option<IfIndex>,
}

/// A kind of link to a device.
pub trait Linked: Send + Sync {
    /// Stands first in the names of pins.
    const NAME: &'static str;
    /// What programs it takes.
    const PROGRAM: ProgramKind;
    /// `enum bpf_link_type`.
    const LINK_TYPE: u32;

    /// Where a new link goes.
    type Place: fmt::Debug + Clone + Copy + Default + Send + Sync;

    /// What is on the hook, in the order in which it runs; none where there is no such device.
    ///
    /// # Errors
    /// [`AttachError::Raced`] and [`AttachError::Ambiguous`] where which of them is ours cannot be told.
    fn entries(hook: Hook, pins: &Pins, look: Look) -> Result<Option<Vec<Entry>>, AttachError>;

    /// Whether a link that is there is where a new one is wanted; a replacement leaves it where it is.
    fn fits(_via: &Via, _place: Self::Place) -> Result<(), XdpMode> {
        Ok(())
    }

    /// Told before a link is made where ours has none: pins that seem to be of this hook are not.
    fn retire(_hook: Hook, _pins: &Pins) -> Result<(), AttachError> {
        Ok(())
    }

    /// Makes a link, which lives as long as its descriptor.
    fn create(hook: Hook, program: &Program, place: Self::Place) -> Result<OwnedFd, AttachError>;

    /// The part of a pin's name that stands for a label now, in the calling thread's namespace.
    fn mark(label: &str) -> Result<String, AttachError> {
        Ok(label.to_owned())
    }

    /// The label of such a part.
    fn label(mark: &str) -> Option<&str> {
        Some(mark)
    }
}

/// Whether others with the same pins may change links while one looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// They may.
    Unlocked,
    /// They wait.
    Locked,
}

/// A program on a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub(super) program: u32,
    /// The link's number, where it is known.
    pub(super) link: Option<u32>,
    pub(super) via: Via,
}

impl Entry {
    /// As who knows no pins sees it.
    pub(super) fn foreign(self, place: usize) -> Result<Attached, AttachError> {
        self.describe(place, None)
    }

    fn describe(self, place: usize, label: Option<&str>) -> Result<Attached, AttachError> {
        let info = match sys::program_by_id(self.program).and_then(|fd| sys::program_info(fd.as_fd())) {
            Ok(info) => Some(info),
            // Taken off since the chain was asked for.
            Err(e) if e.is(libc::ENOENT) => None,
            Err(e) => return Err(e.into()),
        };
        let owner = match label {
            Some(label) => Owner::Ours(label.to_owned()),
            None => Owner::Foreign(info.as_ref().map(|i| i.name.clone())),
        };
        Ok(Attached {
            owner,
            program: Some(self.program),
            tag: info.map(|i| i.tag),
            priority: u16::try_from(place).unwrap_or(u16::MAX),
            class: 0,
            via: self.via,
        })
    }
}

/// What the name of a pin says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PinName<'a> {
    direction: Direction,
    pub(super) link: u32,
    /// See [`Linked::mark`].
    pub(super) mark: &'a str,
    label: &'a str,
}

impl<'a> PinName<'a> {
    /// The link's number makes it exact: while the pin is there the link is, and no other has the number.
    pub(super) fn write<K: Linked>(direction: Direction, link: u32, mark: &str) -> String {
        pinned::name(K::NAME, word(direction), link, mark)
    }

    pub(super) fn read<K: Linked>(pin: &'a str) -> Option<Self> {
        let (direction, link, mark) = pinned::parse(K::NAME, pin)?;
        let direction = [Direction::Ingress, Direction::Egress].into_iter().find(|d| word(*d) == direction)?;
        Some(Self { direction, link, mark, label: K::label(mark)? })
    }
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// Attaches by links, each pinned under a name made of its direction, its number and the label: [`TcxAttacher`],
/// [`NetkitAttacher`] and [`XdpAttacher`].
///
/// Any number of processes may use the same pins at once; they wait for each other. To attach and to detach take 10 to 20
/// milliseconds, for the kernel waits for an RCU grace period under its RTNL lock; to replace takes less than 0.1 of one; under
/// another label than before 0.4 among 500 pins, which are looked through by name then.
///
/// Labels have at most 160 letters, digits, `-` and `_`. A tag's class is refused, for the kernel has no place for one: a
/// program that must know its device reads `ifindex`, or holds a constant. So are programs of [`crate::datapath`] that would
/// read a class ([`AttachError::ReadsClass`]): the pod itself may have set it.
///
/// # After a restart
/// [`Attacher::attached`] asks the chain of the device that is meant, in the calling thread's namespace, for links that are
/// pinned here. A pin whose device has gone, or went into another namespace, is not taken for one of a device that has the
/// same index here. [`LinkAttacher::links`] tells of all pins.
///
/// # Privileges
/// CAP_BPF and CAP_NET_ADMIN, and CAP_SYS_ADMIN to look at programs by their numbers, all in the first user namespace.
///
/// # Minimum kernel version
/// That of its kind; [`AttachError::Unsupported`] before.
///
/// [`TcxAttacher`]: super::TcxAttacher
/// [`NetkitAttacher`]: super::NetkitAttacher
/// [`XdpAttacher`]: super::XdpAttacher
#[derive(Debug, Clone)]
pub struct LinkAttacher<K: Linked> {
    pins: Pins,
    place: K::Place,
    kind: PhantomData<K>,
}

/// Ours on a hook.
struct Ours {
    pin: String,
    attached: Attached,
}

impl<K: Linked> LinkAttacher<K> {
    /// Pins links here, and attaches to the default place: ahead of others in a chain, in the driver for XDP.
    pub fn new(pins: Pins) -> Self {
        Self::placed(pins, K::Place::default())
    }

    /// As [`LinkAttacher::new`], with another place for what it attaches.
    pub fn placed(pins: Pins, place: K::Place) -> Self {
        Self { pins, place, kind: PhantomData }
    }

    /// Every link that is pinned here, also those whose device has vanished or is in another namespace.
    pub fn links(&self) -> Result<Vec<PinnedLink>, AttachError> {
        self.links_of(|_| true)
    }

    /// As [`LinkAttacher::links`], of the labels that `wanted` takes: other pins are not opened.
    pub fn links_of(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<PinnedLink>, AttachError> {
        let mut links = Vec::new();
        for pin in self.names()? {
            let Some(PinName { direction, label, .. }) = PinName::read::<K>(&pin).filter(|name| wanted(name.label))
            else {
                continue;
            };
            if let Some((_, info)) = self.open(&pin)? {
                links.push(PinnedLink {
                    label: label.to_owned(),
                    direction,
                    link: info.id,
                    program: info.program,
                    device: IfIndex::new(info.device),
                });
            }
        }
        Ok(links)
    }

    /// Gives a link another program and label, in whichever namespace its device is: for one who changes the policy of a pod
    /// without entering it, for as long as the device lives, whatever became of the namespace's path. It is found by its number.
    ///
    /// # Errors
    /// [`AttachError::NoLink`] where it is not pinned any more, or its device has vanished. On any error it is as before.
    pub fn replace_link(&self, link: &PinnedLink, program: &Program, label: &str) -> Result<(), AttachError> {
        check::<K>(program, Tag { label, class: 0 })?;
        let gone = || AttachError::NoLink { link: link.link };
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(gone()),
            lock => lock?,
        };
        let is_it = |pin: &String| {
            PinName::read::<K>(pin).is_some_and(|name| name.link == link.link && name.direction == link.direction)
        };
        let pin = match self.pin_named(link.direction, link.link, &link.label)? {
            Some(pin) => pin,
            // Another label by now, or one of another namespace.
            None => self.names()?.into_iter().find(is_it).ok_or_else(gone)?,
        };
        let fresh = |number| Ok::<_, AttachError>(PinName::write::<K>(link.direction, number, &K::mark(label)?));
        match pinned::swap(&self.pins, K::LINK_TYPE, &pin, program, fresh)? {
            Swap::Done => Ok(()),
            Swap::Gone => Err(gone()),
            Swap::SameProgram | Swap::Raced => Err(AttachError::LinkBusy { link: link.link }),
        }
    }

    /// Takes off whatever has this label, in whichever namespace its device is, and its pins with it: for one who cleans up
    /// after a pod without entering it. Returns how many links there were.
    pub fn release(&self, label: &str) -> Result<usize, AttachError> {
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(0),
            lock => lock?,
        };
        let mut taken = 0;
        for pin in self.names()?.iter().filter(|pin| PinName::read::<K>(pin).is_some_and(|name| name.label == label)) {
            taken += usize::from(self.take_off(pin)?);
        }
        Ok(taken)
    }

    /// Removes the pins of devices that have vanished, and tells which.
    pub fn remove_vanished(&self) -> Result<Vec<PinnedLink>, AttachError> {
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            lock => lock?,
        };
        let mut vanished = self.links()?;
        vanished.retain(|link| link.device.is_none());
        for pin in self.names()? {
            if PinName::read::<K>(&pin).is_some_and(|name| vanished.iter().any(|link| link.link == name.link)) {
                self.pins.remove(&pin)?;
            }
        }
        Ok(vanished)
    }

    fn create(&self, hook: Hook, program: &Program, label: &str) -> Result<(), AttachError> {
        let mark = K::mark(label)?;
        K::retire(hook, &self.pins)?;
        let link = K::create(hook, program, self.place)?;
        // Without its pin it ends with this descriptor: what fails or dies here leaves the hook as it was.
        let info = sys::link_info(link.as_fd())?.ok_or_else(pinned::no_link)?;
        self.pins.pin(&PinName::write::<K>(hook.direction, info.id, &mark), &link)?;
        Ok(())
    }

    fn swap(&self, hook: Hook, ours: &Ours, program: &Program, label: &str) -> Result<(), AttachError> {
        K::fits(&ours.attached.via, self.place).map_err(|mode| AttachError::OtherMode { hook, mode })?;
        let fresh = |link| Ok::<_, AttachError>(PinName::write::<K>(hook.direction, link, &K::mark(label)?));
        match pinned::swap(&self.pins, K::LINK_TYPE, &ours.pin, program, fresh)? {
            Swap::Done => Ok(()),
            Swap::Gone => Err(AttachError::NotAttached { hook }),
            Swap::SameProgram => Err(same_program(hook)),
            Swap::Raced => Err(AttachError::Raced { hook }),
        }
    }

    /// Removes a pin and ends its link; `false` where there is none.
    fn take_off(&self, pin: &str) -> Result<bool, AttachError> {
        pinned::take_off(&self.pins, K::LINK_TYPE, pin)
    }

    /// Ours on a hook. A label that it is thought to have spares looking through all pins.
    fn ours(&self, hook: Hook, label: Option<&str>) -> Result<Option<Ours>, AttachError> {
        let Some(entries) = K::entries(hook, &self.pins, Look::Locked)? else { return Ok(None) };
        if let Some(label) = label {
            for (place, entry) in entries.iter().enumerate() {
                let Some(link) = entry.link else { continue };
                if let Some(pin) = self.pin_named(hook.direction, link, label)? {
                    return Ok(Some(Ours { pin, attached: entry.clone().describe(place, Some(label))? }));
                }
            }
        }
        let pins = self.names()?;
        for (place, entry) in entries.into_iter().enumerate() {
            if let Some((pin, label)) = pin_of::<K>(hook, &entry, &pins) {
                return Ok(Some(Ours { pin: pin.to_owned(), attached: entry.describe(place, Some(label))? }));
            }
        }
        Ok(None)
    }

    /// The name of a link's pin, if it has this label.
    fn pin_named(&self, direction: Direction, link: u32, label: &str) -> Result<Option<String>, AttachError> {
        let pin = PinName::write::<K>(direction, link, &K::mark(label)?);
        Ok(self.pins.get(&pin)?.map(|_| pin))
    }

    /// As [`Linked::entries`], and again while nobody changes links where it cannot be told whose they are.
    fn entries(&self, hook: Hook) -> Result<Option<Vec<Entry>>, AttachError> {
        match K::entries(hook, &self.pins, Look::Unlocked) {
            Err(AttachError::Raced { .. } | AttachError::Ambiguous { .. }) => {
                let _lock = self.lock()?;
                K::entries(hook, &self.pins, Look::Locked)
            }
            entries => entries,
        }
    }

    /// The names of our pins, of this kind.
    fn names(&self) -> Result<Vec<String>, AttachError> {
        match self.pins.list() {
            Ok(mut names) => {
                names.retain(|name| PinName::read::<K>(name).is_some());
                Ok(names)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a pin; none where it is gone, or is no link of this kind.
    fn open(&self, pin: &str) -> Result<Option<(OwnedFd, LinkInfo)>, AttachError> {
        pinned::open(&self.pins, K::LINK_TYPE, pin)
    }

    fn lock(&self) -> Result<File, AttachError> {
        Ok(pinned::lock(&self.pins)?)
    }
}

impl<K: Linked> Attacher for LinkAttacher<K> {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        check::<K>(program, tag)?;
        let _lock = self.lock()?;
        match self.ours(hook, Some(tag.label))? {
            Some(ours) => match self.swap(hook, &ours, program, tag.label) {
                // The device, or somebody else, has ended the link since it was found in the chain.
                Err(AttachError::NotAttached { hook }) => Err(AttachError::Raced { hook }),
                swapped => swapped.map(|()| Some(ours.attached)),
            },
            None => self.create(hook, program, tag.label).map(|()| None),
        }
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        check::<K>(program, tag)?;
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(AttachError::NotAttached { hook }),
            lock => lock?,
        };
        let ours = self.ours(hook, Some(tag.label))?.ok_or(AttachError::NotAttached { hook })?;
        self.swap(hook, &ours, program, tag.label)?;
        Ok(ours.attached)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        // The devices and not the links, for a link may tell the index of another namespace, or of the pair's other end.
        let pins = self.names()?;
        if pins.is_empty() {
            return Ok(Vec::new());
        }
        let links = NetNs::of_this_thread()?.socket(Family::Route)?.links()?;
        let mut devices = Vec::new();
        for device in links.into_iter().map(|link| link.index) {
            for direction in [Direction::Ingress, Direction::Egress] {
                let hook = Hook { device, direction };
                let has_ours = match self.entries(hook) {
                    Err(AttachError::WrongDevice { .. }) => false,
                    // It may.
                    Err(AttachError::Ambiguous { .. }) => true,
                    entries => {
                        entries?.is_some_and(|all| all.iter().any(|entry| pin_of::<K>(hook, entry, &pins).is_some()))
                    }
                };
                if has_ours {
                    devices.push(device);
                    break;
                }
            }
        }
        Ok(devices)
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        let Some(entries) = self.entries(hook)? else { return Ok(Vec::new()) };
        let pins = self.names()?;
        let entries = entries.into_iter().enumerate();
        entries
            .map(|(place, entry)| {
                let label = pin_of::<K>(hook, &entry, &pins).map(|(_, label)| label);
                entry.describe(place, label)
            })
            .collect()
    }

    fn forget_vanished(&self) -> Result<usize, AttachError> {
        Ok(self.remove_vanished()?.len())
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            lock => lock?,
        };
        let Some(ours) = self.ours(hook, None)? else { return Ok(false) };
        self.take_off(&ours.pin)
    }
}

/// The pin of an entry that is ours, and its label.
fn pin_of<'a, K: Linked>(hook: Hook, entry: &Entry, pins: &'a [String]) -> Option<(&'a str, &'a str)> {
    pins.iter().find_map(|pin| {
        let name = PinName::read::<K>(pin)?;
        let same = name.direction == hook.direction && Some(name.link) == entry.link;
        same.then_some((pin.as_str(), name.label))
    })
}

fn check<K: Linked>(program: &Program, tag: Tag<'_>) -> Result<(), AttachError> {
    check_kind(program, K::PROGRAM)?;
    if !pinned::is_label(tag.label) {
        return Err(AttachError::BadLabel { label: tag.label.to_owned(), want: pinned::LABEL });
    }
    if tag.class != 0 {
        return Err(AttachError::NoClass { class: tag.class });
    }
    let name = &program.info().name;
    if K::PROGRAM == ProgramKind::Classifier && datapath::reads_class(name) {
        return Err(AttachError::ReadsClass { program: name.clone() });
    }
    Ok(())
}

/// A program stands in a chain once (kernel/bpf/mprog.c, `bpf_mprog_exists`).
pub(super) fn same_program(hook: Hook) -> AttachError {
    AttachError::Occupied { hook, occupant: "the same program, attached by somebody else,".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::{Netkit, Tcx};

    #[test]
    fn names_of_pins_read_as_written() {
        for (direction, link, label) in [
            (Direction::Ingress, 7, "db-0"),
            (Direction::Egress, u32::MAX, ""),
            (Direction::Ingress, 1, "-tcx-egress-2-"),
        ] {
            let pin = PinName::write::<Tcx>(direction, link, label);
            assert_eq!(PinName::read::<Tcx>(&pin), Some(PinName { direction, link, mark: label, label }), "{pin}");
            assert_eq!(PinName::read::<Netkit>(&pin), None, "{pin}");
        }
        for other in
            ["", "tcx", "tcx-ingress", "tcx-ingress-7", "tcx-sideways-7-x", "tcx-ingress-x-7", "tcxx-ingress-7-x"]
        {
            assert_eq!(PinName::read::<Tcx>(other), None, "{other}");
        }
    }
}
