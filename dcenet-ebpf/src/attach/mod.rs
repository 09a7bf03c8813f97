//! Putting programs on devices.
//!
//! An [`Attacher`] acts on a device by its index in the network namespace of the calling thread, because the kernel
//! resolves an index there: to attach inside a pod, call from a thread in the pod's namespace. It holds nothing between
//! calls. What it attaches stays in force when the process ends, also by SIGKILL, and is found again by its mark.
//!
//! # Verdicts
//! Programs on one hook form a chain. `TC_ACT_SHOT` drops the packet and ends the chain. `TC_ACT_OK` lets it pass **and
//! ends the chain**, so that programs of others after ours would never see the packet: ours go on with
//! [`verdict::UNSPEC`] instead, which passes when nobody else objects (net/sched/cls_bpf.c, `cls_bpf_classify`).
//!
//! # Which attacher
//! [`ClsactAttacher`] works on every kernel, leaves no pin and is right for devices of the host. [`TcxAttacher`] is right for
//! devices that live in a pod or move, and where others must not run ahead; it keeps its links as pins. [`for_kernel`] takes
//! the one that the kernel has. [`NetkitAttacher`] is for the host's ends of netkit pairs, [`XdpAttacher`] for what is to be
//! dropped, or counted, before it costs anything. Every one of them does what `conformance` (feature `test-support`) says,
//! and so can a backend of somebody else's. [`CgroupAttacher`] is for processes and not for devices.
//!
//! # Who runs first
//! What comes in meets XDP first. On both hooks a packet meets tcx before clsact (net/core/dev.c, `sch_handle_ingress` and
//! `sch_handle_egress`), and in both the programs in their order. A program that answers `TC_ACT_OK`, or redirects, ends
//! all of it: what comes behind, ours too, never sees the packet. [`Attacher::before`] lists what could,
//! [`Attacher::evict`] removes what the caller names.
//!
//! # Example
//! Nothing comes in through a device until something better is put in place.
//!
//! ```no_run
//! use dcenet_core::model::IfIndex;
//! use dcenet_ebpf::asm::Asm;
//! use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, verdict};
//! use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
//! use dcenet_ebpf::object::{Object, ProgramKind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut code = Asm::program("deny", ProgramKind::Classifier);
//! code.ret(verdict::SHOT);
//! let mut object = Object::new();
//! object.add(code.finish()?)?;
//!
//! let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
//! let deny = loaded.take_program("deny").ok_or("the program just written")?;
//! let hook = Hook { device: IfIndex::new(4).ok_or("an index")?, direction: Direction::Ingress };
//! ClsactAttacher.attach(hook, &deny, "default-deny")?; // stays when this process ends
//! assert!(ClsactAttacher.attached(hook)?.is_some());
//! ClsactAttacher.detach(hook)?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::Arc;

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::NetlinkError;
use dcenet_core::netns::NetNsError;

use crate::object::ProgramKind;
use crate::pin::{PinError, Pins};
use crate::probe::Features;
use crate::program::{self, Program};
use crate::sys::SysError;

mod cgroup;
mod clsact;
#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
#[cfg(any(test, feature = "test-support"))]
pub mod flaky;
mod links;
mod mprog;
mod netkit;
mod pinned;
mod scrub;
mod tcx;
mod xdp;

pub use self::cgroup::{Cgroup, CgroupAttached, CgroupAttacher, CgroupError, CgroupHook, CgroupLink};
pub use self::clsact::ClsactAttacher;
pub use self::links::{LinkAttacher, PinnedLink};
use self::mprog::Chained;
pub use self::mprog::Placement;
pub use self::netkit::{Netkit, NetkitAttacher};
pub use self::scrub::Scrubber;
pub use self::tcx::{Tcx, TcxAttacher};
pub use self::xdp::{Xdp, XdpAttacher, XdpMode, XdpPlace};

/// tcx links where the kernel has them (Linux 6.6), clsact otherwise.
///
/// What differs where it is clsact: a device loses its programs when it moves to another namespace; a process with
/// CAP_NET_ADMIN in the device's namespace, such as root of a pod, can remove them with its queueing discipline; ours
/// run behind programs with a lower priority; and [`Tag::class`] is carried, which tcx refuses. What is attached does not
/// change its kind when the kernel does: a restart with another kernel leaves nothing attached, for pins and devices go too.
pub fn for_kernel(features: &Features, pins: &Pins) -> Arc<dyn Attacher> {
    if features.tcx { Arc::new(TcxAttacher::new(pins.clone())) } else { Arc::new(ClsactAttacher) }
}

/// What a classifier on clsact or tcx returns (include/uapi/linux/pkt_cls.h, `TC_ACT_*`).
pub mod verdict {
    /// Go on: the next program decides, and after the last the packet passes. `TCX_NEXT` is the same number.
    pub const UNSPEC: i32 = -1;
    /// Pass, and skip what comes after. Ours never return it.
    pub const OK: i32 = 0;
    /// Drop.
    pub const SHOT: i32 = 2;
}

/// What an XDP program returns (include/uapi/linux/bpf.h, `enum xdp_action`).
pub mod xdp_verdict {
    /// Drop.
    pub const DROP: i32 = 1;
    /// Go on to the stack, where all other hooks are.
    pub const PASS: i32 = 2;
}

/// Which way packets go through a device, seen from the namespace that the device is in.
///
/// On the host's end of a veth pair, what the pod sends comes in: its *egress* policy sits on [`Direction::Ingress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From the wire, or the other end, to the stack.
    Ingress,
    /// From the stack to the wire, or the other end.
    Egress,
}

/// A place for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hook {
    /// The device, by its index in the calling thread's network namespace.
    pub device: IfIndex,
    /// Which of its directions.
    pub direction: Direction,
}

/// One program on a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attached {
    /// Whose it is.
    pub owner: Owner,
    /// The program's number; none for a classifier of clsact that is no eBPF program.
    pub program: Option<u32>,
    /// The hash of the program's instructions.
    pub tag: Option<[u8; 8]>,
    /// Where it stands in the chain: lower ones run first. On clsact its priority, on tcx its place, from 0.
    pub priority: u16,
    /// The low 16 bits of its class id, which the program reads as `tc_classid`; 0 where it was given none.
    pub class: u16,
    /// What holds it on the hook.
    pub via: Via,
}

impl Attached {
    /// Whether both are the same link, or the same filter. Its program may be replaced between two looks at it; only where
    /// no link holds the program has it no other name.
    fn has_place_of(&self, other: &Self) -> bool {
        self.via == other.via
            && match self.via {
                Via::Clsact(_) => self.priority == other.priority,
                Via::Tcx { link } | Via::Netkit { link } => link.is_some() || self.program == other.program,
                // There is one such place.
                Via::Xdp { .. } => true,
            }
    }
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.owner, self.program) {
            (Owner::Ours(label), _) => write!(f, "dcenet's program of {label:?}")?,
            (Owner::Foreign(Some(name)), Some(number)) => write!(f, "program {number} {name:?}")?,
            (Owner::Foreign(None), Some(number)) => write!(f, "program {number}")?,
            (Owner::Foreign(name), None) => write!(f, "classifier {:?}", name.as_deref().unwrap_or("unknown"))?,
        }
        match &self.via {
            Via::Clsact(_) => write!(f, " on clsact with priority {}", self.priority),
            Via::Tcx { .. } => write!(f, " on tcx"),
            Via::Netkit { .. } => write!(f, " on netkit"),
            Via::Xdp { mode } => write!(f, " on XDP ({mode})"),
        }
    }
}

/// What holds a program on a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Via {
    /// A filter of the queueing discipline `clsact`, or of `ingress`.
    Clsact(Filter),
    /// The device's chain of tcx programs.
    Tcx {
        /// The number of the link that holds it; none where it was attached without one (`BPF_PROG_ATTACH`).
        link: Option<u32>,
    },
    /// A netkit pair's chain of programs.
    Netkit {
        /// As for tcx.
        link: Option<u32>,
    },
    /// The device's one XDP program in this mode.
    Xdp {
        /// Where it runs.
        mode: XdpMode,
    },
}

/// What names a filter on its hook, beside its priority.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filter {
    /// The kind of classifier: `bpf`, `u32`, `flower`...
    pub kind: String,
    /// The Ethernet protocol that it is asked for, in the machine's byte order (`ETH_P_*`).
    pub protocol: u16,
    /// Its list: packets begin in 0 and come to others only where a filter sends them.
    pub chain: u32,
    /// Its number within kind and priority.
    pub handle: u32,
}

/// What an attachment carries beside its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Found again by [`Attacher::attached`]. Every backend takes up to 128 letters, digits, `-` and `_`; clsact takes any
    /// 200 bytes without NUL.
    pub label: &'a str,
    /// What the program reads as `tc_classid` of `struct __sk_buff`: one program can serve many devices and tell them
    /// apart at no cost. 0 for none; only clsact has others.
    pub class: u16,
}

/// Whose a program on a hook is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// Ours, with the label that it was attached under.
    Ours(String),
    /// Somebody else's, with its name where it has one.
    Foreign(Option<String>),
}

/// Puts programs on devices, one of ours on each hook.
pub trait Attacher: Send + Sync {
    /// Puts the program on the hook, in place of what we have there. Afterwards every packet meets the old program or
    /// the new one; none passes between them, and none before the first when the device is still down.
    ///
    /// Repeating the call changes nothing but the tag. Returns what was replaced.
    ///
    /// # Errors
    /// On any error the hook is as before.
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError>;

    /// As [`Attacher::attach_tagged`], but only where ours is on the hook already: for one who changes policy, and must
    /// not bring back what another has detached.
    ///
    /// # Errors
    /// [`AttachError::NotAttached`] where it is not.
    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError>;

    /// The devices of the calling thread's namespace that may carry something of ours.
    fn devices(&self) -> Result<Vec<IfIndex>, AttachError>;

    /// [`Attacher::attach_tagged`] without a class.
    fn attach(&self, hook: Hook, program: &Program, label: &str) -> Result<Option<Attached>, AttachError> {
        self.attach_tagged(hook, program, Tag { label, class: 0 })
    }

    /// [`Attacher::replace_tagged`] without a class.
    fn replace(&self, hook: Hook, program: &Program, label: &str) -> Result<Attached, AttachError> {
        self.replace_tagged(hook, program, Tag { label, class: 0 })
    }

    /// Everything that this backend sees on the hook, in the order in which it runs. Empty where the device is gone.
    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError>;

    /// Takes ours off the hook and leaves what others put there; `false` where there was none, or no device.
    ///
    /// One process at a time may detach from a device while others attach to it: the kernel offers no way to remove an
    /// empty hook only if it is still empty.
    fn detach(&self, hook: Hook) -> Result<bool, AttachError>;

    /// Removes what the backend keeps of devices that are no more, and tells how many programs were attached to them. Nothing,
    /// where the device holds all that there is.
    fn forget_vanished(&self) -> Result<usize, AttachError> {
        Ok(0)
    }

    /// Ours on the hook, with its label. How a process that was restarted learns what stands.
    fn attached(&self, hook: Hook) -> Result<Option<Attached>, AttachError> {
        Ok(self.chain(hook)?.into_iter().find(|a| matches!(a.owner, Owner::Ours(_))))
    }

    /// All that a packet meets on the hook before ours, as [`everything`] lists it; all of that where ours is not there. Any
    /// of it may end the chain, so that ours never sees the packet.
    fn before(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        let ours = self.attached(hook)?;
        let mut all = everything(hook)?;
        if let Some(place) = ours.and_then(|ours| all.iter().position(|a| a.has_place_of(&ours))) {
            all.truncate(place);
        }
        Ok(all)
    }

    /// Takes a program of somebody else off the hook: the one described, as [`Attacher::chain`] or [`Attacher::before`]
    /// told of it, and no other. `false` where it is not there any more. Whoever attached it is not told, and may do so
    /// again.
    ///
    /// # Errors
    /// [`AttachError::NotForeign`] for what is ours.
    fn evict(&self, hook: Hook, foreign: &Attached) -> Result<bool, AttachError> {
        let ours = self.attached(hook)?;
        if matches!(foreign.owner, Owner::Ours(_)) || ours.is_some_and(|ours| ours.has_place_of(foreign)) {
            return Err(AttachError::NotForeign { hook });
        }
        match (&foreign.via, foreign.program) {
            (Via::Clsact(_), _) => clsact::evict(hook, foreign),
            (Via::Tcx { link }, Some(program)) => Tcx::KIND.evict(hook, program, *link),
            (Via::Netkit { link }, Some(program)) => Netkit::KIND.evict(hook, program, *link),
            (Via::Xdp { mode }, Some(program)) => xdp::evict(hook, program, *mode),
            (Via::Tcx { .. } | Via::Netkit { .. } | Via::Xdp { .. }, None) => Ok(false),
        }
    }
}

/// All that a packet meets on a hook, on netkit, XDP, tcx and clsact, in the order in which it runs. What is on clsact alone
/// may count as ours, for links have no names.
pub fn everything(hook: Hook) -> Result<Vec<Attached>, AttachError> {
    let netkit = Netkit::KIND.foreign_chain(hook)?;
    let mut all = xdp::foreign(hook)?;
    all.extend(Tcx::KIND.foreign_chain(hook)?);
    all.extend(ClsactAttacher.chain(hook)?);
    // A pair runs its programs when an end sends: what comes in has met them before all else, what goes out will.
    match hook.direction {
        Direction::Ingress => all.splice(..0, netkit).for_each(drop),
        Direction::Egress => all.extend(netkit),
    }
    Ok(all)
}

fn check_kind(program: &Program, want: ProgramKind) -> Result<(), AttachError> {
    let info = program.info();
    if info.kind == program::number(want) {
        Ok(())
    } else {
        Err(AttachError::WrongProgram { program: info.name.clone(), kind: info.kind, want })
    }
}

/// Why a program is not on, or not off, a hook.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There is no device of this index in the calling thread's namespace.
    #[error("there is no device with index {0} in this network namespace")]
    NoDevice(IfIndex),
    /// Nothing of ours to replace.
    #[error("nothing of dcenet's is attached to device {} ({:?}); attach first", hook.device, hook.direction)]
    NotAttached {
        /// The hook.
        hook: Hook,
    },
    /// Somebody else uses the place that is ours.
    #[error("device {} ({:?}): {occupant} is in our place; remove or evict it", hook.device, hook.direction)]
    Occupied {
        /// The hook.
        hook: Hook,
        /// What is there.
        occupant: String,
    },
    /// The program is of a type that this hook does not take.
    #[error("program {program} is of type {kind}, and the hook takes {want:?} (type {})", program::number(*want))]
    WrongProgram {
        /// The program's name.
        program: String,
        /// Its type, a value of `enum bpf_prog_type`.
        kind: u32,
        /// What the hook takes.
        want: ProgramKind,
    },
    /// The label cannot be stored.
    #[error("label {label:?}: want {want}")]
    BadLabel {
        /// The label.
        label: String,
        /// What the backend takes.
        want: &'static str,
    },
    /// The backend has no place for a class.
    #[error("class {class}: links carry none; attach by clsact, or make it a constant of the program (datapath::Slot)")]
    NoClass {
        /// The class.
        class: u16,
    },
    /// There is no such link any more.
    #[error("link {link} is not pinned any more, or its device has vanished; attach anew")]
    NoLink {
        /// The link's number.
        link: u32,
    },
    /// Somebody else has changed the link, or put the same program beside it, at the same time.
    #[error("link {link}: somebody else changes it, or has put the same program beside it; try again")]
    LinkBusy {
        /// The link's number.
        link: u32,
    },
    /// The program learns whom it judges from a class that only clsact gives.
    #[error(
        "program {program:?} reads its endpoint's slot from a class, which links do not set and the pod can; attach it by \
         clsact, or make it with datapath::Slot::Constant"
    )]
    ReadsClass {
        /// The program's name.
        program: String,
    },
    /// The program next to which ours was to go is not there.
    #[error("device {} ({:?}): program {program} is not there to be a neighbour; choose another placement", hook.device, hook.direction)]
    NoNeighbour {
        /// The hook.
        hook: Hook,
        /// The program's number.
        program: u32,
    },
    /// The backend has nothing to do with such a device.
    #[error("device {device} is not {want}; choose another device, or attach by tcx or clsact")]
    WrongDevice {
        /// The device.
        device: IfIndex,
        /// What it must be.
        want: &'static str,
    },
    /// The backend's programs run on what comes in alone.
    #[error("device {} ({:?}): XDP runs on ingress alone; attach by tcx or clsact", hook.device, hook.direction)]
    IngressOnly {
        /// The hook.
        hook: Hook,
    },
    /// Links of several namespaces hold the program on devices of this index, and the kernel does not tell which is here.
    #[error(
        "device {} ({:?}): {links} links hold program {program} on devices of this index; detach the right one by bpftool",
        hook.device,
        hook.direction
    )]
    Ambiguous {
        /// The hook.
        hook: Hook,
        /// The program's number.
        program: u32,
        /// How many they are.
        links: usize,
    },
    /// Ours runs in another place than is wanted, and a replacement would leave it there.
    #[error("device {} ({:?}): ours is there as {mode} XDP, and another is wanted; detach it first", hook.device, hook.direction)]
    OtherMode {
        /// The hook.
        hook: Hook,
        /// Where it runs.
        mode: XdpMode,
    },
    /// What was to be removed as somebody else's is ours.
    #[error("device {} ({:?}): the program is dcenet's; detach it", hook.device, hook.direction)]
    NotForeign {
        /// The hook.
        hook: Hook,
    },
    /// Somebody else changed the hook at the same time.
    #[error("device {} ({:?}): somebody else changes the programs at the same time; try again", hook.device, hook.direction)]
    Raced {
        /// The hook.
        hook: Hook,
    },
    /// The kernel lacks what the backend needs.
    #[error("the kernel has no {feature}; attach by clsact")]
    Unsupported {
        /// The feature, with the first kernel that has it.
        feature: &'static str,
    },
    /// The pins cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// bpf(2) refused.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The calling thread's namespace cannot be used.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

impl AttachError {
    /// Whether somebody else works on the same links or hook, so that the same call may succeed later.
    pub fn is_busy(&self) -> bool {
        match self {
            Self::Raced { .. } | Self::LinkBusy { .. } => true,
            Self::Pin(e) => e.raw_os_error() == Some(libc::EWOULDBLOCK),
            _ => false,
        }
    }

    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Netlink(e) => e.errno(),
            Self::Pin(e) => e.raw_os_error(),
            Self::Sys(e) => e.raw_os_error(),
            _ => None,
        }
    }
}
