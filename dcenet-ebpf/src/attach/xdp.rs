//! XDP programs, which run before everything else that receives: in the driver, before the packet has a `struct sk_buff`
//! (native), or in the stack, just after it has one (generic).
//!
//! A device takes one program in each place, and not in both at once (net/core/dev.c, `dev_xdp_attach`): there is no chain.
//! [`XdpAttacher`] refuses a device that has a program of somebody else; [`Attacher::evict`](super::Attacher::evict) takes it
//! off where that is meant.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::{Attributes, Family, Message, Socket};
use dcenet_core::netns::NetNs;

use super::links::{Entry, LinkAttacher, Linked, Look, PinName};
use super::pinned::{self, ATTEMPTS};
use super::{AttachError, Attached, Direction, Hook, Via};
use crate::object::ProgramKind;
use crate::pin::Pins;
use crate::program::Program;
use crate::sys::{self, LinkInfo, SysError};

/// Attaches XDP programs, to [`Direction::Ingress`] alone: [`AttachError::IngressOnly`] for the other.
///
/// Programs answer as [`xdp_verdict`](super::xdp_verdict) has it, not [`verdict`](super::verdict). [`Via::Xdp`] of
/// [`Attacher::attached`](super::Attacher::attached) tells whether the driver runs it.
///
/// A device that moves takes its program along. It is found again in the namespace where it was attached, and in another
/// where no second link fits, whosever it is: the kernel tells of a link no more than its program and its device's index.
/// Where several fit every call answers [`AttachError::Ambiguous`] and changes nothing, also for the moment that it takes the
/// link of a process that died to end; [`LinkAttacher::release`] takes off by label.
///
/// # Minimum kernel version
/// 5.14 (links came with 5.9, `SO_NETNS_COOKIE` with 5.14).
pub type XdpAttacher = LinkAttacher<Xdp>;

/// XDP's links.
#[derive(Debug, Clone, Copy)]
pub struct Xdp;

/// Where an XDP program is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XdpPlace {
    /// In the driver, and in the stack where the driver cannot, or not as the device is set up now (its MTU, its queues).
    #[default]
    Best,
    /// In the driver or nowhere. Where ours is in the stack already it stays: [`AttachError::OtherMode`].
    Native,
    /// In the stack. Where ours is in the driver already it stays: [`AttachError::OtherMode`].
    Generic,
}

/// Where an XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum XdpMode {
    /// In the network card.
    Offloaded,
    /// In the driver.
    Native,
    /// In the stack.
    Generic,
}

impl XdpMode {
    /// In the order in which they run.
    const ALL: [Self; 3] = [Self::Offloaded, Self::Native, Self::Generic];

    /// `XDP_FLAGS_*_MODE` (include/uapi/linux/if_link.h).
    const fn flag(self) -> u32 {
        match self {
            Self::Generic => 1 << 1,
            Self::Native => 1 << 2,
            Self::Offloaded => 1 << 3,
        }
    }

    /// `IFLA_XDP_*_PROG_ID`.
    const fn attribute(self) -> u16 {
        match self {
            Self::Native => 5,
            Self::Generic => 6,
            Self::Offloaded => 7,
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offloaded => "offloaded",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

impl Linked for Xdp {
    const NAME: &'static str = "xdp";
    const PROGRAM: ProgramKind = ProgramKind::Xdp;
    const LINK_TYPE: u32 = sys::LINK_TYPE_XDP;

    type Place = XdpPlace;

    fn entries(hook: Hook, pins: &Pins, look: Look) -> Result<Option<Vec<Entry>>, AttachError> {
        let Some(mut entries) = on_hook(hook)? else { return Ok(None) };
        if entries.is_empty() {
            return Ok(Some(entries));
        }
        match ours(hook, &entries, pins)? {
            Ours::At { place, link } => entries[place].link = Some(link),
            // Its program was replaced between the two looks.
            Ours::Changed if look == Look::Unlocked => return Err(AttachError::Raced { hook }),
            // It has gone elsewhere, and this one is foreign.
            Ours::Nowhere | Ours::Changed => {}
        }
        Ok(Some(entries))
    }

    fn fits(via: &Via, place: XdpPlace) -> Result<(), XdpMode> {
        match (via, place) {
            (Via::Xdp { mode: mode @ XdpMode::Generic }, XdpPlace::Native) => Err(*mode),
            (Via::Xdp { mode: mode @ (XdpMode::Native | XdpMode::Offloaded) }, XdpPlace::Generic) => Err(*mode),
            _ => Ok(()),
        }
    }

    /// Such a pin is of a device that has gone elsewhere: it may not be taken for one of the device that has its index now.
    fn retire(hook: Hook, pins: &Pins) -> Result<(), AttachError> {
        if hook.direction == Direction::Egress {
            return Ok(());
        }
        let here = format!("{:x}", sys::netns_cookie()?);
        for pin in pins.list()? {
            let Some(name) = PinName::read::<Self>(&pin) else { continue };
            let Some((_, label)) = name.mark.split_once('-').filter(|(cookie, _)| *cookie == here) else { continue };
            let info = pinned::open::<AttachError>(pins, Self::LINK_TYPE, &pin)?.map(|(_, info)| info);
            if info.is_some_and(|info| info.device == hook.device.get()) {
                // No namespace has the cookie 0 (net/core/net_namespace.c, `net_gen_cookie`).
                pins.rename(&pin, &PinName::write::<Self>(hook.direction, name.link, &format!("0-{label}")))?;
            }
        }
        Ok(())
    }

    fn create(hook: Hook, program: &Program, place: XdpPlace) -> Result<OwnedFd, AttachError> {
        if hook.direction == Direction::Egress {
            return Err(AttachError::IngressOnly { hook });
        }
        let create = |mode: XdpMode| sys::create_xdp_link(program.as_fd(), hook.device.get(), mode.flag());
        let created = match place {
            XdpPlace::Native => create(XdpMode::Native),
            XdpPlace::Generic => create(XdpMode::Generic),
            XdpPlace::Best => create(XdpMode::Native).or_else(|e| match e.raw_os_error() {
                // A veth pair misses queues with ENOSPC, and its other end with ENOTCONN (drivers/net/veth.c, `veth_xdp_set`).
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE | libc::E2BIG | libc::ENOSPC | libc::ENOTCONN) => {
                    create(XdpMode::Generic)
                }
                _ => Err(e),
            }),
        };
        created.map_err(|error| refused(hook, error))
    }

    /// A link tells the index of its device alone, and an index means another device in another namespace.
    fn mark(label: &str) -> Result<String, AttachError> {
        Ok(format!("{:x}-{label}", sys::netns_cookie()?))
    }

    fn label(mark: &str) -> Option<&str> {
        mark.split_once('-').map(|(_, label)| label)
    }
}

/// Where ours is among the entries of a device.
enum Ours {
    At { place: usize, link: u32 },
    Nowhere,
    Changed,
}

/// A pin that was made in this namespace, or the one link of all namespaces that fits: to take a pod's link for that of another
/// opens the other pod.
fn ours(hook: Hook, entries: &[Entry], pins: &Pins) -> Result<Ours, AttachError> {
    let names = match pins.list() {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(Ours::Nowhere),
        names => names?,
    };
    let place_of = |program| entries.iter().position(|entry| entry.program == program);
    let here = format!("{:x}", sys::netns_cookie()?);
    let (mut newest, mut moved) = (None, Vec::new());
    for name in &names {
        let Some(pin) = PinName::read::<Xdp>(name) else { continue };
        let Some(fd) = pins.get(name)? else { continue };
        let Some(info) = sys::link_info(fd.as_fd())?.filter(|info| info.kind == Xdp::LINK_TYPE) else { continue };
        if info.device != hook.device.get() {
            continue;
        }
        if pin.mark.split_once('-').is_some_and(|(cookie, _)| cookie == here) {
            // An older one of this index is of a device that has moved away, or it would have been replaced.
            newest = newest.max(Some((info.id, info.program)));
        } else if let Some(place) = place_of(info.program) {
            moved.push((place, info));
        }
    }
    match (newest, place_of(newest.map_or(0, |(_, program)| program))) {
        (Some((link, _)), Some(place)) => return Ok(Ours::At { place, link }),
        (Some(_), None) => return Ok(Ours::Changed),
        (None, _) => {}
    }
    let Some((place, LinkInfo { id, program, .. })) = moved.first().copied() else { return Ok(Ours::Nowhere) };
    // A link that has lost its pin, or has none yet, may be the one that is here.
    match holders(hook.device, program)?.len() {
        0 | 1 => Ok(Ours::At { place, link: id }),
        links => Err(AttachError::Ambiguous { hook, program, links }),
    }
}

/// What runs before tc and netfilter see a packet, as who knows no pins sees it.
pub(super) fn foreign(hook: Hook) -> Result<Vec<Attached>, AttachError> {
    let entries = on_hook(hook)?.unwrap_or_default();
    entries.into_iter().enumerate().map(|(place, entry)| entry.foreign(place)).collect()
}

fn on_hook(hook: Hook) -> Result<Option<Vec<Entry>>, AttachError> {
    let Some(programs) = programs(hook.device)? else { return Ok(None) };
    let entry = |(mode, program)| Entry { program, link: None, via: Via::Xdp { mode } };
    let received = programs.into_iter().filter(|_| hook.direction == Direction::Ingress);
    Ok(Some(received.map(entry).collect()))
}

/// Programs of a device with their modes; none where there is no such device.
fn programs(device: IfIndex) -> Result<Option<Vec<(XdpMode, u32)>>, AttachError> {
    let message = Message::new(libc::RTM_GETLINK, 0, format!("look up XDP of device {device}"), &header(device));
    let replies = match socket()?.request(&message) {
        Err(e) if e.errno() == Some(libc::ENODEV) => return Ok(None),
        replies => replies?,
    };
    let mut programs = Vec::new();
    for reply in replies {
        let attributes = Attributes::new(reply.payload.get(IFINFOMSG_BYTES..).unwrap_or_default());
        let xdp = Attributes::new(attributes.find(libc::IFLA_XDP).unwrap_or_default());
        for mode in XdpMode::ALL {
            let number = xdp.find(mode.attribute()).and_then(|id| id.try_into().ok()).map(u32::from_ne_bytes);
            programs.extend(number.filter(|id| *id != 0).map(|id| (mode, id)));
        }
    }
    Ok(Some(programs))
}

/// Takes a program of somebody else off, if it is there still, whether a link holds it or not.
pub(super) fn evict(hook: Hook, program: u32, mode: XdpMode) -> Result<bool, AttachError> {
    let mut refusal = None;
    let there = || Ok::<_, AttachError>(programs(hook.device)?.is_some_and(|all| all.contains(&(mode, program))));
    for _ in 0..ATTEMPTS {
        if !there()? {
            return Ok(false);
        }
        let expected = match sys::program_by_id(program) {
            Err(e) if e.is(libc::ENOENT) => return Ok(false),
            expected => expected?,
        };
        match socket()?.request(&remove(hook, &expected, mode)) {
            Ok(_) => return Ok(true),
            Err(e) => match e.errno() {
                Some(libc::ENODEV) => return Ok(false),
                // Another is there by now: look again. Or a device above it has one, and that will be so the next time, too.
                Some(libc::EEXIST) => {
                    refusal = Some(e);
                    continue;
                }
                // A link holds it.
                Some(libc::EBUSY) => {}
                _ => return Err(e.into()),
            },
        }
        let holders = holders(hook.device, program)?;
        // The link that was here may have ended since, and then the one found is of another namespace.
        if !there()? {
            return Ok(false);
        }
        match &holders[..] {
            [link] => {
                sys::detach_link(link.as_fd())?;
                if !there()? {
                    return Ok(true);
                }
            }
            [] => {}
            several => return Err(AttachError::Ambiguous { hook, program, links: several.len() }),
        }
    }
    Err(refusal.map_or(AttachError::Raced { hook }, AttachError::from))
}

/// The XDP links of every namespace that hold the program on a device of this index.
fn holders(device: IfIndex, program: u32) -> Result<Vec<OwnedFd>, SysError> {
    let mut holders = Vec::new();
    let mut last = 0;
    while let Some(id) = sys::next_link_id(last)? {
        last = id;
        let link = match sys::link_by_id(id) {
            // It has ended, or is not ready yet.
            Err(e) if e.is(libc::ENOENT) || e.is(libc::EAGAIN) => continue,
            link => link?,
        };
        let info = sys::link_info(link.as_fd())?;
        if info.is_some_and(|i| (i.kind, i.device, i.program) == (Xdp::LINK_TYPE, device.get(), program)) {
            holders.push(link);
        }
    }
    Ok(holders)
}

fn remove(hook: Hook, expected: &OwnedFd, mode: XdpMode) -> Message {
    let doing = format!("take the XDP program off device {}", hook.device);
    let mut message = Message::new(libc::RTM_SETLINK, 0, doing, &header(hook.device));
    message.nest(libc::IFLA_XDP | libc::NLA_F_NESTED as u16, |xdp| {
        xdp.bytes(IFLA_XDP_FD, &(-1_i32).to_ne_bytes())
            .u32(IFLA_XDP_FLAGS, mode.flag() | XDP_FLAGS_REPLACE)
            .bytes(IFLA_XDP_EXPECTED_FD, &expected.as_raw_fd().to_ne_bytes());
    });
    message
}

/// Says why the kernel made no link (net/core/dev.c, `bpf_xdp_link_attach`, `dev_xdp_attach`).
fn refused(hook: Hook, error: SysError) -> AttachError {
    let occupied = error.is(libc::EBUSY) || error.is(libc::EEXIST);
    if !occupied && !error.is(libc::EINVAL) {
        return error.into();
    }
    match foreign(hook) {
        Ok(there) if occupied => {
            let first = there.first().map(ToString::to_string);
            let occupant = first.unwrap_or_else(|| "an XDP program of a device above it".to_owned());
            AttachError::Occupied { hook, occupant }
        }
        Ok(_) if matches!(programs(hook.device), Ok(None)) => AttachError::NoDevice(hook.device),
        _ => error.into(),
    }
}

fn socket() -> Result<Socket, AttachError> {
    Ok(NetNs::of_this_thread()?.socket(Family::Route)?)
}

/// `struct ifinfomsg` (include/uapi/linux/rtnetlink.h).
fn header(device: IfIndex) -> [u8; IFINFOMSG_BYTES] {
    let mut bytes = [0; IFINFOMSG_BYTES];
    bytes[4..8].copy_from_slice(&device.get().to_ne_bytes());
    bytes
}

const IFINFOMSG_BYTES: usize = 16;
/// `IFLA_XDP_*` and `XDP_FLAGS_REPLACE` (include/uapi/linux/if_link.h).
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
const IFLA_XDP_EXPECTED_FD: u16 = 8;
const XDP_FLAGS_REPLACE: u32 = 1 << 4;
