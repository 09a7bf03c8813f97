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

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::NetlinkError;
use dcenet_core::netns::NetNsError;

use crate::program::Program;

mod clsact;

pub use self::clsact::ClsactAttacher;

/// What a classifier on clsact or tcx returns (include/uapi/linux/pkt_cls.h, `TC_ACT_*`).
pub mod verdict {
    /// Go on: the next program decides, and after the last the packet passes. `TCX_NEXT` is the same number.
    pub const UNSPEC: i32 = -1;
    /// Pass, and skip what comes after. Ours never return it.
    pub const OK: i32 = 0;
    /// Drop.
    pub const SHOT: i32 = 2;
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
    /// The program's number; none for a classifier that is no eBPF program.
    pub program: Option<u32>,
    /// The hash of the program's instructions.
    pub tag: Option<[u8; 8]>,
    /// Where it stands in the chain: lower ones run first.
    pub priority: u16,
    /// The low 16 bits of its class id, which the program reads as `tc_classid`; 0 where it was given none.
    pub class: u16,
}

/// What an attachment carries beside its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Found again by [`Attacher::attached`]; at most 200 bytes without NUL.
    pub label: &'a str,
    /// What the program reads as `tc_classid` of `struct __sk_buff`: one program can serve many devices and tell them
    /// apart at no cost.
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

    /// Everything on the hook, in the order in which it runs. Empty where the device is gone.
    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError>;

    /// Takes ours off the hook and leaves what others put there; `false` where there was none, or no device.
    ///
    /// One process at a time may detach from a device while others attach to it: the kernel offers no way to remove an
    /// empty hook only if it is still empty.
    fn detach(&self, hook: Hook) -> Result<bool, AttachError>;

    /// Ours on the hook, with its label. How a process that was restarted learns what stands.
    fn attached(&self, hook: Hook) -> Result<Option<Attached>, AttachError> {
        Ok(self.chain(hook)?.into_iter().find(|a| matches!(a.owner, Owner::Ours(_))))
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
    #[error("device {} ({:?}): {occupant} is in our place; remove it", hook.device, hook.direction)]
    Occupied {
        /// The hook.
        hook: Hook,
        /// What is there.
        occupant: String,
    },
    /// The program is of a type that this hook does not take.
    #[error("program {program} is of type {kind}, and the hook takes classifiers (type 3)")]
    WrongProgram {
        /// The program's name.
        program: String,
        /// Its type, a value of `enum bpf_prog_type`.
        kind: u32,
    },
    /// The label cannot be stored.
    #[error("label {label:?}: want at most 200 bytes without NUL")]
    BadLabel {
        /// The label.
        label: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The calling thread's namespace cannot be used.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

impl AttachError {
    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Netlink(e) => e.errno(),
            _ => None,
        }
    }
}
