//! Pinned links in a device's chains of programs: what tcx and netkit have in common (kernel/bpf/mprog.c).

use std::fs::{File, Metadata};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;

use super::{AttachError, Attached, Attacher, Direction, Hook, Owner, Tag, Via, check_classifier};
use crate::pin::{PinError, Pins};
use crate::program::Program;
use crate::sys::fault::gated;
use crate::sys::{self, Chain, LinkInfo, Position, SysError};

/// Where our program goes among those of others when it is attached. It keeps its place when it is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// Ahead of all that are there. Who comes later and asks for the same goes ahead of ours:
    /// [`Attacher::before`](super::Attacher::before) tells.
    #[default]
    First,
    /// Behind all that are there.
    Last,
    /// Ahead of the program of this number.
    Before(u32),
    /// Behind the program of this number.
    After(u32),
}

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

/// Names a kind of chain: [`Tcx`](super::tcx::Tcx) or [`Netkit`](super::netkit::Netkit).
pub trait Chained: Send + Sync {
    /// What is particular to it.
    const KIND: Kind;
}

/// A kind of chain.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Stands first in the names of pins.
    pub(super) name: &'static str,
    /// What a kernel without it is told to be missing.
    pub(super) missing: &'static str,
    /// `enum bpf_attach_type` of both directions.
    pub(super) ingress: u32,
    pub(super) egress: u32,
    /// `enum bpf_link_type`.
    pub(super) link_type: u32,
    /// How a program is described that the link of this number holds.
    pub(super) via: fn(Option<u32>) -> Via,
    /// What a device must be.
    pub(super) device: &'static str,
}

impl Kind {
    fn attach_type(&self, direction: Direction) -> u32 {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }

    /// The name of a pin. The link's number makes it exact: while the pin is there the link is, and no other has the
    /// number.
    fn pin(&self, direction: Direction, link: u32, label: &str) -> String {
        format!("{}-{}-{link}-{label}", self.name, word(direction))
    }

    fn parse<'a>(&self, pin: &'a str) -> Option<(Direction, u32, &'a str)> {
        let (direction, rest) = pin.strip_prefix(self.name)?.strip_prefix('-')?.split_once('-')?;
        let (link, label) = rest.split_once('-')?;
        let direction = [Direction::Ingress, Direction::Egress].into_iter().find(|d| word(*d) == direction)?;
        Some((direction, link.parse().ok()?, label))
    }

    /// The chain; none where there is no such device.
    fn query(&self, hook: Hook) -> Result<Option<Chain>, AttachError> {
        match sys::query_chain(hook.device.get(), self.attach_type(hook.direction)) {
            Ok(chain) => Ok(Some(chain)),
            Err(e) if e.is(libc::ENODEV) => Ok(None),
            Err(e) if e.is(libc::EINVAL) => Err(AttachError::Unsupported { feature: self.missing }),
            Err(e) if e.is(libc::ENXIO) || e.is(libc::EACCES) => Err(self.wrong_device(hook)),
            Err(e) => Err(e.into()),
        }
    }

    fn wrong_device(&self, hook: Hook) -> AttachError {
        AttachError::WrongDevice { device: hook.device, want: self.device }
    }

    fn pin_of<'a>(&self, hook: Hook, link: u32, pins: &'a [String]) -> Option<(&'a str, &'a str)> {
        pins.iter().find_map(|pin| match self.parse(pin) {
            Some((direction, id, label)) if link != 0 && (direction, id) == (hook.direction, link) => {
                Some((pin.as_str(), label))
            }
            _ => None,
        })
    }

    fn describe(
        &self,
        hook: Hook,
        place: usize,
        (program, link): (u32, u32),
        pins: &[String],
    ) -> Result<Attached, AttachError> {
        let info = match sys::program_by_id(program).and_then(|fd| sys::program_info(fd.as_fd())) {
            Ok(info) => Some(info),
            // Taken off since the chain was asked for.
            Err(e) if e.is(libc::ENOENT) => None,
            Err(e) => return Err(e.into()),
        };
        let owner = match self.pin_of(hook, link, pins) {
            Some((_, label)) => Owner::Ours(label.to_owned()),
            None => Owner::Foreign(info.as_ref().map(|i| i.name.clone())),
        };
        Ok(Attached {
            owner,
            program: Some(program),
            tag: info.map(|i| i.tag),
            priority: u16::try_from(place).unwrap_or(u16::MAX),
            class: 0,
            via: (self.via)((link != 0).then_some(link)),
        })
    }

    /// The chain as others would see it: nothing in it is ours.
    pub(super) fn foreign_chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        match self.query(hook) {
            Ok(None) | Err(AttachError::Unsupported { .. } | AttachError::WrongDevice { .. }) => Ok(Vec::new()),
            Ok(Some(chain)) => {
                chain.programs.iter().enumerate().map(|(n, entry)| self.describe(hook, n, *entry, &[])).collect()
            }
            Err(e) => Err(e),
        }
    }

    /// Takes exactly this program off, if it is there still, through its link or without one.
    pub(super) fn evict(&self, hook: Hook, program: u32, link: Option<u32>) -> Result<bool, AttachError> {
        let attach_type = self.attach_type(hook.direction);
        for _ in 0..ATTEMPTS {
            let chain = match sys::query_chain(hook.device.get(), attach_type) {
                Ok(chain) => chain,
                Err(e) if e.is(libc::ENODEV) || e.is(libc::EINVAL) => return Ok(false),
                Err(e) => return Err(e.into()),
            };
            if !chain.programs.contains(&(program, link.unwrap_or(0))) {
                return Ok(false);
            }
            let taken = match link {
                Some(link) => sys::link_by_id(link).and_then(|link| sys::detach_link(link.as_fd())),
                None => sys::program_by_id(program).and_then(|program| {
                    sys::detach_program(program.as_fd(), hook.device.get(), attach_type, chain.revision)
                }),
            };
            match taken {
                Ok(()) => return Ok(true),
                Err(e) if e.is(libc::ENOENT) || e.is(libc::ENODEV) => return Ok(false),
                // Somebody else has changed the chain: look again whether it is there.
                Err(e) if e.is(libc::ESTALE) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(AttachError::Raced { hook })
    }
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// Attaches by links, each pinned under a name made of its direction, its number and the label. [`TcxAttacher`] and
/// [`NetkitAttacher`] are the two that there are.
///
/// Any number of processes may use the same pins at once; they wait for each other. To attach and to detach take 10 to 20
/// milliseconds, for the kernel waits for an RCU grace period under its RTNL lock; to replace takes 0.1 of one, and 0.4 among
/// 500 pins, which are looked through by name.
///
/// Labels have at most 160 letters, digits, `-` and `_`. A tag's class is refused, for the kernel has no place for one: a
/// program that must know its device reads `ifindex`, or holds a constant.
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
#[derive(Debug, Clone)]
pub struct LinkAttacher<K> {
    pins: Pins,
    placement: Placement,
    kind: PhantomData<K>,
}

/// Ours on a hook.
struct Ours {
    pin: String,
    label: String,
    attached: Attached,
}

impl<K: Chained> LinkAttacher<K> {
    /// Pins links here, and puts programs ahead of those of others.
    pub fn new(pins: Pins) -> Self {
        Self::placed(pins, Placement::First)
    }

    /// As [`LinkAttacher::new`], with another place for what it attaches.
    pub fn placed(pins: Pins, placement: Placement) -> Self {
        Self { pins, placement, kind: PhantomData }
    }

    /// A number that each change of the hook's chain raises, whoever makes it; none where there is no such device. For one who
    /// watches whether others still are where they were: while it is the same and something of ours stays on the chain,
    /// [`Attacher::chain`] is the same. Once the chain was empty it counts from 1 again, so that the same number may tell of
    /// another chain.
    pub fn revision(&self, hook: Hook) -> Result<Option<u64>, AttachError> {
        Ok(K::KIND.query(hook)?.map(|chain| chain.revision))
    }

    /// Every link that is pinned here, also those whose device has vanished or is in another namespace.
    pub fn links(&self) -> Result<Vec<PinnedLink>, AttachError> {
        let mut links = Vec::new();
        for pin in self.names()? {
            let Some((direction, _, label)) = K::KIND.parse(&pin) else { continue };
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

    /// Takes off whatever has this label, in whichever namespace its device is, and its pins with it: for one who cleans up
    /// after a pod without entering it. Returns how many links there were.
    pub fn release(&self, label: &str) -> Result<usize, AttachError> {
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(0),
            lock => lock?,
        };
        let mut taken = 0;
        for pin in self.names()?.iter().filter(|pin| K::KIND.parse(pin).is_some_and(|(_, _, l)| l == label)) {
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
        for link in &vanished {
            self.pins.remove(&K::KIND.pin(link.direction, link.link, &link.label))?;
        }
        Ok(vanished)
    }

    fn create(&self, hook: Hook, program: &Program, label: &str) -> Result<(), AttachError> {
        let position = match self.placement {
            Placement::First => Position { side: sys::BEFORE, relative: None },
            Placement::Last => Position { side: sys::AFTER, relative: None },
            Placement::Before(program) => Position { side: sys::BEFORE, relative: Some(program) },
            Placement::After(program) => Position { side: sys::AFTER, relative: Some(program) },
        };
        let attach_type = K::KIND.attach_type(hook.direction);
        let link = match sys::create_link(program.as_fd(), hook.device.get(), attach_type, position) {
            Ok(link) => link,
            Err(e) if e.is(libc::ENODEV) => return Err(AttachError::NoDevice(hook.device)),
            Err(e) if e.is(libc::EEXIST) => return Err(same_program(hook)),
            Err(e) => {
                return Err(match position.relative {
                    Some(program) if e.is(libc::ENOENT) => AttachError::NoNeighbour { hook, program },
                    _ => e.into(),
                });
            }
        };
        // Without its pin it ends with this descriptor: what fails or dies here leaves the hook as it was.
        let info = sys::link_info(link.as_fd())?.ok_or_else(no_link)?;
        self.pins.pin(&K::KIND.pin(hook.direction, info.id, label), &link)?;
        Ok(())
    }

    fn swap(&self, hook: Hook, ours: &Ours, program: &Program, label: &str) -> Result<(), AttachError> {
        let gone = AttachError::NotAttached { hook };
        let Some((link, info)) = self.open(&ours.pin)? else { return Err(gone) };
        let same = info.program == program.info().id;
        let old = sys::program_by_id(info.program)?;
        if !same {
            sys::update_link(link.as_fd(), program.as_fd(), old.as_fd()).map_err(|e| match e.raw_os_error() {
                Some(libc::ENOLINK) => gone,
                Some(libc::EEXIST) => same_program(hook),
                // The caller may attach, or would not have come here: what is compared is meant.
                Some(libc::EPERM) => AttachError::Raced { hook },
                _ => e.into(),
            })?;
        }
        if ours.label != label
            && let Err(error) = self.pins.rename(&ours.pin, &K::KIND.pin(hook.direction, info.id, label))
        {
            if !same && let Err(left) = sys::update_link(link.as_fd(), old.as_fd(), program.as_fd()) {
                tracing::warn!(pin = %ours.pin, error = %left, "the new program stays under the old label");
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Removes a pin and ends its link; `false` where there is none.
    fn take_off(&self, pin: &str) -> Result<bool, AttachError> {
        let Some((link, _)) = self.open(pin)? else { return Ok(false) };
        // In this order, for afterwards the link ends with its descriptor, however this goes on.
        self.pins.remove(pin)?;
        sys::detach_link(link.as_fd())?;
        Ok(true)
    }

    fn ours(&self, hook: Hook) -> Result<Option<Ours>, AttachError> {
        let Some(chain) = K::KIND.query(hook)? else { return Ok(None) };
        let pins = self.names()?;
        for (place, entry) in chain.programs.iter().enumerate() {
            if let Some((pin, label)) = K::KIND.pin_of(hook, entry.1, &pins) {
                let (pin, label) = (pin.to_owned(), label.to_owned());
                return Ok(Some(Ours { pin, label, attached: K::KIND.describe(hook, place, *entry, &pins)? }));
            }
        }
        Ok(None)
    }

    /// The names of our pins, of this kind.
    fn names(&self) -> Result<Vec<String>, AttachError> {
        match self.pins.list() {
            Ok(mut names) => {
                names.retain(|name| K::KIND.parse(name).is_some());
                Ok(names)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a pin; none where it is gone, or is no link of this kind.
    fn open(&self, pin: &str) -> Result<Option<(OwnedFd, LinkInfo)>, AttachError> {
        let Some(fd) = self.pins.get(pin)? else { return Ok(None) };
        let info = sys::link_info(fd.as_fd())?.filter(|info| info.kind == K::KIND.link_type);
        Ok(info.map(|info| (fd, info)))
    }

    /// Keeps other processes with the same pins from changing links, until it is dropped. A process that dies loses it.
    fn lock(&self) -> Result<File, AttachError> {
        let path = self.pins.directory();
        let file = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let locked = gated("lock", || {
            for _ in 0..ATTEMPTS {
                let directory = File::open(path)?;
                directory.lock()?;
                // While this one waited, another bpffs may have been mounted here, which others lock.
                if file(directory.metadata()?) == file(std::fs::metadata(path)?) {
                    return Ok(directory);
                }
            }
            Err(io::Error::from_raw_os_error(libc::ESTALE))
        });
        locked.map_err(|source| PinError::new("lock", self.pins.directory(), source).into())
    }
}

impl<K: Chained> Attacher for LinkAttacher<K> {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        check(program, tag)?;
        let _lock = self.lock()?;
        match self.ours(hook)? {
            Some(ours) => match self.swap(hook, &ours, program, tag.label) {
                // The device, or somebody else, has ended the link since it was found in the chain.
                Err(AttachError::NotAttached { hook }) => Err(AttachError::Raced { hook }),
                swapped => swapped.map(|()| Some(ours.attached)),
            },
            None => self.create(hook, program, tag.label).map(|()| None),
        }
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        check(program, tag)?;
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(AttachError::NotAttached { hook }),
            lock => lock?,
        };
        let ours = self.ours(hook)?.ok_or(AttachError::NotAttached { hook })?;
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
                let chain = match K::KIND.query(hook) {
                    Err(AttachError::WrongDevice { .. }) => None,
                    chain => chain?,
                };
                if chain.is_some_and(|c| c.programs.iter().any(|(_, l)| K::KIND.pin_of(hook, *l, &pins).is_some())) {
                    devices.push(device);
                    break;
                }
            }
        }
        Ok(devices)
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        let Some(chain) = K::KIND.query(hook)? else { return Ok(Vec::new()) };
        let pins = self.names()?;
        chain.programs.iter().enumerate().map(|(n, entry)| K::KIND.describe(hook, n, *entry, &pins)).collect()
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        let _lock = match self.lock() {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            lock => lock?,
        };
        let Some(ours) = self.ours(hook)? else { return Ok(false) };
        self.take_off(&ours.pin)
    }
}

fn check(program: &Program, tag: Tag<'_>) -> Result<(), AttachError> {
    check_classifier(program)?;
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if tag.label.len() > LABEL_BYTES || !tag.label.bytes().all(fits) {
        let want = "at most 160 letters, digits, '-' and '_'";
        return Err(AttachError::BadLabel { label: tag.label.to_owned(), want });
    }
    if tag.class != 0 {
        return Err(AttachError::NoClass { class: tag.class });
    }
    Ok(())
}

/// A program stands in a chain once (kernel/bpf/mprog.c, `bpf_mprog_exists`).
fn same_program(hook: Hook) -> AttachError {
    AttachError::Occupied { hook, occupant: "the same program, attached by somebody else,".to_owned() }
}

fn no_link() -> SysError {
    SysError { call: "BPF_LINK_CREATE", source: io::ErrorKind::InvalidData.into() }
}

/// Leaves room for the rest of a pin's name ([`Pins`] takes 200 bytes).
const LABEL_BYTES: usize = 160;
/// How often a chain is looked at again that others keep changing.
const ATTEMPTS: usize = 16;

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require_with};

    use super::*;
    use crate::attach::conformance::{Pair, constant, deny};
    use crate::attach::{Attacher, ClsactAttacher, TcxAttacher, everything, verdict};
    use crate::probe::Features;

    #[test]
    fn names_of_pins_read_as_written() {
        let kind = super::super::tcx::Tcx::KIND;
        for (direction, link, label) in [
            (Direction::Ingress, 7, "db-0"),
            (Direction::Egress, u32::MAX, ""),
            (Direction::Ingress, 1, "-tcx-egress-2-"),
        ] {
            let pin = kind.pin(direction, link, label);
            assert_eq!(kind.parse(&pin), Some((direction, link, label)), "{pin}");
            assert_eq!(super::super::netkit::Netkit::KIND.parse(&pin), None, "{pin}");
        }
        for other in
            ["", "tcx", "tcx-ingress", "tcx-ingress-7", "tcx-sideways-7-x", "tcx-ingress-x-7", "tcxx-ingress-7-x"]
        {
            assert_eq!(kind.parse(other), None, "{other}");
        }
    }

    /// Goes also when a test fails.
    struct Mounted(Pins);

    impl Drop for Mounted {
        fn drop(&mut self) {
            // What stays mounted is found by its directory, which then stays too.
            let _ = self.0.clone().unmount();
        }
    }

    /// Programs without a link are taken off by a command of their own, which is told the chain's revision.
    #[test]
    fn a_program_without_a_link_is_evicted_alone() {
        let no_tcx =
            || (!Features::probe().is_ok_and(|f| f.tcx)).then(|| "the kernel has no tcx (Linux 6.6)".to_owned());
        if !require_with(Rung::Kernel, no_tcx) {
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let mounted = Mounted(Pins::open(directory.path().join("bpf")).expect("pins"));
        let ours = TcxAttacher::new(mounted.0.clone());
        let pair = Pair::default();
        let hook = pair.hook(Direction::Ingress);
        let (one, two) = (constant("one", verdict::OK), constant("two", verdict::UNSPEC));
        pair.on_host(|| {
            let device = hook.device.get();
            let attach = |program: &Program| sys::attach_program(program.as_fd(), device, sys::TCX_INGRESS);
            attach(&one).expect("attached without a link");
            ours.attach(hook, &deny(), "ours").expect("attached");
            attach(&two).expect("attached without a link");
            let all = everything(hook).expect("the chain");
            let foreign: Vec<_> = all.iter().filter(|a| a.via == Via::Tcx { link: None }).collect();
            assert_eq!(foreign.iter().map(|a| a.program).collect::<Vec<_>>(), [one.info().id, two.info().id].map(Some));
            // An old revision is refused: what has changed since is not known to who names it.
            let chain = sys::query_chain(device, sys::TCX_INGRESS).expect("the chain");
            let stale = sys::detach_program(one.as_fd(), device, sys::TCX_INGRESS, chain.revision - 1);
            assert!(stale.is_err_and(|e| e.is(libc::ESTALE)));
            assert!(ours.evict(hook, foreign[0]).expect("evicted"));
            assert!(!ClsactAttacher.evict(hook, foreign[0]).expect("asked"), "it is gone");
            assert_eq!(
                ours.chain(hook).expect("the chain").iter().map(|a| a.program).collect::<Vec<_>>(),
                [ours.attached(hook).expect("ours").and_then(|a| a.program), Some(two.info().id)]
            );
            assert!(ours.detach(hook).expect("detached"));
            assert_eq!(everything(hook).expect("the chain").len(), 1, "what nobody named stays");
        });
    }
}
