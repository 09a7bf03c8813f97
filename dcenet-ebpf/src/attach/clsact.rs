//! Classifiers on the clsact queueing discipline: on every kernel, without a pin to leak, replaced in one message.
//!
//! A filter holds its program, and the device holds the filter, so what is attached lives exactly as long as the device.
//! A device that moves to another namespace loses both (net/core/dev.c, `__dev_change_net_namespace` shuts its queueing
//! disciplines down).

use std::os::fd::{AsFd, AsRawFd};

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::{Attributes, Family, Message, NetlinkError, Reply, Socket};
use dcenet_core::netns::NetNs;

use super::{AttachError, Attached, Attacher, Direction, Filter, Hook, Owner, Tag, Via, check_kind};
use crate::object::ProgramKind;
use crate::program::Program;

/// Attaches by clsact and `cls_bpf` in direct-action mode, at a priority and handle of our own.
///
/// The queueing discipline is made with the first program and removed with the last, if nobody else has a filter there.
/// A device with the older `ingress` discipline (CNI's bandwidth plugin makes one) takes programs on
/// [`Direction::Ingress`] only.
///
/// # Minimum kernel version
/// 4.5 for clsact; 4.13 to tell the program's number.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClsactAttacher;

impl Attacher for ClsactAttacher {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        check(program, tag.label)?;
        let mut socket = socket()?;
        let made_qdisc = make_qdisc(&mut socket, hook)?;
        let created = socket.request(&put_filter(hook, program, tag, NLM_F_CREATE | NLM_F_EXCL));
        match created {
            Ok(_) => Ok(None),
            Err(e) if e.errno() == Some(libc::EEXIST) => {
                let old = ours(&mut socket, hook)?.ok_or_else(|| occupied(hook))?;
                socket.request(&put_filter(hook, program, tag, 0))?;
                Ok(Some(old))
            }
            Err(e) => {
                if made_qdisc && let Err(undo) = socket.request(&delete_qdisc(hook)) {
                    tracing::warn!(device = %hook.device, error = %undo, "the clsact made for nothing stays");
                }
                Err(e.into())
            }
        }
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        check(program, tag.label)?;
        let mut socket = socket()?;
        let old = ours(&mut socket, hook)?.ok_or(AttachError::NotAttached { hook })?;
        // Without NLM_F_CREATE the kernel refuses if it has been detached since.
        match socket.request(&put_filter(hook, program, tag, 0)) {
            Ok(_) => Ok(old),
            Err(e) if e.errno() == Some(libc::ENOENT) => Err(AttachError::NotAttached { hook }),
            Err(e) => Err(e.into()),
        }
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        let mut chain = filters(&mut socket()?, hook)?;
        chain.retain(|attached| !is_table(attached));
        Ok(chain)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        let message = Message::new(libc::RTM_GETQDISC, 0, "list queueing disciplines", &[0; TCMSG_BYTES]);
        let replies = socket()?.dump(&message)?;
        let ours = replies.iter().filter(|r| {
            attributes(r).find(libc::TCA_KIND).map(text).is_some_and(|kind| kind == CLSACT || kind == INGRESS)
        });
        Ok(ours.filter_map(|r| IfIndex::new(u32::from_ne_bytes(r.payload.get(4..8)?.try_into().ok()?))).collect())
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        let mut socket = socket()?;
        let mut was_there = ours(&mut socket, hook)?.is_some();
        if was_there {
            match socket.request(&delete_filter(hook)) {
                Ok(_) => {}
                Err(e) if is_gone(&e) => was_there = false,
                Err(e) => return Err(e.into()),
            }
        }
        if qdisc(&mut socket, hook)?.as_deref() != Some(CLSACT) {
            return Ok(was_there);
        }
        let other = match hook.direction {
            Direction::Ingress => Direction::Egress,
            Direction::Egress => Direction::Ingress,
        };
        for direction in [hook.direction, other] {
            if !filters(&mut socket, Hook { direction, ..hook })?.is_empty() {
                return Ok(was_there);
            }
        }
        match socket.request(&delete_qdisc(hook)) {
            Ok(_) => Ok(was_there),
            Err(e) if is_gone(&e) => Ok(was_there),
            Err(e) => Err(e.into()),
        }
    }
}

/// Takes a filter off, if it is still exactly the one described.
pub(super) fn evict(hook: Hook, foreign: &Attached) -> Result<bool, AttachError> {
    let Via::Clsact(filter) = &foreign.via else { return Ok(false) };
    let mut socket = socket()?;
    if !filters(&mut socket, hook)?.contains(foreign) {
        return Ok(false);
    }
    let doing = format!("take a filter {:?} off device {} ({:?})", filter.kind, hook.device, hook.direction);
    let info = u32::from(foreign.priority) << 16 | u32::from(filter.protocol.to_be());
    let header = tcmsg(hook, filter.handle, parent(hook), info);
    let mut message = Message::new(libc::RTM_DELTFILTER, 0, doing, &header);
    message.text(libc::TCA_KIND, &filter.kind).u32(libc::TCA_CHAIN, filter.chain);
    match socket.request(&message) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.errno(), Some(libc::ENODEV | libc::ENOENT)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn socket() -> Result<Socket, AttachError> {
    Ok(NetNs::of_this_thread()?.socket(Family::Route)?)
}

fn check(program: &Program, label: &str) -> Result<(), AttachError> {
    check_kind(program, ProgramKind::Classifier)?;
    if label.len() > LABEL_BYTES || label.contains('\0') {
        return Err(AttachError::BadLabel { label: label.to_owned(), want: "at most 200 bytes without NUL" });
    }
    Ok(())
}

/// Whether the device, its queueing discipline or its filter is not there: EINVAL is what the kernel answers where the
/// parent of a filter, or the discipline to delete, is missing (net/sched/cls_api.c, `__tcf_qdisc_find`;
/// net/sched/sch_api.c, `tc_get_qdisc`).
fn is_gone(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

/// Makes sure of a clsact, and tells whether this call made it.
fn make_qdisc(socket: &mut Socket, hook: Hook) -> Result<bool, AttachError> {
    let mut message = qdisc_message(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, "add clsact to", hook);
    message.text(libc::TCA_KIND, CLSACT);
    match socket.request(&message) {
        Ok(_) => Ok(true),
        Err(e) if e.errno() == Some(libc::EEXIST) => match qdisc(socket, hook)?.as_deref() {
            Some(CLSACT) => Ok(false),
            Some(INGRESS) if hook.direction == Direction::Ingress => Ok(false),
            Some(kind) => Err(AttachError::Occupied { hook, occupant: format!("a queueing discipline {kind:?}") }),
            // Removed between the two requests, by somebody who will tell the same story of us.
            None => Err(e.into()),
        },
        Err(e) if e.errno() == Some(libc::ENODEV) => Err(AttachError::NoDevice(hook.device)),
        Err(e) => Err(e.into()),
    }
}

/// The kind of the discipline in the place of clsact, if there is one.
fn qdisc(socket: &mut Socket, hook: Hook) -> Result<Option<String>, AttachError> {
    // The kernel answers only to who asks for an echo (net/core/rtnetlink.c, `rtnetlink_send`).
    match socket.request(&qdisc_message(libc::RTM_GETQDISC, NLM_F_ECHO, "look up the clsact of", hook)) {
        Ok(replies) => Ok(replies.iter().find_map(|r| attributes(r).find(libc::TCA_KIND).map(text))),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn delete_qdisc(hook: Hook) -> Message {
    qdisc_message(libc::RTM_DELQDISC, 0, "remove clsact from", hook)
}

fn qdisc_message(kind: u16, flags: u16, doing: &str, hook: Hook) -> Message {
    let header = tcmsg(hook, CLSACT_HANDLE, CLSACT_PARENT, 0);
    Message::new(kind, flags, format!("{doing} device {}", hook.device), &header)
}

fn ours(socket: &mut Socket, hook: Hook) -> Result<Option<Attached>, AttachError> {
    let in_our_place =
        |a: &Attached| a.priority == PRIORITY && matches!(&a.via, Via::Clsact(filter) if filter.handle == HANDLE);
    match filters(socket, hook)?.into_iter().find(in_our_place) {
        Some(Attached { owner: Owner::Foreign(_), .. }) => Err(occupied(hook)),
        ours => Ok(ours),
    }
}

fn occupied(hook: Hook) -> AttachError {
    AttachError::Occupied { hook, occupant: format!("a foreign filter (priority {PRIORITY}, handle {HANDLE:#x})") }
}

/// Whether it is a hash table of `u32`, which decides on no packet but holds the filters that do (net/sched/cls_u32.c,
/// `TC_U32_NODE`). It may outlive them.
fn is_table(attached: &Attached) -> bool {
    matches!(&attached.via, Via::Clsact(filter) if filter.kind == U32 && filter.handle & U32_NODE == 0)
}

/// The classifiers on a hook in the order in which they run, with tables that somebody has made.
fn filters(socket: &mut Socket, hook: Hook) -> Result<Vec<Attached>, AttachError> {
    // An `ingress` discipline has one list and shows it for whatever parent it is asked (net/sched/sch_ingress.c,
    // `ingress_tcf_block`).
    if hook.direction == Direction::Egress && qdisc(socket, hook)?.as_deref() != Some(CLSACT) {
        return Ok(Vec::new());
    }
    let header = tcmsg(hook, 0, parent(hook), 0);
    let message = Message::new(libc::RTM_GETTFILTER, 0, format!("list filters of device {}", hook.device), &header);
    match socket.dump(&message) {
        Ok(replies) => Ok(replies.iter().filter_map(filter).collect()),
        Err(e) if is_gone(&e) => Ok(Vec::new()),
        Err(e) => Err(e.into()),
    }
}

/// Reads a `RTM_NEWTFILTER`; none for the entry that stands for a priority as a whole, which has no handle.
fn filter(reply: &Reply) -> Option<Attached> {
    let word = |offset: usize| -> Option<u32> {
        reply.payload.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
    };
    let handle = word(8)?;
    let info = word(16)?;
    if handle == 0 {
        return None;
    }
    let all = attributes(reply);
    let kind = all.find(libc::TCA_KIND).map(text)?;
    let options = Attributes::new(all.find(libc::TCA_OPTIONS).unwrap_or_default());
    let bpf = kind == BPF;
    let name = options.find(TCA_BPF_NAME).filter(|_| bpf).map(text);
    let owner = match name.as_deref().and_then(|n| n.strip_prefix(MARK)) {
        Some(label) => Owner::Ours(label.to_owned()),
        None => Owner::Foreign(name.or(Some(kind.clone()))),
    };
    let number = |attributes: &Attributes<'_>, attribute| -> Option<u32> {
        Some(u32::from_ne_bytes(attributes.find(attribute)?.get(..4)?.try_into().ok()?))
    };
    Some(Attached {
        owner,
        program: number(&options, TCA_BPF_ID).filter(|_| bpf),
        tag: options.find(TCA_BPF_TAG).filter(|_| bpf).and_then(|tag| tag.try_into().ok()),
        priority: (info >> 16) as u16,
        class: number(&options, TCA_BPF_CLASSID).filter(|_| bpf).unwrap_or(0) as u16,
        via: Via::Clsact(Filter {
            kind,
            protocol: u16::from_be(info as u16),
            chain: number(&all, libc::TCA_CHAIN).unwrap_or(0),
            handle,
        }),
    })
}

fn put_filter(hook: Hook, program: &Program, tag: Tag<'_>, flags: u16) -> Message {
    let doing = format!("put program {} on device {} ({:?})", program.info().id, hook.device, hook.direction);
    let mut message = Message::new(libc::RTM_NEWTFILTER, flags, doing, &filter_header(hook));
    message.text(libc::TCA_KIND, BPF);
    message.nest(libc::TCA_OPTIONS | libc::NLA_F_NESTED as u16, |options| {
        options
            .bytes(TCA_BPF_FD, &program.as_fd().as_raw_fd().to_ne_bytes())
            .text(TCA_BPF_NAME, &format!("{MARK}{}", tag.label))
            .u32(TCA_BPF_CLASSID, tag.class.into())
            .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
            // A program in a network card would not see our maps.
            .u32(TCA_BPF_FLAGS_GEN, TCA_CLS_FLAGS_SKIP_HW);
    });
    message
}

fn delete_filter(hook: Hook) -> Message {
    let doing = format!("take our program off device {} ({:?})", hook.device, hook.direction);
    let mut message = Message::new(libc::RTM_DELTFILTER, 0, doing, &filter_header(hook));
    message.text(libc::TCA_KIND, BPF);
    message
}

fn filter_header(hook: Hook) -> [u8; TCMSG_BYTES] {
    let every_protocol = u32::from((libc::ETH_P_ALL as u16).to_be());
    tcmsg(hook, HANDLE, parent(hook), u32::from(PRIORITY) << 16 | every_protocol)
}

fn parent(hook: Hook) -> u32 {
    match hook.direction {
        Direction::Ingress => CLSACT_HANDLE | 0xfff2,
        Direction::Egress => CLSACT_HANDLE | 0xfff3,
    }
}

/// `struct tcmsg` (include/uapi/linux/rtnetlink.h).
fn tcmsg(hook: Hook, handle: u32, parent: u32, info: u32) -> [u8; TCMSG_BYTES] {
    let mut bytes = [0; TCMSG_BYTES];
    bytes[4..8].copy_from_slice(&hook.device.get().to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}

fn attributes(reply: &Reply) -> Attributes<'_> {
    Attributes::new(reply.payload.get(TCMSG_BYTES..).unwrap_or_default())
}

fn text(content: &[u8]) -> String {
    let end = content.iter().position(|&b| b == 0).unwrap_or(content.len());
    String::from_utf8_lossy(&content[..end]).into_owned()
}

/// In front of every label, so that ours are told from others'.
const MARK: &str = "dcenet:";
/// The kernel keeps 255 bytes of a name (`CLS_BPF_NAME_LEN`).
const LABEL_BYTES: usize = 200;
/// Ours run after what asks for an early place (Cilium uses 1, Calico 1 and up) and before what lets the kernel choose:
/// it counts down from 49152 (net/sched/cls_api.c, `tcf_auto_prio`).
const PRIORITY: u16 = 3534;
const HANDLE: u32 = 0xdce;
const CLSACT: &str = "clsact";
const INGRESS: &str = "ingress";
const BPF: &str = "bpf";
const U32: &str = "u32";
/// The part of a `u32` handle that numbers a filter in its bucket (include/uapi/linux/pkt_cls.h).
const U32_NODE: u32 = 0xfff;
/// `TC_H_CLSACT` as a discipline's handle and parent.
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
const TCMSG_BYTES: usize = 20;
const NLM_F_CREATE: u16 = libc::NLM_F_CREATE as u16;
const NLM_F_ECHO: u16 = libc::NLM_F_ECHO as u16;
const NLM_F_EXCL: u16 = libc::NLM_F_EXCL as u16;
/// `TCA_BPF_*` (include/uapi/linux/pkt_cls.h).
const TCA_BPF_CLASSID: u16 = 3;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAGS_GEN: u16 = 9;
const TCA_BPF_TAG: u16 = 10;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_CLS_FLAGS_SKIP_HW: u32 = 1;
