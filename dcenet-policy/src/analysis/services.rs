//! Sets of services, exact over every protocol and port.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Serialize, Serializer};

use crate::diagram::{Arm, Diagram, Field, Node, NodeId};
use crate::ir::{Leaf, Service};
use crate::model::Protocol;

/// A set of protocols and ports. Equal sets are equal values.
///
/// As JSON it is a list of [`ServiceRange`]s, as text `tcp 80, 443-445; udp 53` or `everything`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Services {
    /// Protocols that differ from the rest, with disjoint intervals in ascending order that do not touch.
    named: BTreeMap<u8, Intervals>,
    /// Whether every other protocol belongs to it.
    rest: bool,
}

type Intervals = Vec<(u16, u16)>;

/// Ports of one protocol, or of all protocols that no other range of the set names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServiceRange {
    /// The protocol, as text; `other` for all those that the set does not name.
    #[serde(serialize_with = "protocol_name")]
    pub protocol: Option<Protocol>,
    /// The first port; for ICMP `type * 256 + code`.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

fn protocol_name<S: Serializer>(protocol: &Option<Protocol>, serializer: S) -> Result<S::Ok, S::Error> {
    match protocol {
        Some(protocol) => serializer.collect_str(protocol),
        None => serializer.serialize_str("other"),
    }
}

impl Services {
    /// Every protocol and port.
    pub fn all() -> Self {
        Self { named: BTreeMap::new(), rest: true }
    }

    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether nothing belongs to it.
    pub fn is_empty(&self) -> bool {
        !self.rest && self.named.is_empty()
    }

    /// Whether everything belongs to it.
    pub fn is_all(&self) -> bool {
        self.rest && self.named.is_empty()
    }

    /// Whether a packet's service belongs to it.
    pub fn contains(&self, protocol: Protocol, port: u16) -> bool {
        match self.named.get(&protocol.0) {
            None => self.rest,
            Some(ports) => ports.iter().any(|(first, last)| (*first..=*last).contains(&port)),
        }
    }

    /// What belongs to both.
    pub fn and(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left && right)
    }

    /// What belongs to either.
    pub fn or(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left || right)
    }

    /// What belongs to this one and not to the other.
    pub fn minus(&self, other: &Self) -> Self {
        self.combine(other, |left, right| left && !right)
    }

    /// How many ports of a protocol belong to it.
    pub fn ports_of(&self, protocol: Protocol) -> u32 {
        self.of(protocol.0).iter().map(|(first, last)| u32::from(*last) - u32::from(*first) + 1).sum()
    }

    /// The protocols of which something else belongs to it than of most.
    pub fn protocols(&self) -> Vec<Protocol> {
        self.named.keys().copied().map(Protocol).collect()
    }

    /// Its parts: named protocols in ascending order, then the rest.
    pub fn ranges(&self) -> Vec<ServiceRange> {
        let named = self.named.iter().flat_map(|(protocol, ports)| {
            let none = ports.is_empty().then_some((1, 0));
            let ports = ports.iter().copied().chain(none);
            ports.map(|(first, last)| ServiceRange { protocol: Some(Protocol(*protocol)), first, last })
        });
        let rest = self.rest.then_some(ServiceRange { protocol: None, first: 0, last: u16::MAX });
        named.filter(|range| range.first <= range.last).chain(rest).collect()
    }

    /// A service of it: of TCP, UDP, SCTP or ICMP where there is one, and not port 0 where there is another.
    pub fn example(&self, is_ipv4: bool) -> Option<(Protocol, u16)> {
        let echo = if is_ipv4 { (Protocol::ICMP, 8 << 8) } else { (Protocol::ICMPV6, 128 << 8) };
        for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
            let port = self.of(protocol.0).iter().find(|(_, last)| *last > 0).map(|(first, _)| (*first).max(1));
            match port {
                // Of a set without gaps a port that people know.
                Some(1) if self.contains(protocol, 80) => return Some((protocol, 80)),
                Some(port) => return Some((protocol, port)),
                None => {}
            }
        }
        if self.contains(echo.0, echo.1) {
            return Some(echo);
        }
        (0..=u8::MAX).find_map(|protocol| Some((Protocol(protocol), self.of(protocol).first()?.0)))
    }

    fn of(&self, protocol: u8) -> Intervals {
        match self.named.get(&protocol) {
            Some(ports) => ports.clone(),
            None if self.rest => FULL.to_vec(),
            None => Vec::new(),
        }
    }

    fn combine(&self, other: &Self, keep: impl Fn(bool, bool) -> bool) -> Self {
        let rest = keep(self.rest, other.rest);
        let protocols: BTreeSet<u8> = self.named.keys().chain(other.named.keys()).copied().collect();
        let named =
            protocols.into_iter().map(|protocol| (protocol, overlay(&self.of(protocol), &other.of(protocol), &keep)));
        Self::canonical(named.collect(), rest)
    }

    /// `rest` is what most protocols are, so that a set has one form.
    fn canonical(mut named: BTreeMap<u8, Intervals>, rest: bool) -> Self {
        for (protocol, ports) in &mut named {
            if !Protocol(*protocol).has_ports() {
                // Their port is always 0.
                *ports = if ports.first().is_some_and(|(first, _)| *first == 0) { FULL.to_vec() } else { Vec::new() };
            }
        }
        let full = named.values().filter(|ports| **ports == FULL).count() + if rest { 256 - named.len() } else { 0 };
        let majority = full > 128;
        if majority != rest {
            for protocol in 0..=u8::MAX {
                named.entry(protocol).or_insert_with(|| if rest { FULL.to_vec() } else { Vec::new() });
            }
        }
        named.retain(|_, ports| *ports != if majority { FULL.to_vec() } else { Vec::new() });
        Self { named, rest: majority }
    }
}

impl From<Service> for Services {
    fn from(service: Service) -> Self {
        match service {
            Service::Any => Self::all(),
            Service::Ports { protocol, first, last } => {
                Self::canonical([(protocol.0, vec![(first, last)])].into(), false)
            }
        }
    }
}

/// Merges two lists of intervals by a function of what is in which.
fn overlay(left: &[(u16, u16)], right: &[(u16, u16)], keep: impl Fn(bool, bool) -> bool) -> Intervals {
    let edges = |list: &[(u16, u16)]| -> Vec<u32> {
        list.iter().flat_map(|(first, last)| [u32::from(*first), u32::from(*last) + 1]).collect()
    };
    let mut cuts: Vec<u32> = edges(left).into_iter().chain(edges(right)).chain([0, 65_536]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let holds = |list: &[(u16, u16)], at: u32| {
        list.iter().any(|(first, last)| u32::from(*first) <= at && at <= u32::from(*last))
    };
    let mut kept: Intervals = Vec::new();
    for pair in cuts.windows(2) {
        let (Ok(first), Ok(last)) = (u16::try_from(pair[0]), u16::try_from(pair[1] - 1)) else { continue };
        if keep(holds(left, pair[0]), holds(right, pair[0])) {
            match kept.last_mut() {
                Some((_, end)) if u32::from(*end) + 1 == pair[0] => *end = last,
                _ => kept.push((first, last)),
            }
        }
    }
    kept
}

/// What a peer of a diagram may do and may not, by what decides it.
pub(super) fn column(diagram: &Diagram, local: u16) -> BTreeMap<Leaf, Services> {
    let root = arms(diagram, diagram.root(), Field::Local, u16::MAX);
    let at =
        root.iter().find(|(first, last, _)| (*first..=*last).contains(&local)).map_or(diagram.root(), |(.., to)| *to);
    let protocols = arms(diagram, at, Field::Protocol, u16::from(u8::MAX));
    // The widest arm is what holds for protocols that no rule names.
    let others = protocols.iter().max_by_key(|(first, last, _)| last - first).map_or(at, |(.., to)| *to);
    let mut parts: BTreeMap<Leaf, (BTreeMap<u8, Intervals>, bool)> = BTreeMap::new();
    let mut named = Vec::new();
    for (first, last, to) in protocols {
        if to == others && first != last {
            continue;
        }
        for protocol in first..=last {
            named.push(protocol as u8);
            for (first, last, leaf) in ports(diagram, to) {
                parts.entry(leaf).or_default().0.entry(protocol as u8).or_default().push((first, last));
            }
        }
    }
    for (_, _, leaf) in ports(diagram, others).into_iter().take(1) {
        parts.entry(leaf).or_default().1 = true;
    }
    let services = parts.into_iter().map(|(leaf, (mut of, rest))| {
        // What a leaf does not have of a named protocol it has nothing of.
        for protocol in &named {
            of.entry(*protocol).or_default();
        }
        (leaf, Services::canonical(of, rest).and(&Services::all()))
    });
    services.filter(|(_, services)| !services.is_empty()).collect()
}

/// What a peer of a diagram may do.
pub(crate) fn allowed(diagram: &Diagram, local: u16) -> Services {
    let allowing = column(diagram, local).into_iter().filter(|(leaf, _)| leaf.verdict == crate::model::Verdict::Allow);
    allowing.fold(Services::none(), |all, (_, services)| all.or(&services))
}

fn ports(diagram: &Diagram, at: NodeId) -> Vec<(u16, u16, Leaf)> {
    let leaf = |to: NodeId| match diagram.node(to) {
        Node::Leaf(leaf) => Some(*leaf),
        Node::Switch { .. } => None,
    };
    arms(diagram, at, Field::Port, u16::MAX)
        .into_iter()
        .filter_map(|(first, last, to)| Some((first, last, leaf(to)?)))
        .collect()
}

/// The intervals of a field below a node, up to the field's last value.
fn arms(diagram: &Diagram, at: NodeId, wanted: Field, end: u16) -> Vec<(u16, u16, NodeId)> {
    match diagram.node(at) {
        Node::Switch { field, arms } if *field == wanted => {
            let lasts = arms[1..].iter().map(|arm| arm.first - 1).chain([end]);
            arms.iter().zip(lasts).map(|(Arm { first, to }, last)| (*first, last, *to)).collect()
        }
        _ => vec![(0, end, at)],
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing");
        }
        if self.is_all() {
            return f.write_str("everything");
        }
        let mut separator = "";
        if self.rest {
            f.write_str("every protocol but")?;
            for (index, protocol) in self.named.keys().enumerate() {
                write!(f, "{} {}", if index == 0 { "" } else { "," }, Protocol(*protocol))?;
            }
            separator = "; ";
        }
        for (protocol, ports) in self.named.iter().filter(|(_, ports)| !ports.is_empty()) {
            write!(f, "{separator}{}", Protocol(*protocol))?;
            separator = "; ";
            if *ports == FULL {
                continue;
            }
            for (index, (first, last)) in ports.iter().enumerate() {
                f.write_str(if index == 0 { " " } else { ", " })?;
                write_ports(f, Protocol(*protocol), *first, *last)?;
            }
        }
        Ok(())
    }
}

fn write_ports(f: &mut fmt::Formatter<'_>, protocol: Protocol, first: u16, last: u16) -> fmt::Result {
    let icmp = matches!(protocol, Protocol::ICMP | Protocol::ICMPV6);
    match (icmp, first == last) {
        (true, true) => write!(f, "type {} code {}", first >> 8, first & 0xff),
        (true, false) if first & 0xff == 0 && last & 0xff == 0xff && first >> 8 == last >> 8 => {
            write!(f, "type {}", first >> 8)
        }
        (true, false) => {
            write!(f, "type {} code {} to type {} code {}", first >> 8, first & 0xff, last >> 8, last & 0xff)
        }
        (false, true) => write!(f, "{first}"),
        (false, false) => write!(f, "{first}-{last}"),
    }
}

impl Serialize for Services {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.ranges())
    }
}

const FULL: [(u16, u16); 1] = [(0, u16::MAX)];

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(protocol: Protocol, first: u16, last: u16) -> Services {
        Service::Ports { protocol, first, last }.into()
    }

    #[test]
    fn sets_are_exact_at_their_edges_and_have_one_form() {
        let web = ports(Protocol::TCP, 80, 90);
        let both = web.or(&ports(Protocol::TCP, 91, 100)).or(&ports(Protocol::UDP, 53, 53));
        assert_eq!(both.to_string(), "tcp 80-100; udp 53");
        assert_eq!(both.minus(&web).to_string(), "tcp 91-100; udp 53");
        assert_eq!(both.minus(&both), Services::none());
        let holes = Services::all().minus(&web).minus(&ports(Protocol(47), 0, u16::MAX));
        assert_eq!(holes.to_string(), "every protocol but tcp, 47; tcp 0-79, 91-65535");
        assert_eq!(holes.or(&web).or(&ports(Protocol(47), 0, 0)), Services::all());
        assert_eq!([79, 80, 90, 91].map(|port| holes.contains(Protocol::TCP, port)), [true, false, false, true]);
        assert!(!holes.contains(Protocol(47), 0) && holes.contains(Protocol(46), 0));
        assert_eq!(ports(Protocol::ICMP, 0x800, 0x800).to_string(), "icmp type 8 code 0");
        assert_eq!(ports(Protocol::ICMPV6, 0x100, 0x1ff).to_string(), "icmpv6 type 1");
        assert_eq!(
            (Services::all().to_string(), Services::none().to_string()),
            ("everything".into(), "nothing".into())
        );
    }

    #[test]
    fn an_example_belongs_to_its_set() {
        let zero = ports(Protocol::TCP, 0, 0);
        assert_eq!(zero.example(true), Some((Protocol::TCP, 0)));
        assert_eq!(zero.or(&ports(Protocol::UDP, 53, 60)).example(true), Some((Protocol::UDP, 53)));
        assert_eq!(Services::all().example(false), Some((Protocol::TCP, 80)));
        let strange = Services::all().minus(
            &[6, 17, 132].map(|p| ports(Protocol(p), 0, u16::MAX)).iter().fold(Services::none(), |a, b| a.or(b)),
        );
        assert_eq!(strange.example(true), Some((Protocol::ICMP, 0x800)));
        assert_eq!(strange.example(false), Some((Protocol::ICMPV6, 0x8000)));
        assert_eq!(ports(Protocol(47), 0, 0).example(true), Some((Protocol(47), 0)));
        assert_eq!(Services::none().example(true), None);
    }

    #[test]
    fn a_column_of_a_diagram_is_partitioned() {
        let list =
            "ingress locals 2\nallow 7 peers 1 tcp 80-90\ndeny 8 peers 1 47 *\nallow 9 peers 1 any\ndeny 1 default";
        let diagram = Diagram::build(&list.parse().unwrap(), &crate::compiler::Limits::default()).unwrap();
        let told = |local| {
            column(&diagram, local)
                .iter()
                .map(|(leaf, services)| format!("{}: {services}", leaf.rule.0))
                .collect::<Vec<_>>()
        };
        assert_eq!(told(1), ["7: tcp 80-90", "9: every protocol but tcp, 47; tcp 0-79, 91-65535", "8: 47"]);
        assert_eq!(told(0), ["1: everything"]);
        assert_eq!(allowed(&diagram, 1).to_string(), "every protocol but 47");
    }
}
