//! What a network namespace looks like, to compare before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::Ipv6Addr;
use std::path::Path;

use ipnet::{IpNet, Ipv6Net};

use crate::netlink::{Attributes, Family, LinkView, Message, NeighbourView, NetlinkError, RouteView, Socket};
use crate::netns::NetNs;

/// Everything configured in a network namespace, one line of text per object: links, addresses, routes, rules,
/// permanent neighbours, queueing disciplines and filters, and some of the settings below `/proc/sys/net`. What comes and goes by itself is left out: learnt
/// neighbours, counters, carrier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState(BTreeSet<String>);

impl HostState {
    /// Reads the state of a namespace.
    ///
    /// # Panics
    /// Where the kernel refuses.
    pub fn capture(netns: &NetNs) -> Self {
        let mut socket = netns.socket(Family::Route).expect("a netlink socket");
        let mut lines = BTreeSet::new();
        let links = whole(socket.links());
        let names: BTreeMap<u32, String> = links.iter().map(|l| (l.index.get(), l.name.clone())).collect();
        let name = |index: u32| names.get(&index).cloned().unwrap_or_else(|| format!("#{index}"));
        for link in &links {
            let LinkView {
                index,
                name: own,
                kind,
                mac,
                mtu,
                flags,
                alias,
                master,
                peer: _,
                peer_netns: _,
                tx_queue_len,
                port,
                vlans,
                vlan,
            } = link;
            let configured = flags & (libc::IFF_UP | libc::IFF_NOARP | libc::IFF_PROMISC | libc::IFF_ALLMULTI) as u32;
            lines.insert(format!(
                "link {own} #{index} kind {kind:?} mac {mac:?} mtu {mtu} flags {configured:#x} alias {alias:?} \
                 queue {tx_queue_len} master {:?} port {port:?} vlans {vlans:?} vlan {vlan:?}",
                master.map(|m| name(m.get()))
            ));
        }
        for a in whole(socket.addresses()) {
            lines.insert(format!(
                "address {} {} scope {} flags {:#x}",
                name(a.index.get()),
                a.address,
                a.scope,
                a.flags
            ));
        }
        for route in whole(socket.routes()) {
            let RouteView {
                destination,
                gateway,
                link,
                table,
                protocol,
                scope,
                kind,
                metric,
                source,
                on_link,
                metrics,
                unread,
            } = route;
            let follows = destination == IPV6_MULTICAST
                || matches!(destination, IpNet::V6(_)) && table == u32::from(libc::RT_TABLE_LOCAL);
            if protocol == libc::RTPROT_KERNEL && follows {
                // These follow the carrier and the addresses of each link, some time after them.
                continue;
            }
            let link = link.map(|l| name(l.get()));
            lines.insert(format!(
                "route {destination} via {gateway:?} dev {link:?} table {table} protocol {protocol} scope {scope} \
                 type {kind} metric {metric} src {source:?} on link {on_link} {metrics:?} {unread:?}"
            ));
        }
        for rule in whole(socket.rules()) {
            lines.insert(format!("rule {rule:?}"));
        }
        for n in whole(socket.neighbours()).into_iter().filter(NeighbourView::is_permanent) {
            lines.insert(format!("neighbour {} {} mac {:?}", name(n.index.get()), n.address, n.mac));
        }
        for link in &links {
            for line in traffic_control(&mut socket, link.index.get()) {
                lines.insert(format!("tc {} {line}", link.name));
            }
        }
        let on_links = links.iter().map(|link| format!("ipv4/conf/{}/route_localnet", link.name));
        let settings = SETTINGS.iter().map(|name| (*name).to_owned()).chain(on_links);
        let read = |name: String| {
            // One of a link that has gone meanwhile.
            let value = std::fs::read_to_string(Path::new("/proc/sys/net").join(&name)).ok()?;
            Some(format!("setting {name} {}", value.trim()))
        };
        lines.extend(netns.run_here_or_there(|| settings.filter_map(read).collect::<Vec<_>>()).expect("to enter"));
        Self(lines)
    }

    /// What differs in `after`, a line each: `- ` is gone, `+ ` is new. Empty where nothing does.
    pub fn diff(&self, after: &Self) -> String {
        let mut text = String::new();
        for gone in self.0.difference(&after.0) {
            let _ = writeln!(text, "- {gone}");
        }
        for new in after.0.difference(&self.0) {
            let _ = writeln!(text, "+ {new}");
        }
        text
    }

    /// The lines.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Settings of a whole namespace, which tests change.
const SETTINGS: [&str; 3] = ["core/somaxconn", "ipv4/ip_local_port_range", "ipv4/conf/default/rp_filter"];

fn whole<T>(list: Result<Vec<T>, NetlinkError>) -> Vec<T> {
    list.unwrap_or_else(|error| panic!("{error}"))
}

/// Queueing disciplines of a link, and filters at the hooks where classifiers sit.
fn traffic_control(socket: &mut Socket, index: u32) -> Vec<String> {
    let header = |parent: u32| {
        let mut header = [0; TC_HEADER];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[12..16].copy_from_slice(&parent.to_ne_bytes());
        header
    };
    let line = |what: &str, payload: &[u8]| {
        let word = |at: usize| payload.get(at..at + 4).map_or(0, |w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
        // A dump of disciplines is of all links. One without a handle is the kernel's own default.
        (word(4) == index && word(8) != 0).then(|| {
            let kind = payload.get(TC_HEADER..).and_then(|a| Attributes::new(a).find(libc::TCA_KIND));
            let kind = kind.map(|k| String::from_utf8_lossy(k).trim_end_matches('\0').to_owned());
            format!(
                "{what} {} handle {:#x} parent {:#x} info {:#x}",
                kind.unwrap_or_default(),
                word(8),
                word(12),
                word(16)
            )
        })
    };
    let disciplines = Message::new(libc::RTM_GETQDISC, 0, "list queueing disciplines", &header(0));
    let mut lines: Vec<String> = socket
        .dump(&disciplines)
        .unwrap_or_else(|e| panic!("{e}"))
        .iter()
        .filter_map(|r| line("qdisc", &r.payload))
        .collect();
    if lines.iter().any(|l| l.contains("clsact") || l.contains("ingress")) {
        for parent in [CLSACT_INGRESS, CLSACT_EGRESS] {
            let filters = Message::new(libc::RTM_GETTFILTER, 0, "list filters", &header(parent));
            // An ingress discipline has no egress hook.
            let filters = socket.dump(&filters).unwrap_or_default();
            lines.extend(filters.iter().filter_map(|r| line("filter", &r.payload)));
        }
    }
    lines
}

/// `ff00::/8`.
const IPV6_MULTICAST: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8));
/// `sizeof(struct tcmsg)`.
const TC_HEADER: usize = 20;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
const CLSACT_EGRESS: u32 = 0xffff_fff3;
