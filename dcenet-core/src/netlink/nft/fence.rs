//! The table that decides who may send into the fabric's VXLAN device.
//!
//! ```text
//!  table inet dcenet-fabric
//!    input      filter   UDP to the VXLAN port: jump fence
//!    forward    filter   UDP to the VXLAN port of an address in @vteps4 @vteps6: jump fence
//!    fence               source in @vteps4 @vteps6, and it came by a link in @links or by the one that leads there: as it is
//!                        of another VXLAN network: as it is
//!                        count, drop
//! ```
//!
//! Both hooks come after destination NAT, and `forward` before masquerading (`enum nf_ip_hook_priorities`): what counts is
//! where a datagram arrives and who sent it, whatever is translated for it. A fragment that ends before the VXLAN header is
//! of no other network, and is dropped; whole ones are put together before `input` (IPv4) or fail without their first part.
//!
//! `fib` has told the link of the way back in these hooks since Linux 4.10 (`nft_fib_validate` of
//! `net/netfilter/nft_fib.c`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::attributes::*;
use super::rules::{Base, Expression, address, family, port, protocol};
use super::{be32, comment, data, flush_chain, message, new_chain, new_rule, new_table};
use crate::model::IfIndex;
use crate::nat::Transport;
use crate::netlink::message::{Attributes, Message, text};
use crate::netlink::octets;

/// The name of the table.
pub(crate) const TABLE: &str = "dcenet-fabric";

/// The entries of the sets, by the set's name.
pub(crate) type Entries = BTreeMap<&'static str, BTreeSet<Vec<u8>>>;

/// The entries that let these senders in, and what comes by these links from any of them.
pub(crate) fn entries(vteps: &BTreeSet<IpAddr>, links: &BTreeSet<IfIndex>) -> Entries {
    let of = |ipv4: bool| vteps.iter().filter(move |a| a.is_ipv4() == ipv4).map(|a| octets(*a)).collect();
    let links = links.iter().map(|link| link.get().to_ne_bytes().to_vec()).collect();
    Entries::from([(VTEPS4, of(true)), (VTEPS6, of(false)), (LINKS, links)])
}

/// The rules for a VXLAN network, each as its chain and the comment by which it is known again.
pub(crate) fn rules_of(port: u16, vni: u32) -> Vec<(String, String)> {
    let comment = rule_comment(port, vni);
    expressions(port, vni).into_iter().map(|(chain, _)| (chain.to_owned(), comment.clone())).collect()
}

/// Makes the table, its chains and its sets; what is there stays.
pub(crate) fn layout() -> Vec<Message> {
    let mut messages = vec![new_table(TABLE)];
    messages.extend(CHAINS.iter().map(|(name, base)| new_chain(TABLE, name, base.as_ref())));
    for (id, (name, datatype, len)) in SETS.into_iter().enumerate() {
        let mut set = message(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, format!("create set {name}"));
        set.text(NFTA_SET_TABLE, TABLE).text(NFTA_SET_NAME, name);
        for (attribute, value) in
            [(NFTA_SET_FLAGS, 0), (NFTA_SET_KEY_TYPE, datatype), (NFTA_SET_KEY_LEN, len), (NFTA_SET_ID, id as u32 + 1)]
        {
            be32(&mut set, attribute, value);
        }
        messages.push(set);
    }
    messages
}

/// Writes the rules for a VXLAN network in place of all that are there.
pub(crate) fn rules(port: u16, vni: u32) -> impl Iterator<Item = Message> {
    let comment = rule_comment(port, vni);
    let flush = CHAINS.iter().map(|(name, _)| flush_chain(TABLE, name));
    let add = expressions(port, vni);
    flush.chain(add.into_iter().map(move |(chain, rule)| new_rule(TABLE, chain, &rule, Some(&comment))))
}

/// Enters entries into a set, or deletes them.
pub(crate) fn change_entries(set: &str, keys: &[&Vec<u8>], enter: bool) -> impl Iterator<Item = Message> {
    let (kind, flags, what) = match enter {
        true => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, "add elements to"),
        false => (libc::NFT_MSG_DELSETELEM, 0, "delete elements of"),
    };
    // An attribute has less than 64 KiB.
    keys.chunks(1000).map(move |keys| {
        let mut message = message(kind, flags, format!("{what} {set} of {TABLE}"));
        message.text(NFTA_SET_ELEM_LIST_TABLE, TABLE).text(NFTA_SET_ELEM_LIST_SET, set);
        message.nest(NFTA_SET_ELEM_LIST_ELEMENTS | NESTED, |list| {
            for key in keys {
                list.nest(NFTA_LIST_ELEM | NESTED, |nest| data(nest, NFTA_SET_ELEM_KEY, key));
            }
        });
        message
    })
}

/// Lists the rules; nothing where there is no table.
pub(crate) fn rule_dump() -> Message {
    let mut dump = message(libc::NFT_MSG_GETRULE, 0, format!("list rules of table {TABLE}"));
    dump.text(NFTA_RULE_TABLE, TABLE);
    dump
}

/// The chain and the comment of a rule of the table.
pub(crate) fn parse_rule(payload: &[u8]) -> Option<(String, String)> {
    let attributes = Attributes::new(payload.get(HEADER..)?);
    if attributes.find(NFTA_RULE_TABLE).map(text)? != TABLE {
        return None;
    }
    let comment = attributes.find(NFTA_RULE_USERDATA).and_then(comment);
    Some((attributes.find(NFTA_RULE_CHAIN).map(text)?, comment.unwrap_or_default()))
}

/// Asks whether the table is there.
pub(crate) fn get_table() -> Message {
    let mut message = message(libc::NFT_MSG_GETTABLE, 0, format!("look up table {TABLE}"));
    message.text(NFTA_TABLE_NAME, TABLE);
    message
}

/// Deletes the table with all that is in it.
pub(crate) fn delete_table() -> Message {
    let mut message = message(libc::NFT_MSG_DELTABLE, 0, format!("delete table {TABLE}"));
    message.text(NFTA_TABLE_NAME, TABLE);
    message
}

/// Counts up with every change of [`expressions`], so that those of another version are written anew.
const VERSION: u32 = 1;

fn rule_comment(port: u16, vni: u32) -> String {
    format!("dcenet:fabric/{VERSION} port {port} vni {vni}")
}

fn expressions(port_number: u16, vni: u32) -> Vec<(&'static str, Vec<Expression>)> {
    use Expression::*;
    let is_vxlan = || {
        [
            protocol(0),
            Compare { equal: true, at: 0, value: vec![Transport::Udp.number()] },
            port(0),
            Compare { equal: true, at: 0, value: port_number.to_be_bytes().to_vec() },
        ]
    };
    let verdict = |code| Verdict { code, chain: None };
    let jump = || Verdict { code: libc::NFT_JUMP, chain: Some(FENCE) };
    let mut rules = vec![(INPUT, Vec::from_iter(is_vxlan().into_iter().chain([jump()])))];
    for (ipv4, vteps) in [(true, VTEPS4), (false, VTEPS6)] {
        let known = |source| {
            let lookup = Lookup { set: vteps.to_owned(), from: 0, to: None };
            family(ipv4).into_iter().chain([address(ipv4, source, 0), lookup])
        };
        rules.push((FORWARD, is_vxlan().into_iter().chain(known(false)).chain([jump()]).collect()));
        let by_link = [
            Meta { key: libc::NFT_META_IIF, to: 0 },
            Lookup { set: LINKS.to_owned(), from: 0, to: None },
            verdict(libc::NFT_RETURN),
        ];
        rules.push((FENCE, known(true).chain(by_link).collect()));
        let by_way_back =
            [ReverseLink { to: 0 }, Compare { equal: false, at: 0, value: vec![0; 4] }, verdict(libc::NFT_RETURN)];
        rules.push((FENCE, known(true).chain(by_way_back).collect()));
    }
    // The VNI is the fifth to seventh byte after the UDP header of eight (RFC 7348, section 5).
    let of_another = [
        Payload { base: libc::NFT_PAYLOAD_TRANSPORT_HEADER, offset: 12, len: 3, to: 0 },
        Compare { equal: false, at: 0, value: vni.to_be_bytes()[1..].to_vec() },
        verdict(libc::NFT_RETURN),
    ];
    rules.push((FENCE, Vec::from(of_another)));
    rules.push((FENCE, vec![Counter, verdict(libc::NF_DROP)]));
    rules
}

const INPUT: &str = "input";
const FORWARD: &str = "forward";
const FENCE: &str = "fence";
/// `NF_INET_LOCAL_IN` and `NF_INET_FORWARD`; the first chain jumped to must be there before rules are.
static CHAINS: [(&str, Option<Base>); 3] = [
    (FENCE, None),
    (INPUT, Some(Base { kind: "filter", hook: 1, priority: 0 })),
    (FORWARD, Some(Base { kind: "filter", hook: 2, priority: 0 })),
];

const VTEPS4: &str = "vteps4";
const VTEPS6: &str = "vteps6";
const LINKS: &str = "links";
/// Names, the numbers of their types in nft(8) (`enum datatypes` of its `include/datatype.h`), and the lengths of keys.
const SETS: [(&str, u32, u32); 3] = [(VTEPS4, 7, 4), (VTEPS6, 8, 16), (LINKS, 20, 4)];
