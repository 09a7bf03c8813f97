//! The guard on the parent of macvlans: judges what pods send once more, out of their reach.
//!
//! Programs on a device in a pod see what goes through its queues. A raw frame of a pod may go past them, and one of a device
//! that the pod has made for itself on the same parent meets none. Both come to the parent's hooks in the host's namespace:
//! to *egress* where they go to the wire, and to *ingress* where they go from one macvlan to another in the mode `bridge`, for
//! the kernel hands unicast frames between them to the parent as if they had come in (drivers/net/macvlan.c,
//! `macvlan_queue_xmit`). [`program`] is for both.
//!
//! ```text
//! frame -> who sent it: the Ethernet source and the parent ([`SENDERS`]),
//!             |         and the namespace of its socket, where there is one ([`NAMESPACES`])
//!             |
//!             +-- a pod, by both or by its source alone --> tail call: what judges the pod ([`JUDGES`], by slot)
//!             +-- a pod's socket, another source        --> drop (spoofed): its own stacked device, another's address
//!             +-- nobody known                          --> next
//! ```
//!
//! What is called judges as the pod's own program does ([`Slot::Guarded`]), neither counts nor remembers
//! what passes, for that was done at the pod's device, and counts and tells of what it drops.
//!
//! No mark of a packet is believed: the pod can set each of them. The slot goes to the judge in `tc_classid`, which the guard writes
//! and the judge clears.
//!
//! # What it does not see
//! * Copies of frames to a group that the kernel makes for other macvlans of the parent in the mode `bridge`
//!   (`macvlan_broadcast`): they go straight to these, also where the packet in the frame is for one address. The modes `vepa` and
//!   `private` make none.
//! * The namespace of a frame without a socket, such as one that was forwarded, or that the kernel made by itself (ARP): its
//!   Ethernet source is believed then. A process with CAP_NET_ADMIN can make such frames with any source, so that it can answer ARP
//!   by another device on the parent.
//! * ipvlan, and macvlan in the mode `passthru`, whose frames bear the parent's own address.
//!
//! # Minimum kernel version
//! 6.13 (`bpf_get_netns_cookie` in classifiers); tcx is from 6.6.

use super::emitter::{Emitter, SKB_IFINDEX, SKB_TC_CLASSID, TC_ACT_UNSPEC};
use super::{DatapathError, Judgement, Slot, frame};
use crate::abi::{self, Direction, Flow, Guarded, Namespace, Reason, Sender, Sizes};
use crate::insn::{Cond, Helper, Reg::*, Size};
use crate::object::{MapSpec, Object};
use crate::sys::{self, SysError};

/// Name of the program on both hooks of the parent.
pub const GUARD: &str = "guard";

/// Name of the program that judges what a guarded pod sends.
pub const FROM_GUARDED: &str = "from_guarded";

/// Nobody's: what a guarded pod receives is judged at its own device.
pub(super) const TO_GUARDED: &str = "to_guarded";

/// The map from [`Sender`] to [`Guarded`].
pub const SENDERS: &str = "guard_senders";

/// The map of the [`Namespace`]s of guarded pods; its values say nothing.
pub const NAMESPACES: &str = "guard_netns";

/// The array of programs of [`FROM_GUARDED`], by slot.
pub const JUDGES: &str = "guard_judges";

/// The maps that [`program`] has to itself: [`SENDERS`], [`NAMESPACES`] and [`JUDGES`]. The last must be kept open or pinned as long
/// as it is to be used ([`ProgramArray`](crate::maps::ProgramArray)).
pub fn maps(sizes: &Sizes) -> [MapSpec; 3] {
    [
        MapSpec::hash(SENDERS, Sender::BYTES as u32, Guarded::BYTES as u32, sizes.endpoints),
        MapSpec::hash(NAMESPACES, Namespace::BYTES as u32, 8, sizes.endpoints),
        MapSpec::prog_array(JUDGES, sizes.endpoints),
    ]
}

/// The number of the calling thread's network namespace, which no other has until the machine starts again.
///
/// # Minimum kernel version
/// 5.14 (`SO_NETNS_COOKIE`).
pub fn netns_cookie() -> Result<u64, SysError> {
    sys::netns_cookie()
}

/// Writes the program for a parent's hooks, with its [`maps`] and the map of reasons.
///
/// # Errors
/// See [`DatapathError`].
pub fn program(sizes: &Sizes) -> Result<Object, DatapathError> {
    let mut object = Object::new();
    for map in sizes.shared_maps().into_iter().filter(|map| map.name == abi::REASONS).chain(maps(sizes)) {
        object.add_map(map)?;
    }
    let mut emitter = Emitter::new(GUARD, Direction::Egress, Slot::Guarded, Judgement::Unknown);
    emitter.find_sender();
    emitter.ends();
    object.add(emitter.asm.finish()?)?;
    Ok(object)
}

impl Emitter<'_> {
    /// `R7` is whether the frame's socket is a guarded pod's.
    fn find_sender(&mut self) {
        let [no_socket, known, believed, nobody] = self.labels();
        let (malformed, spoofed) = (self.drop(Reason::Malformed), self.drop(Reason::Spoofed));
        let unknown = self.drop(Reason::PolicyUnknown);
        self.asm.mark("the namespace of the socket");
        self.asm
            .mov(R6, R1)
            .mov(R7, 0)
            .load(Size::W, R8, R6, SKB_IFINDEX)
            .store(Size::Dw, R10, SENDER, 0)
            .store(Size::Dw, R10, SENDER + 8, 0)
            .store(Size::W, R10, SENDER + Sender::PARENT, R8)
            .store(Size::Dw, R10, NAMESPACE, 0)
            .store(Size::Dw, R10, NAMESPACE + 8, 0)
            .store(Size::W, R10, NAMESPACE + Namespace::BELOW, R8)
            .load(Size::Dw, R1, R6, SKB_SK)
            .jump_if(Cond::Eq, R1, 0, no_socket)
            .mov(R1, R6)
            .call(Helper::GetNetnsCookie)
            .store(Size::Dw, R10, NAMESPACE + Namespace::COOKIE, R0);
        self.lookup(NAMESPACES, NAMESPACE);
        self.asm.jump_if(Cond::Eq, R0, 0, no_socket).mov(R7, 1).bind(no_socket);

        self.asm.mark("the sender");
        self.asm.mov(R2, ETHERNET_SOURCE);
        self.copy(R2, SENDER + Sender::ADDRESS, 6, malformed);
        self.lookup(SENDERS, SENDER);
        self.asm
            .jump_if(Cond::Ne, R0, 0, known)
            .jump_if(Cond::Ne, R7, 0, spoofed)
            .ret(TC_ACT_UNSPEC)
            .bind(known)
            .jump_if(Cond::Eq, R7, 0, believed)
            .load(Size::Dw, R1, R10, NAMESPACE + Namespace::COOKIE)
            .load(Size::Dw, R2, R0, Guarded::NETNS)
            .jump_if(Cond::Ne, R1, R2, spoofed)
            .bind(believed)
            .load(Size::W, R3, R0, Guarded::SLOT)
            .jump_if(Cond::Eq, R3, 0, nobody)
            .store(Size::W, R6, SKB_TC_CLASSID, R3)
            .mov(R1, R6)
            .load_map(R2, JUDGES)
            .call(Helper::TailCall)
            .bind(nobody)
            .jump(unknown);
    }

    /// As [`Emitter::flow`], of a packet that the pod's own program may have let pass: nothing is written down but what a fragmented
    /// packet's head tells.
    pub(super) fn flow_again_judged(&mut self) {
        let [found, fresh, miss, stale, not_related, judged] = self.labels();
        let related = self.pass(Reason::Related);
        self.asm.bind(self.places.common);
        self.clear_rest();
        self.asm.bind(self.places.lookup);
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm.jump_if(Cond::Ne, R0, 0, found);
        self.lookup(abi::CONNTRACK_NEW, frame::KEY);
        self.asm.jump_if(Cond::Ne, R0, 0, fresh);
        // Another CPU may have moved it between the two looks.
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm.jump_if(Cond::Ne, R0, 0, found).jump(miss).bind(fresh).mov(R7, R0);
        self.set_flags(frame::BEGUN);
        self.asm
            .mov(R0, R7)
            .bind(found)
            .mov(R7, R0)
            .call(Helper::KtimeGetCoarseNs)
            .mov(R8, R0)
            .load(Size::Dw, R1, R7, Flow::LAST_SEEN)
            .sub(R0, R1)
            .load(Size::Dw, R1, R7, Flow::TIMEOUT)
            .jump_if(Cond::Sgt, R0, R1, miss)
            .load(Size::B, R1, R7, Flow::DIRECTION);
        self.opens_anew(miss);
        self.generation(R1, R3);
        self.asm.load(Size::W, R2, R7, Flow::GENERATION).jump_if(Cond::Ne, R2, R3, stale);
        self.if_flags(frame::RELATED, related);
        self.pass_again();

        self.asm.bind(stale).store(Size::W, R10, frame::JUDGE, R1).store(Size::Dw, R10, frame::NOW, R8);
        self.set_flags(frame::STALE);
        self.asm.jump(judged).bind(miss).load(Size::W, R1, R10, frame::FLAGS).and(R1, frame::RELATED).jump_if(
            Cond::Eq,
            R1,
            0,
            not_related,
        );
        self.unrelated();
        self.asm
            .bind(not_related)
            .bind(self.places.judge_packet)
            .store(Size::W, R10, frame::JUDGE, self.direction as i32)
            .bind(judged);
        self.judge(Self::pass_again);
    }

    fn pass_again(&mut self) {
        self.note_head();
        self.asm.ret(TC_ACT_UNSPEC);
    }
}

/// Offset of the source in an Ethernet frame.
const ETHERNET_SOURCE: i32 = 6;

/// `sk` in struct __sk_buff (include/uapi/linux/bpf.h).
const SKB_SK: i16 = 168;

/// Where the keys lie on the stack.
const SENDER: i16 = -16;
const NAMESPACE: i16 = -32;
const _: () = assert!(frame::NOW < NAMESPACE, "ends of the program write below");
