//! A policy set as a script for `nft -f`, for nodes without eBPF.
//!
//! The script replaces one table of its own, `inet dcenet_policy`, in one transaction: run again, or with other
//! policies, it leaves nothing of before, and no packet meets half of it. [`undo`] takes it away. Nothing else of the host is
//! touched, and what the table allows other tables may still drop. It is tested with nftables 1.0.6 on Linux 6.18; what an
//! older one does not know fails the whole transaction.
//!
//! | Here | There |
//! |---|---|
//! | a pod | its addresses, in a map of verdicts that leads to the chain of its policy set; one map for each direction and family |
//! | a peer, of whatever kind | disjoint intervals of addresses, in a map for each policy set and family |
//! | tiers | nothing: what they come to is in the chains |
//! | protocol and port | one look-up in an anonymous set for each of TCP, UDP and SCTP, rules for ICMP types |
//! | the first packet is judged | `ct state established,related` passes, `invalid` is dropped |
//! | neighbour discovery between pod and node | solicitations and advertisements with hop limit 255 pass (RFC 4861, section 7.1) |
//!
//! Hooks are `forward`, `input` and `output` at priority `filter`, behind translation of destinations and before that of
//! sources: policy sees backends of services, not the services' own addresses.
//!
//! # What cannot be expressed
//!
//! [`Rendered::omitted`] lists it for the cluster in question:
//!
//! - A pod is known by its address, not by its device: something else must keep others from sending with it (`rp_filter`
//!   for IPv4, or what made the pod). Addresses that several pods claim are closed, both ways.
//! - Pods on a segment (macvlan, ipvlan, VF) do not pass the host's stack: they are not enforced. Nor are frames between two
//!   pods on one bridge, unless `net.bridge.bridge-nf-call-iptables` and `-ip6tables` are 1.
//! - A change does not reach connections that are established already; end them by `conntrack -D`.
//! - A destination is judged after it is translated, here before that. A rule by `service` means the same, as it names the
//!   backends, too; a rule by prefix does not match what a pod sends to a service whose own address the prefix holds.
//! - Which rule decided is not told, no rule is logged, and one that rejects drops. Policies in audit are left out.
//! - Rules with a schedule are there or not as of the cluster's time: render again when that changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Omission;
use crate::analysis::{Services, allowed};
use crate::classes::{AddressTable, ClassId};
use crate::compiler::{CompileError, Compiler, Limits, PolicySet, Scope, SetId, Update};
use crate::isolation::Fault;
use crate::model::{Cluster, Direction, PodNetwork, Protocol};

/// The table that a script replaces.
pub const TABLE: &str = "inet dcenet_policy";

/// A script, and what it does not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// For `nft -f`.
    pub script: String,
    /// What is not enforced as written.
    pub omitted: Vec<Omission>,
}

/// The script that takes the table away, whether it is there or not.
pub fn undo() -> String {
    format!("add table {TABLE}\ndelete table {TABLE}\n")
}

/// Renders the policies of the endpoints in scope.
///
/// # Errors
///
/// [`CompileError`], as [`Compiler::update`].
pub fn render(cluster: &Cluster, scope: &Scope) -> Result<Rendered, CompileError> {
    let in_force = cluster.in_force();
    let update = Compiler::new(scope.clone(), Limits::default()).update(&in_force)?;
    let mut omitted = omissions(cluster, &update);
    omitted.extend(super::unexpressed(cluster));
    omitted.extend(super::named(cluster));
    let mut writer = Writer { update: &update, body: String::new(), written: BTreeSet::new(), chains: BTreeMap::new() };
    let mut dispatch: BTreeMap<(Direction, bool), BTreeMap<IpAddr, BTreeSet<SetId>>> = BTreeMap::new();
    for (id, plan) in &update.endpoints {
        let pod = &cluster.pods[id];
        if pod.on_segment {
            continue;
        }
        for direction in Direction::ALL {
            for address in &pod.addresses {
                let sets = dispatch.entry((direction, address.is_ipv4())).or_default();
                sets.entry(*address).or_default().insert(plan.set(direction).id);
            }
        }
    }
    let claimed: BTreeSet<IpAddr> = update
        .faults
        .iter()
        .filter_map(|fault| match fault {
            Fault::AmbiguousAddress { address, .. } => Some(*address),
            _ => None,
        })
        .collect();
    let sets = update.sets();
    let mut judge = String::new();
    for ((direction, is_ipv4), pods) in &dispatch {
        let mut elements = Vec::new();
        for (address, of) in pods {
            let open = of.iter().filter_map(|id| sets.get(id)).all(|set| set.policies.is_empty());
            match (claimed.contains(address), of.first().and_then(|id| sets.get(id))) {
                (true, _) if open => {}
                (true, _) => elements.push(format!("{address} : drop")),
                (false, Some(set)) if !set.policies.is_empty() => {
                    elements.push(format!("{address} : jump {}", writer.set(set)));
                }
                (false, _) => {}
            }
        }
        if elements.is_empty() {
            continue;
        }
        let (family, kind) = family(*is_ipv4);
        let end = if *direction == Direction::Egress { "saddr" } else { "daddr" };
        let name = format!("{direction}_{family}");
        let _ = writeln!(
            writer.body,
            "\tmap {name} {{\n\t\ttype {kind} : verdict\n\t\telements = {{ {} }}\n\t}}",
            elements.join(",\n\t\t\t")
        );
        let _ = writeln!(judge, "\t\t{family} {end} vmap @{name}");
    }
    omitted.sort();
    let mut script = format!("{}table {TABLE} {{\n", undo());
    for (name, body) in writer.chains.values() {
        let _ = write!(script, "\tchain {name} {{\n{body}\t}}\n");
    }
    script.push_str(&writer.body);
    let _ = write!(script, "\tchain judge {{\n{PROLOGUE}{judge}\t}}\n");
    for hook in ["forward", "input", "output"] {
        let _ = write!(
            script,
            "\tchain {hook} {{\n\t\ttype filter hook {hook} priority filter; policy accept;\n\t\tjump judge\n\t}}\n"
        );
    }
    script.push_str("}\n");
    Ok(Rendered { script, omitted })
}

fn omissions(cluster: &Cluster, update: &Update) -> Vec<Omission> {
    let mut omitted = vec![
        Omission::new(
            "everything",
            "a pod is known by its address, not by its device: keep others from sending with it",
        ),
        Omission::new(
            "everything",
            "frames between pods on one bridge are seen only with net.bridge.bridge-nf-call-iptables and -ip6tables",
        ),
        Omission::new("everything", "a change does not reach established connections; end them by conntrack -D"),
        Omission::new(
            "everything",
            "a destination is judged after it is translated: prefixes that hold services' own addresses do not match what \
             goes to a service",
        ),
    ];
    for id in update.endpoints.keys() {
        if cluster.pods[id].on_segment {
            omitted.push(Omission::new(
                format!("pod {id}"),
                "its device is on a segment, past the host's stack: not enforced",
            ));
        }
    }
    for fault in &update.faults {
        omitted.push(match fault {
            Fault::AmbiguousAddress { address, .. } => Omission::new(
                format!("address {address}"),
                "several pods claim it, and which one sends is not known: closed both ways where policy governs one",
            ),
            Fault::Refused { policies, .. } | Fault::NotAudited { policies, .. } => {
                let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
                Omission::new(format!("policy {}", names.join(", ")), fault.to_string())
            }
            Fault::UnknownAccount { policy, .. } => Omission::new(format!("policy {policy}"), fault.to_string()),
        });
    }
    let host = cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Host).count();
    if host > 0 {
        omitted.push(Omission::new(
            format!("{host} pods in their hosts' networks"),
            "policies do not apply to them, here or there",
        ));
    }
    omitted
}

struct Writer<'a> {
    update: &'a Update,
    body: String,
    /// The sets whose chains are in there.
    written: BTreeSet<SetId>,
    /// Chains' names and bodies by what they allow, so that equal ones exist once.
    chains: BTreeMap<Services, (String, String)>,
}

impl Writer<'_> {
    /// The chain of a policy set, written once.
    fn set(&mut self, set: &PolicySet) -> String {
        let name = format!("set_{}", set.id.0);
        if !self.written.insert(set.id) {
            return name;
        }
        let direction = set.program.list.direction;
        let mut chain = String::new();
        let mut of_locals: HashMap<u16, String> = HashMap::new();
        let unknown = self.services(set, 0);
        for is_ipv4 in [true, false] {
            let (family, kind) = family(is_ipv4);
            let mut elements = Vec::new();
            for (first, last, local) in intervals(&self.update.table, is_ipv4, |class| set.local(class)) {
                let to = of_locals.entry(local).or_insert_with(|| self.services(set, local));
                // What is not in the map goes the way of the unknown.
                if *to != unknown {
                    let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
                    elements.push(format!("{range} : goto {to}"));
                }
            }
            if elements.is_empty() {
                continue;
            }
            let end = if direction == Direction::Egress { "daddr" } else { "saddr" };
            let _ = writeln!(
                self.body,
                "\tmap {name}_{family} {{\n\t\ttype {kind} : verdict\n\t\tflags interval\n\t\telements = {{ {} }}\n\t}}",
                elements.join(",\n\t\t\t")
            );
            let _ = writeln!(chain, "\t\t{family} {end} vmap @{name}_{family}");
        }
        let _ = write!(self.body, "\tchain {name} {{\n{chain}\t\tgoto {unknown}\n\t}}\n");
        name
    }

    /// The chain for what a group of peers may do.
    fn services(&mut self, set: &PolicySet, local: u16) -> String {
        let allowed = allowed(&set.program.diagram, local);
        if let Some((name, _)) = self.chains.get(&allowed) {
            return name.clone();
        }
        let (name, body) = match (allowed.is_all(), allowed.is_empty()) {
            (true, _) => ("allow_all".to_owned(), "\t\treturn\n".to_owned()),
            (_, true) => ("deny_all".to_owned(), "\t\tdrop\n".to_owned()),
            (false, false) => (format!("services_{}", self.chains.len()), body(&allowed)),
        };
        self.chains.insert(allowed, (name.clone(), body));
        name
    }
}

/// Rules that return for what is allowed and drop the rest.
fn body(allowed: &Services) -> String {
    let mut body = String::new();
    let (mut ports, mut rest): (BTreeMap<Protocol, Vec<(u16, u16)>>, _) = (BTreeMap::new(), false);
    for range in allowed.ranges() {
        match range.protocol {
            Some(protocol) => ports.entry(protocol).or_default().push((range.first, range.last)),
            None => rest = true,
        }
    }
    let named = allowed.protocols();
    for protocol in &named {
        let number = protocol.0;
        for (first, last) in ports.get(protocol).into_iter().flatten() {
            let _ = match *protocol {
                _ if (*first, *last) == (0, u16::MAX) => writeln!(body, "\t\tmeta l4proto {number} return"),
                Protocol::ICMP | Protocol::ICMPV6 => {
                    for (types, codes) in rectangles(*first, *last) {
                        let of = if *protocol == Protocol::ICMP { "icmp" } else { "icmpv6" };
                        let _ = writeln!(
                            body,
                            "\t\tmeta l4proto {number} {of} type {} {of} code {} return",
                            span(types),
                            span(codes)
                        );
                    }
                    Ok(())
                }
                _ => Ok(()),
            };
        }
        if matches!(*protocol, Protocol::TCP | Protocol::UDP | Protocol::SCTP) {
            let some: Vec<String> = ports
                .get(protocol)
                .into_iter()
                .flatten()
                .filter(|ports| **ports != (0, u16::MAX))
                .map(|ports| span(*ports))
                .collect();
            if !some.is_empty() {
                let _ = writeln!(body, "\t\tmeta l4proto {number} th dport {{ {} }} return", some.join(", "));
            }
        }
    }
    if rest {
        let but: Vec<String> = named.iter().map(|protocol| protocol.0.to_string()).collect();
        let _ = writeln!(body, "\t\tmeta l4proto != {{ {} }} return", but.join(", "));
    }
    body + "\t\tdrop\n"
}

fn span<T: PartialEq + std::fmt::Display>((first, last): (T, T)) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

type Octets = (u8, u8);

/// An interval of `type * 256 + code` as pairs of intervals of types and of codes.
fn rectangles(first: u16, last: u16) -> Vec<(Octets, Octets)> {
    let ([from, low], [to, high]) = (first.to_be_bytes(), last.to_be_bytes());
    if from == to {
        return vec![((from, from), (low, high))];
    }
    let mut found = Vec::new();
    let (mut begin, mut end) = (from, to);
    if low > 0 {
        found.push(((from, from), (low, u8::MAX)));
        begin += 1;
    }
    if high < u8::MAX {
        found.push(((to, to), (0, high)));
        end -= 1;
    }
    if begin <= end {
        found.push(((begin, end), (0, u8::MAX)));
    }
    found
}

fn family(is_ipv4: bool) -> (&'static str, &'static str) {
    if is_ipv4 { ("ip", "ipv4_addr") } else { ("ip6", "ipv6_addr") }
}

/// All addresses of a family in ascending, disjoint intervals with a local id other than 0; neighbours differ.
fn intervals(table: &AddressTable, is_ipv4: bool, local: impl Fn(ClassId) -> u16) -> Vec<(IpAddr, IpAddr, u16)> {
    let end = if is_ipv4 { u128::from(u32::MAX) } else { u128::MAX };
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    let address = |number: u128| match u32::try_from(number) {
        Ok(bits) if is_ipv4 => IpAddr::V4(Ipv4Addr::from_bits(bits)),
        _ => IpAddr::V6(Ipv6Addr::from_bits(number)),
    };
    let singles = table.exact().keys().map(|address| (*address, *address));
    let blocks = table.prefixes().keys().map(|prefix| (prefix.network(), prefix.broadcast()));
    let mut starts: BTreeSet<u128> = [0].into();
    for (first, last) in singles.chain(blocks).filter(|(first, _)| first.is_ipv4() == is_ipv4) {
        starts.insert(number(first));
        starts.extend(number(last).checked_add(1).filter(|next| *next <= end));
    }
    let mut found: Vec<(IpAddr, IpAddr, u16)> = Vec::new();
    let lasts = starts.iter().skip(1).map(|next| next - 1).chain([end]);
    for (first, last) in starts.iter().zip(lasts) {
        let id = local(table.lookup(address(*first)));
        match found.last_mut() {
            Some((_, until, of)) if *of == id => *until = address(last),
            _ => found.push((address(*first), address(last), id)),
        }
    }
    found.retain(|(_, _, local)| *local != 0);
    found
}

const PROLOGUE: &str = "\t\tct state established,related return\n\t\tct state invalid drop\n\
                        \t\tip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } return\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_codes_are_split_exactly() {
        for (first, last) in [(0, 0xffff), (0x800, 0x800), (0x801, 0xa03), (0x800, 0xaff), (0x8ff, 0x900), (1, 0xfffe)]
        {
            let parts = rectangles(first, last);
            let inside = |value: u16| {
                let [kind, code] = value.to_be_bytes();
                parts.iter().filter(|((a, b), (c, d))| (*a..=*b).contains(&kind) && (*c..=*d).contains(&code)).count()
            };
            let wrong = (0..=u16::MAX).find(|value| inside(*value) != usize::from((first..=last).contains(value)));
            assert_eq!(wrong, None, "{first:#x} to {last:#x}: {parts:?}");
        }
    }
}
