//! Queueing disciplines and filters that limit a link: `struct tcmsg` of `include/uapi/linux/rtnetlink.h`.

use super::message::{Attributes, Message, field, text};
use crate::bandwidth::Rate;
use crate::model::{IfIndex, IfName};

/// Gives a link a token bucket of ours. Fails where it has a discipline that somebody chose (`EEXIST`).
pub(crate) fn shape(link: &IfName, index: IfIndex, rate: Rate) -> Message {
    let what = format!("limit {link} to {rate}");
    let mut message = Message::new(libc::RTM_NEWQDISC, CREATE, what, &header(index, HANDLE, TC_H_ROOT, 0));
    message.text(libc::TCA_KIND, TBF);
    message.nest(libc::TCA_OPTIONS | libc::NLA_F_NESTED as u16, |options| {
        let bytes = rate.bytes_per_second();
        let mut parameters = [0; 36];
        // `struct tc_tbf_qopt`: the rate, the peak rate, and three numbers. Without the link layer the kernel wants a table
        // of times for rates (net/sched/sch_tbf.c, `tbf_change`).
        parameters[1] = TC_LINKLAYER_ETHERNET;
        parameters[8..12].copy_from_slice(&u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
        parameters[24..28].copy_from_slice(&rate.queue_bytes().to_ne_bytes());
        options.bytes(TCA_TBF_PARMS, &parameters);
        if bytes > u64::from(u32::MAX) {
            options.bytes(TCA_TBF_RATE64, &bytes.to_ne_bytes());
        }
        options.u32(TCA_TBF_BURST, rate.burst_bytes());
    });
    message
}

/// Gives a link the place where filters see what comes in (since Linux 4.5). `EEXIST` where it has one.
pub(crate) fn add_clsact(link: &IfName, index: IfIndex) -> Message {
    let header = header(index, CLSACT_HANDLE, TC_H_CLSACT, 0);
    let mut message = Message::new(libc::RTM_NEWQDISC, CREATE, format!("add clsact to {link}"), &header);
    message.text(libc::TCA_KIND, "clsact");
    message
}

/// Has what comes in by a link go through another first, behind every other filter.
pub(crate) fn divert(link: &IfName, index: IfIndex, through: &IfName, to: IfIndex) -> Message {
    let what = format!("divert what comes in by {link} through {through}");
    let mut message = Message::new(libc::RTM_NEWTFILTER, CREATE, what, &header(index, NODE, INGRESS, place()));
    message.text(libc::TCA_KIND, "u32");
    message.nest(libc::TCA_OPTIONS | libc::NLA_F_NESTED as u16, |options| {
        // `struct tc_u32_sel` with one key that every packet has: no bit of it is looked at.
        let mut selector = [0; 32];
        selector[0] = TC_U32_TERMINAL;
        selector[2] = 1;
        options.bytes(TCA_U32_SEL, &selector);
        options.nest(TCA_U32_ACT | libc::NLA_F_NESTED as u16, |actions| {
            actions.nest(1 | libc::NLA_F_NESTED as u16, |action| {
                action.text(TCA_ACT_KIND, "mirred");
                action.nest(TCA_ACT_OPTIONS | libc::NLA_F_NESTED as u16, |options| {
                    // `struct tc_mirred`: the common part of actions, what is done, and with which link.
                    let mut parameters = [0; 28];
                    parameters[8..12].copy_from_slice(&TC_ACT_STOLEN.to_ne_bytes());
                    parameters[20..24].copy_from_slice(&TCA_EGRESS_REDIR.to_ne_bytes());
                    parameters[24..28].copy_from_slice(&to.get().to_ne_bytes());
                    options.bytes(TCA_MIRRED_PARMS, &parameters);
                });
            });
        });
    });
    message
}

/// Asks for the disciplines of every link: the kernel has no narrower question.
pub(crate) fn shape_dump() -> Message {
    let any = [0; HEADER];
    Message::new(libc::RTM_GETQDISC, 0, "list queueing disciplines", &any)
}

/// Asks for the filters of what comes in by a link.
pub(crate) fn divert_dump(link: &IfName, index: IfIndex) -> Message {
    Message::new(libc::RTM_GETTFILTER, 0, format!("list filters of {link}"), &header(index, 0, INGRESS, 0))
}

/// The rate of a link's token bucket of ours in a reply to [`shape_dump`], in bytes per second.
pub(crate) fn shaped_rate(payload: &[u8], index: IfIndex) -> Option<u64> {
    let word = |at| field(payload, at).map(u32::from_ne_bytes);
    if (word(4)?, word(8)?, word(12)?) != (index.get(), HANDLE, TC_H_ROOT) {
        return None;
    }
    let attributes = Attributes::new(payload.get(HEADER..)?);
    if attributes.find(libc::TCA_KIND).map(text)? != TBF {
        return None;
    }
    let options = Attributes::new(attributes.find(libc::TCA_OPTIONS)?);
    let parameters = options.find(TCA_TBF_PARMS)?;
    let narrow = field(parameters, 8).map(u32::from_ne_bytes)?;
    let wide = options.find(TCA_TBF_RATE64).and_then(|bytes| field(bytes, 0)).map(u64::from_ne_bytes);
    Some(wide.unwrap_or(narrow.into()))
}

/// Whether a reply to [`divert_dump`] is our filter, which leads to that link.
pub(crate) fn diverts_to(payload: &[u8], to: IfIndex) -> bool {
    let found = || {
        let word = |at| field(payload, at).map(u32::from_ne_bytes);
        if word(16)? != place() || word(8)? & NODE_MASK != NODE {
            return None;
        }
        let options = Attributes::new(Attributes::new(payload.get(HEADER..)?).find(libc::TCA_OPTIONS)?);
        let action = Attributes::new(Attributes::new(options.find(TCA_U32_ACT)?).find(1)?);
        let parameters = Attributes::new(action.find(TCA_ACT_OPTIONS)?).find(TCA_MIRRED_PARMS)?;
        field(parameters, 24).map(u32::from_ne_bytes)
    };
    found() == Some(to.get())
}

fn header(index: IfIndex, handle: u32, parent: u32, info: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[4..8].copy_from_slice(&index.get().to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}

/// Priority and protocol of the filter.
fn place() -> u32 {
    u32::from(PRIORITY) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

/// `sizeof(struct tcmsg)`.
const HEADER: usize = 20;
const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
const TBF: &str = "tbf";
/// The number of our buckets.
const HANDLE: u32 = 0x0dce_0000;
/// Behind policy's and whatever lets the kernel choose, which counts down from 49152 (net/sched/cls_api.c, `tcf_auto_prio`).
const PRIORITY: u16 = 65_000;
/// The number of our filter in its table, and the part of a filter's number that says so (`TC_U32_NODE`).
const NODE: u32 = 0xdce;
const NODE_MASK: u32 = 0xfff;
/// `include/uapi/linux/pkt_sched.h`.
const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
const INGRESS: u32 = 0xffff_fff2;
const TC_LINKLAYER_ETHERNET: u8 = 1;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `include/uapi/linux/pkt_cls.h` and `include/uapi/linux/tc_act/tc_mirred.h`.
const TC_U32_TERMINAL: u8 = 1;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
