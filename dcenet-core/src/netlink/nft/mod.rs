//! nftables: messages of `include/uapi/linux/netfilter/nf_tables.h`, and the table of what is translated for pods. That of
//! the fabric is in [`fence`].
//!
//! ```text
//!  table inet dcenet
//!    guard        raw prerouting  drops 127.0.0.0/8 from the wire: `route_localnet` would let it in
//!    prerouting   dstnat          to an address of this host: jump ports
//!    output       dstnat          the same, of the host's own processes; ::1 is itself
//!    ports                        dnat by @at4 @at6 (address . protocol . port), else by @ports4 @ports6
//!    postrouting  srcnat          translated by ports, and caller and pod in @hairpin4 @hairpin6: masquerade
//!                                 source and destination in @home4 @home6, or destination in @pods4 @pods6: as it is
//!                                 source in @masquerade4 @masquerade6, destination no multicast: masquerade
//! ```
//!
//! The rules never change: an attachment is entries of the sets, each with its owner's mark as its comment. NAT in tables
//! of the family `inet` came with Linux 5.2, intervals in concatenated keys with 5.6.

mod attributes;
pub(crate) mod fence;
mod rules;
mod transaction;

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::{Attributes, Message};
use super::octets;
use crate::nat::{Element, Transport};

pub(crate) use attributes::NFNL_MSG_BATCH_BEGIN;
use attributes::*;
use rules::{Base, CHAINS, Expression, rules};
pub(crate) use transaction::{change, lacks_subsystem, list};

/// The name of the table.
pub(crate) const TABLE: &str = "dcenet";

/// The header of every message: `struct nfgenmsg`, family `inet`, and for a batch the subsystem.
fn header(family: i32, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family as u8, 0, high, low]
}

fn message(kind: i32, flags: i32, what: impl Into<String>) -> Message {
    Message::new((SUBSYSTEM << 8) | kind as u16, flags as u16, what, &header(libc::NFPROTO_INET, 0))
}

fn be32(message: &mut Message, attribute: u16, value: u32) {
    message.bytes(attribute, &value.to_be_bytes());
}

/// Asks for the generation of all tables, which every change by anybody counts up.
pub(crate) fn get_generation() -> Message {
    message(libc::NFT_MSG_GETGEN, 0, "read the generation of nftables")
}

/// Reads the answer to [`get_generation`].
pub(crate) fn generation(payload: &[u8]) -> Option<u32> {
    let value = Attributes::new(payload.get(HEADER..)?).find(NFTA_GEN_ID)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// Begins a transaction that takes place only if nothing has changed since `generation` (`NFNL_BATCH_GENID`, Linux
/// 4.12): else it is refused with ERESTART.
pub(crate) fn begin(generation: u32, what: &str) -> Message {
    let mut begin = Message::new(NFNL_MSG_BATCH_BEGIN, 0, what, &header(libc::AF_UNSPEC, SUBSYSTEM));
    be32(&mut begin, NFNL_BATCH_GENID, generation);
    begin
}

/// Ends a transaction.
pub(crate) fn end() -> Message {
    Message::new(NFNL_MSG_BATCH_END, 0, "commit", &header(libc::AF_UNSPEC, SUBSYSTEM))
}

/// Lists the rules of our table; nothing where there is no table.
pub(crate) fn rule_dump() -> Message {
    let mut dump = message(libc::NFT_MSG_GETRULE, 0, format!("list rules of table {TABLE}"));
    dump.text(NFTA_RULE_TABLE, TABLE);
    dump
}

/// The chain of a rule of our table.
pub(crate) fn rule_chain(payload: &[u8]) -> Option<String> {
    let attributes = Attributes::new(payload.get(HEADER..)?);
    if attributes.find(NFTA_RULE_TABLE).map(super::message::text)? != TABLE {
        return None;
    }
    attributes.find(NFTA_RULE_CHAIN).map(super::message::text)
}

/// The chains of our rules, one entry for each rule: what [`rule_dump`] finds in a table that is whole.
pub(crate) fn chains_of_rules() -> Vec<&'static str> {
    rules().into_iter().map(|(chain, _)| chain).collect()
}

/// Deletes the table with all that is in it.
pub(crate) fn delete_table() -> Message {
    let mut message = message(libc::NFT_MSG_DELTABLE, 0, format!("delete table {TABLE}"));
    message.text(NFTA_TABLE_NAME, TABLE);
    message
}

/// Makes the table, or makes it whole: what is there already stays, rules are written anew.
pub(crate) fn layout() -> Vec<Message> {
    let mut messages = vec![new_table(TABLE)];
    for (name, base) in &CHAINS {
        messages.extend([new_chain(TABLE, name, base.as_ref()), flush_chain(TABLE, name)]);
    }
    for (id, set) in SETS.iter().flat_map(|set| [(set, true), (set, false)]).enumerate() {
        messages.push(new_set(set.0, set.1, id as u32 + 1));
    }
    messages.extend(rules().into_iter().map(|(chain, expressions)| new_rule(TABLE, chain, &expressions, None)));
    messages
}

fn new_table(table: &str) -> Message {
    let mut message = message(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, format!("create table {table}"));
    message.text(NFTA_TABLE_NAME, table);
    message
}

fn new_chain(table: &str, name: &str, base: Option<&Base>) -> Message {
    let mut chain = message(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE, format!("create chain {name}"));
    chain.text(NFTA_CHAIN_TABLE, table).text(NFTA_CHAIN_NAME, name);
    if let Some(Base { kind, hook, priority }) = base {
        chain.nest(NFTA_CHAIN_HOOK | NESTED, |nest| {
            be32(nest, NFTA_HOOK_HOOKNUM, *hook);
            be32(nest, NFTA_HOOK_PRIORITY, *priority as u32);
        });
        chain.text(NFTA_CHAIN_TYPE, kind);
    }
    chain
}

fn flush_chain(table: &str, name: &str) -> Message {
    let mut flush = message(libc::NFT_MSG_DELRULE, 0, format!("flush chain {name}"));
    flush.text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, name);
    flush
}

/// Appends a rule, with a comment for people.
fn new_rule(table: &str, chain: &str, expressions: &[Expression], comment: Option<&str>) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
    let mut rule = message(libc::NFT_MSG_NEWRULE, flags, format!("add rule to {chain}"));
    rule.text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, chain);
    rule.nest(NFTA_RULE_EXPRESSIONS | NESTED, |list| {
        for expression in expressions {
            list.nest(NFTA_LIST_ELEM | NESTED, |nest| expression.encode(nest));
        }
    });
    if let Some(text) = comment {
        rule.bytes(NFTA_RULE_USERDATA, &userdata(text));
    }
    rule
}

/// A comment as nft(8) writes it, of 250 bytes at most.
fn userdata(comment: &str) -> Vec<u8> {
    let mut data = vec![UDATA_COMMENT, comment.len() as u8 + 1];
    data.extend_from_slice(comment.as_bytes());
    data.push(0);
    data
}

/// Enters an element that is not there, with its owner as its comment.
pub(crate) fn add_element(element: &Element, owner: &str) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    element_message(libc::NFT_MSG_NEWSETELEM, flags, format!("add {element}"), element, Some(&userdata(owner)))
}

/// Asks for an element.
pub(crate) fn get_element(element: &Element) -> Message {
    element_message(libc::NFT_MSG_GETSETELEM, 0, format!("look up {element}"), element, None)
}

/// Whether two elements cannot be in the table together: one set, and one key.
pub(crate) fn is_same_entry(one: &Element, other: &Element) -> bool {
    let (one, other) = (encode(one), encode(other));
    one.set == other.set && one.key == other.key
}

/// Deletes an element that was found.
pub(crate) fn delete_listed(set: &str, found: &Found) -> Message {
    let mut message = message(libc::NFT_MSG_DELSETELEM, 0, format!("delete an element of {set}"));
    message.text(NFTA_SET_ELEM_LIST_TABLE, TABLE).text(NFTA_SET_ELEM_LIST_SET, set);
    message.nest(NFTA_SET_ELEM_LIST_ELEMENTS | NESTED, |list| {
        list.nest(NFTA_LIST_ELEM | NESTED, |nest| {
            data(nest, NFTA_SET_ELEM_KEY, &found.key);
            if let Some(end) = &found.key_end {
                data(nest, NFTA_SET_ELEM_KEY_END, end);
            }
        });
    });
    message
}

/// Lists the elements of a set.
fn element_dump(table: &str, set: &str) -> Message {
    let mut dump = message(libc::NFT_MSG_GETSETELEM, 0, format!("list elements of {set}"));
    dump.text(NFTA_SET_ELEM_LIST_TABLE, table).text(NFTA_SET_ELEM_LIST_SET, set);
    dump
}

/// The set of an element.
pub(crate) fn set_of(element: &Element) -> String {
    encode(element).set
}

/// The names of all sets and maps.
pub(crate) fn set_names() -> impl Iterator<Item = String> {
    SETS.iter().flat_map(|set| [set.name(true), set.name(false)])
}

/// The maps of ports of a family: those at an address, and those at every address.
pub(crate) fn port_maps(ipv4: bool) -> [String; 2] {
    [SETS[0].name(ipv4), SETS[1].name(ipv4)]
}

/// An element as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) key: Vec<u8>,
    pub(crate) key_end: Option<Vec<u8>>,
    pub(crate) data: Option<Vec<u8>>,
    /// Its comment.
    pub(crate) owner: Option<String>,
}

impl Found {
    /// Reads the elements of an answer.
    pub(crate) fn parse(payload: &[u8]) -> Vec<Self> {
        let value = |content: &[u8]| Attributes::new(content).find(NFTA_DATA_VALUE).map(<[u8]>::to_vec);
        let Some(list) = payload.get(HEADER..).and_then(|a| Attributes::new(a).find(NFTA_SET_ELEM_LIST_ELEMENTS))
        else {
            return Vec::new();
        };
        let elements = Attributes::new(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM);
        let one = |(_, content): (u16, &[u8])| {
            let attributes = Attributes::new(content);
            Some(Self {
                key: attributes.find(NFTA_SET_ELEM_KEY).and_then(value)?,
                key_end: attributes.find(NFTA_SET_ELEM_KEY_END).and_then(value),
                data: attributes.find(NFTA_SET_ELEM_DATA).and_then(value),
                owner: attributes.find(NFTA_SET_ELEM_USERDATA).and_then(comment),
            })
        };
        elements.filter_map(one).collect()
    }

    /// Whether it is a port that this one includes, is included by, or is.
    pub(crate) fn is_same_port(&self, protocol: Transport, port: u16) -> bool {
        self.key.ends_with(&[field(&[protocol.number()]), field(&port.to_be_bytes())].concat())
    }

    /// Whether it is the same entry, leading to the same place.
    pub(crate) fn is(&self, element: &Element) -> bool {
        let Encoded { key, key_end, data, .. } = encode(element);
        self.key == key && self.key_end == key_end && self.data == data
    }

    /// Whether it is an entry of the same key.
    pub(crate) fn has_key_of(&self, element: &Element) -> bool {
        self.key == encode(element).key
    }

    /// Whether it leads to this address.
    pub(crate) fn leads_to(&self, address: IpAddr) -> bool {
        self.data.as_ref().is_some_and(|data| data.starts_with(&octets(address)))
    }
}

/// The comment in the user data of an element, as nft(8) writes it (`NFTNL_UDATA_SET_ELEM_COMMENT` of libnftnl).
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, len, rest @ ..] = userdata {
        let (content, others) = rest.split_at_checked(usize::from(*len))?;
        if *kind == UDATA_COMMENT {
            return Some(super::message::text(content));
        }
        userdata = others;
    }
    None
}

fn element_message(kind: i32, flags: i32, what: String, element: &Element, comment: Option<&[u8]>) -> Message {
    let Encoded { set, key, key_end, data: value } = encode(element);
    let mut message = message(kind, flags, what);
    message.text(NFTA_SET_ELEM_LIST_TABLE, TABLE).text(NFTA_SET_ELEM_LIST_SET, &set);
    message.nest(NFTA_SET_ELEM_LIST_ELEMENTS | NESTED, |list| {
        list.nest(NFTA_LIST_ELEM | NESTED, |nest| {
            data(nest, NFTA_SET_ELEM_KEY, &key);
            if let Some(end) = &key_end {
                data(nest, NFTA_SET_ELEM_KEY_END, end);
            }
            if let Some(comment) = comment {
                if let Some(value) = &value {
                    data(nest, NFTA_SET_ELEM_DATA, value);
                }
                nest.bytes(NFTA_SET_ELEM_USERDATA, comment);
            }
        });
    });
    message
}

fn data(message: &mut Message, attribute: u16, value: &[u8]) {
    message.nest(attribute | NESTED, |nest| {
        nest.bytes(NFTA_DATA_VALUE, value);
    });
}

struct Encoded {
    set: String,
    key: Vec<u8>,
    key_end: Option<Vec<u8>>,
    data: Option<Vec<u8>>,
}

/// One field of a concatenation, filled up to a register.
fn field(bytes: &[u8]) -> Vec<u8> {
    let mut field = bytes.to_vec();
    field.resize(bytes.len().next_multiple_of(4), 0);
    field
}

fn encode(element: &Element) -> Encoded {
    let ipv4 = element.is_ipv4();
    let at = |set: usize, key: Vec<u8>| Encoded { set: SETS[set].name(ipv4), key, key_end: None, data: None };
    let range = |network: &IpNet| (octets(network.network()), octets(network.broadcast()));
    match element {
        Element::Port { address, protocol, port, to, to_port } => {
            let mut key = address.map(octets).unwrap_or_default();
            key.extend([field(&[protocol.number()]), field(&port.to_be_bytes())].concat());
            let data = Some([octets(*to), field(&to_port.to_be_bytes())].concat());
            Encoded { data, ..at(usize::from(address.is_none()), key) }
        }
        Element::Hairpin { protocol, port, callers, to } => {
            let head = [field(&[protocol.number()]), field(&port.to_be_bytes())].concat();
            let (first, last) = range(callers);
            let key_end = Some([head.clone(), last, octets(*to)].concat());
            Encoded { key_end, ..at(2, [head, first, octets(*to)].concat()) }
        }
        Element::Home { source, network } => {
            let (first, last) = range(network);
            let key_end = Some([octets(*source), last].concat());
            Encoded { key_end, ..at(3, [octets(*source), first].concat()) }
        }
        Element::Masquerade { source } => at(4, octets(*source)),
        Element::Pod { address } => at(5, octets(*address)),
    }
}

/// The field of a key.
#[derive(Clone, Copy)]
enum Field {
    Address,
    Protocol,
    Port,
}

impl Field {
    /// The number of its type in nft(8) (`enum datatypes` of its `include/datatype.h`), by which that prints it.
    fn datatype(self, ipv4: bool) -> u32 {
        match self {
            Self::Address => {
                if ipv4 {
                    7
                } else {
                    8
                }
            }
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }

    /// Its length in bytes.
    fn len(self, ipv4: bool) -> u32 {
        match self {
            Self::Address => {
                if ipv4 {
                    4
                } else {
                    16
                }
            }
            Self::Protocol => 1,
            Self::Port => 2,
        }
    }
}

/// A set or map, of which there is one for each family.
struct Set {
    name: &'static str,
    key: &'static [Field],
    intervals: bool,
    data: &'static [Field],
}

impl Set {
    fn name(&self, ipv4: bool) -> String {
        format!("{}{}", self.name, if ipv4 { 4 } else { 6 })
    }
}

const SETS: [Set; 6] = {
    use Field::{Address, Port, Protocol};
    [
        Set { name: "at", key: &[Address, Protocol, Port], intervals: false, data: &[Address, Port] },
        Set { name: "ports", key: &[Protocol, Port], intervals: false, data: &[Address, Port] },
        Set { name: "hairpin", key: &[Protocol, Port, Address, Address], intervals: true, data: &[] },
        Set { name: "home", key: &[Address, Address], intervals: true, data: &[] },
        Set { name: "masquerade", key: &[Address], intervals: false, data: &[] },
        Set { name: "pods", key: &[Address], intervals: false, data: &[] },
    ]
};

fn new_set(set: &Set, ipv4: bool, id: u32) -> Message {
    let name = set.name(ipv4);
    let datatype = |fields: &[Field]| fields.iter().fold(0, |all, field| (all << 6) | field.datatype(ipv4));
    let length = |fields: &[Field]| fields.iter().map(|field| field.len(ipv4).next_multiple_of(4)).sum::<u32>();
    let mut flags = 0;
    if set.intervals {
        flags |= libc::NFT_SET_INTERVAL as u32 | NFT_SET_CONCAT;
    }
    if !set.data.is_empty() {
        flags |= libc::NFT_SET_MAP as u32;
    }
    let mut message = message(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, format!("create set {name}"));
    message.text(NFTA_SET_TABLE, TABLE).text(NFTA_SET_NAME, &name);
    for (attribute, value) in
        [(NFTA_SET_FLAGS, flags), (NFTA_SET_KEY_TYPE, datatype(set.key)), (NFTA_SET_KEY_LEN, length(set.key))]
    {
        be32(&mut message, attribute, value);
    }
    if !set.data.is_empty() {
        be32(&mut message, NFTA_SET_DATA_TYPE, datatype(set.data));
        be32(&mut message, NFTA_SET_DATA_LEN, length(set.data));
    }
    if set.intervals {
        message.nest(NFTA_SET_DESC | NESTED, |nest| {
            nest.nest(NFTA_SET_DESC_CONCAT | NESTED, |list| {
                for field in set.key {
                    list.nest(NFTA_LIST_ELEM | NESTED, |nest| be32(nest, NFTA_SET_FIELD_LEN, field.len(ipv4)));
                }
            });
        });
    }
    be32(&mut message, NFTA_SET_ID, id);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_entered_is_recognised_in_the_answer() {
        let element = Element::Hairpin {
            protocol: Transport::Udp,
            port: 53,
            callers: "10.1.0.0/24".parse().unwrap(),
            to: "10.1.0.5".parse().unwrap(),
        };
        // A request for an element and the answer to it have the same form.
        let mut bytes = Vec::new();
        add_element(&element, "dcenet:shop/c1/eth0").encode(1, 0, &mut bytes);
        let [found] = &Found::parse(&bytes[16..])[..] else { panic!("one element") };
        assert!(found.is(&element) && found.owner.as_deref() == Some("dcenet:shop/c1/eth0"), "{found:?}");
        let port = Element::Port {
            address: Some("192.0.2.1".parse().unwrap()),
            protocol: Transport::Tcp,
            port: 8080,
            to: "10.1.0.5".parse().unwrap(),
            to_port: 80,
        };
        let mut bytes = Vec::new();
        add_element(&port, "x").encode(1, 0, &mut bytes);
        let found = &Found::parse(&bytes[16..])[0];
        assert!(found.is_same_port(Transport::Tcp, 8080) && !found.is_same_port(Transport::Udp, 8080));
        assert!(found.leads_to("10.1.0.5".parse().unwrap()) && !found.is(&element));
    }

    #[test]
    fn hostile_user_data_is_no_comment() {
        for bytes in [&[][..], &[0], &[0, 9, b'x'], &[1, 0], &[1, 200, 0, 0]] {
            assert_eq!(comment(bytes), None, "{bytes:?}");
        }
        assert_eq!(comment(&[1, 1, 7, 0, 2, b'x', 0]).as_deref(), Some("x"));
    }
}
