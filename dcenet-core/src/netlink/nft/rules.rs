//! The chains of the table and their rules, which never change.

use super::attributes::*;
use super::{SETS, Set, be32, data};
use crate::netlink::message::Message;

pub(super) struct Base {
    pub(super) kind: &'static str,
    pub(super) hook: u32,
    pub(super) priority: i32,
}

/// Chains, and where they are hooked (`enum nf_inet_hooks`, `enum nf_ip_hook_priorities`).
pub(super) const CHAINS: [(&str, Option<Base>); 5] = [
    ("guard", Some(Base { kind: "filter", hook: 0, priority: -300 })),
    ("ports", None),
    ("prerouting", Some(Base { kind: "nat", hook: 0, priority: -100 })),
    ("output", Some(Base { kind: "nat", hook: 3, priority: -100 })),
    ("postrouting", Some(Base { kind: "nat", hook: 4, priority: 100 })),
];

/// What a rule does, one after the other; a comparison that fails ends the rule. Registers are of 32 bits, by number.
pub(super) enum Expression {
    Meta {
        key: i32,
        to: u32,
    },
    /// Of the packet of the original direction.
    OriginalPort {
        to: u32,
    },
    ConntrackStatus {
        to: u32,
    },
    AddressType {
        to: u32,
    },
    /// The index of the link that the packet came in by, if the way back to its source leads over it; else 0.
    ReverseLink {
        to: u32,
    },
    Counter,
    Payload {
        base: i32,
        offset: u32,
        len: u32,
        to: u32,
    },
    Mask {
        at: u32,
        mask: Vec<u8>,
    },
    Compare {
        equal: bool,
        at: u32,
        value: Vec<u8>,
    },
    Lookup {
        set: String,
        from: u32,
        to: Option<u32>,
    },
    Dnat {
        ipv4: bool,
        address: u32,
        port: u32,
    },
    Masquerade,
    Verdict {
        code: i32,
        chain: Option<&'static str>,
    },
}

impl Expression {
    fn name(&self) -> &'static str {
        match self {
            Self::Meta { .. } => "meta",
            Self::OriginalPort { .. } | Self::ConntrackStatus { .. } => "ct",
            Self::AddressType { .. } | Self::ReverseLink { .. } => "fib",
            Self::Counter => "counter",
            Self::Payload { .. } => "payload",
            Self::Mask { .. } => "bitwise",
            Self::Compare { .. } => "cmp",
            Self::Lookup { .. } => "lookup",
            Self::Dnat { .. } => "nat",
            Self::Masquerade => "masq",
            Self::Verdict { .. } => "immediate",
        }
    }

    pub(super) fn encode(&self, message: &mut Message) {
        message.text(NFTA_EXPR_NAME, self.name());
        message.nest(NFTA_EXPR_DATA | NESTED, |nest| {
            let mut numbers = |list: &[(u16, u32)]| list.iter().for_each(|(a, value)| be32(nest, *a, *value));
            match self {
                Self::Meta { key, to } => numbers(&[(NFTA_META_KEY, *key as u32), (NFTA_META_DREG, word(*to))]),
                Self::OriginalPort { to } => {
                    numbers(&[(NFTA_CT_KEY, libc::NFT_CT_PROTO_DST as u32), (NFTA_CT_DREG, word(*to))]);
                    nest.u8(NFTA_CT_DIRECTION, IP_CT_DIR_ORIGINAL);
                }
                Self::ConntrackStatus { to } => {
                    numbers(&[(NFTA_CT_KEY, libc::NFT_CT_STATUS as u32), (NFTA_CT_DREG, word(*to))]);
                }
                Self::AddressType { to } => numbers(&[
                    (NFTA_FIB_DREG, word(*to)),
                    (NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE),
                    (NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR),
                ]),
                Self::ReverseLink { to } => numbers(&[
                    (NFTA_FIB_DREG, word(*to)),
                    (NFTA_FIB_RESULT, NFT_FIB_RESULT_OIF),
                    (NFTA_FIB_FLAGS, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF),
                ]),
                Self::Payload { base, offset, len, to } => numbers(&[
                    (NFTA_PAYLOAD_DREG, word(*to)),
                    (NFTA_PAYLOAD_BASE, *base as u32),
                    (NFTA_PAYLOAD_OFFSET, *offset),
                    (NFTA_PAYLOAD_LEN, *len),
                ]),
                Self::Mask { at, mask } => {
                    numbers(&[
                        (NFTA_BITWISE_SREG, word(*at)),
                        (NFTA_BITWISE_DREG, word(*at)),
                        (NFTA_BITWISE_LEN, mask.len() as u32),
                    ]);
                    data(nest, NFTA_BITWISE_MASK, mask);
                    data(nest, NFTA_BITWISE_XOR, &vec![0; mask.len()]);
                }
                Self::Compare { equal, at, value } => {
                    let operation = if *equal { libc::NFT_CMP_EQ } else { libc::NFT_CMP_NEQ };
                    numbers(&[(NFTA_CMP_SREG, word(*at)), (NFTA_CMP_OP, operation as u32)]);
                    data(nest, NFTA_CMP_DATA, value);
                }
                Self::Lookup { set, from, to } => {
                    numbers(&[(NFTA_LOOKUP_SREG, word(*from))]);
                    if let Some(to) = to {
                        be32(nest, NFTA_LOOKUP_DREG, word(*to));
                    }
                    nest.text(NFTA_LOOKUP_SET, set);
                }
                Self::Dnat { ipv4, address, port } => {
                    let family = if *ipv4 { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
                    numbers(&[
                        (NFTA_NAT_TYPE, libc::NFT_NAT_DNAT as u32),
                        (NFTA_NAT_FAMILY, family as u32),
                        (NFTA_NAT_REG_ADDR_MIN, word(*address)),
                        (NFTA_NAT_REG_PROTO_MIN, word(*port)),
                    ]);
                }
                Self::Masquerade | Self::Counter => {}
                Self::Verdict { code, chain } => {
                    numbers(&[(NFTA_IMMEDIATE_DREG, libc::NFT_REG_VERDICT as u32)]);
                    nest.nest(NFTA_IMMEDIATE_DATA | NESTED, |nest| {
                        nest.nest(NFTA_DATA_VERDICT | NESTED, |nest| {
                            be32(nest, NFTA_VERDICT_CODE, *code as u32);
                            if let Some(chain) = chain {
                                nest.text(NFTA_VERDICT_CHAIN, chain);
                            }
                        });
                    });
                }
            }
        });
    }
}

/// The number of a 32-bit register (`NFT_REG32_00` and on).
const fn word(number: u32) -> u32 {
    libc::NFT_REG32_00 as u32 + number
}

/// Goes on if the packet is of that family.
pub(super) fn family(ipv4: bool) -> [Expression; 2] {
    let value = vec![if ipv4 { libc::NFPROTO_IPV4 as u8 } else { libc::NFPROTO_IPV6 as u8 }];
    [Expression::Meta { key: libc::NFT_META_NFPROTO, to: 0 }, Expression::Compare { equal: true, at: 0, value }]
}

/// Reads the packet's source or destination (RFC 791, section 3.1; RFC 8200, section 3).
pub(super) fn address(ipv4: bool, source: bool, to: u32) -> Expression {
    let (offset, len) = match (ipv4, source) {
        (true, true) => (12, 4),
        (true, false) => (16, 4),
        (false, true) => (8, 16),
        (false, false) => (24, 16),
    };
    Expression::Payload { base: libc::NFT_PAYLOAD_NETWORK_HEADER, offset, len, to }
}

/// Reads the number of the transport protocol.
pub(super) fn protocol(to: u32) -> Expression {
    Expression::Meta { key: libc::NFT_META_L4PROTO, to }
}

/// Reads the destination port: the second two bytes of every transport header that has ports.
pub(super) fn port(to: u32) -> Expression {
    Expression::Payload { base: libc::NFT_PAYLOAD_TRANSPORT_HEADER, offset: 2, len: 2, to }
}

pub(super) fn rules() -> Vec<(&'static str, Vec<Expression>)> {
    use Expression::*;
    let mut rules = Vec::new();

    let mut guard = vec![
        Meta { key: libc::NFT_META_IIFTYPE, to: 0 },
        Compare { equal: false, at: 0, value: libc::ARPHRD_LOOPBACK.to_ne_bytes().to_vec() },
    ];
    guard.extend(family(true));
    guard.push(Payload { base: libc::NFT_PAYLOAD_NETWORK_HEADER, offset: 16, len: 1, to: 0 });
    guard.push(Compare { equal: true, at: 0, value: vec![127] });
    guard.push(Verdict { code: libc::NF_DROP, chain: None });
    rules.push(("guard", guard));

    // Routed elsewhere it would be dropped for its source, and here it is answered, if only with a refusal.
    let mut loopback = Vec::from(family(false));
    loopback.push(address(false, false, 0));
    loopback.push(Compare { equal: true, at: 0, value: std::net::Ipv6Addr::LOCALHOST.octets().to_vec() });
    loopback.push(Verdict { code: libc::NFT_RETURN, chain: None });
    rules.push(("output", loopback));
    for chain in ["prerouting", "output"] {
        rules.push((
            chain,
            vec![
                AddressType { to: 0 },
                Compare { equal: true, at: 0, value: u32::from(libc::RTN_LOCAL).to_ne_bytes().to_vec() },
                Verdict { code: libc::NFT_JUMP, chain: Some("ports") },
            ],
        ));
    }
    for ipv4 in [true, false] {
        let words = if ipv4 { 1 } else { 4 };
        let to_port = words;
        let dnat = |set: &Set| {
            [Lookup { set: set.name(ipv4), from: 0, to: Some(0) }, Dnat { ipv4, address: 0, port: to_port }]
        };
        let mut at = Vec::from(family(ipv4));
        at.extend([address(ipv4, false, 0), protocol(words), port(words + 1)]);
        at.extend(dnat(&SETS[0]));
        rules.push(("ports", at));
        let mut everywhere = Vec::from(family(ipv4));
        everywhere.extend([protocol(0), port(1)]);
        everywhere.extend(dnat(&SETS[1]));
        rules.push(("ports", everywhere));
    }
    for ipv4 in [true, false] {
        let words = if ipv4 { 1 } else { 4 };
        let mut hairpin = vec![
            ConntrackStatus { to: 0 },
            Mask { at: 0, mask: IPS_DST_NAT.to_ne_bytes().to_vec() },
            Compare { equal: false, at: 0, value: vec![0; 4] },
        ];
        hairpin.extend(family(ipv4));
        hairpin.extend([protocol(0), OriginalPort { to: 1 }, address(ipv4, true, 2), address(ipv4, false, 2 + words)]);
        hairpin.extend([Lookup { set: SETS[2].name(ipv4), from: 0, to: None }, Masquerade]);
        rules.push(("postrouting", hairpin));

        let mut home = Vec::from(family(ipv4));
        home.extend([address(ipv4, true, 0), address(ipv4, false, words)]);
        home.push(Lookup { set: SETS[3].name(ipv4), from: 0, to: None });
        home.push(Verdict { code: libc::NFT_RETURN, chain: None });
        rules.push(("postrouting", home));

        let mut local = Vec::from(family(ipv4));
        local.extend([address(ipv4, false, 0), Lookup { set: SETS[5].name(ipv4), from: 0, to: None }]);
        local.push(Verdict { code: libc::NFT_RETURN, chain: None });
        rules.push(("postrouting", local));

        let mut leaving = Vec::from(family(ipv4));
        leaving.extend([address(ipv4, true, 0), Lookup { set: SETS[4].name(ipv4), from: 0, to: None }]);
        // Multicast: 224.0.0.0/4 (RFC 5771), ff00::/8 (RFC 4291, section 2.7).
        let (offset, mask, value) = if ipv4 { (16, 0xf0, 0xe0) } else { (24, 0xff, 0xff) };
        leaving.extend([
            Payload { base: libc::NFT_PAYLOAD_NETWORK_HEADER, offset, len: 1, to: 0 },
            Mask { at: 0, mask: vec![mask] },
            Compare { equal: false, at: 0, value: vec![value] },
            Masquerade,
        ]);
        rules.push(("postrouting", leaving));
    }
    rules
}
