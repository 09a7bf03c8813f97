//! Flows for a collector, by IPFIX (RFC 7011) over UDP.
//!
//! A record is a biflow (RFC 5103): the source is the sender of the packet, or who opened the flow where no packet is told
//! of, and the counts of what went the other way follow as reverse elements. Two sets of templates, for what ends a flow or
//! tells of one under way and for the rest, each for IPv4, IPv6 and packets that were dropped before an address was read:
//!
//! | Element (IANA) | Is |
//! |---|---|
//! | sourceIPv4Address, destinationIPv4Address, or IPv6 | the addresses |
//! | sourceTransportPort, destinationTransportPort, protocolIdentifier | as in the packet |
//! | icmpTypeCodeIPv4 or icmpTypeCodeIPv6, tcpControlBits | those of the packet, 0 where there are none |
//! | flowEndMilliseconds | when the packet, or the flow's last one, was seen |
//! | flowStartMilliseconds | the same; in events about a flow's first packet or a packet of its own |
//! | flowEndReason | 1 for [`FlowKind::Ended`], 2 for [`FlowKind::Active`], 3 for [`FlowKind::Closed`] |
//! | firewallEvent | 1 created, 2 deleted, 3 denied, 5 update |
//! | forwardingStatus | 64 forwarded, 128 dropped, 129 dropped by policy |
//! | biflowDirection | 1 where the source opened the flow, 0 where that is not known |
//! | ingressInterface, egressInterface | the interface on the host, as the one by which the pod's packet came or went |
//! | packetTotalCount, octetTotalCount, and reversed | counts of the flow so far, of octets without Ethernet headers; in records with flowEndReason |
//! | virtualStationName | the pod's namespace and name, empty where it is not known |
//!
//! Counts are totals since the flow began: sum those with flowEndReason 1, which are final, and no others; those with 2 and
//! 3 are of flows that such a record will follow.
//!
//! The rule has no element of IANA's, and is left out. Losses are records of an options template: notSentFlowTotalCount
//! by exportingProcessId, of all losses since the exporter was made, its own included.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use super::{Flow, FlowEnd, FlowKind, FlowSink, Losses};
use crate::model::{Direction, Verdict};

/// How an exporter sends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct IpfixConfig {
    /// Number of the observation domain: what tells the nodes of a cluster apart at a collector that sees them behind one
    /// address. 0 says nothing (RFC 7011, section 3.1).
    pub observation_domain: u32,
    /// The largest message, in bytes, without the headers of UDP and IP; 65,507 at most. A record that is longer than this
    /// with its headers goes in a message of its own. 464 where the path's MTU is not known, which is the default: a packet
    /// of 512 over IPv6 (RFC 7011, section 10.3.3).
    pub most_bytes: u16,
    /// After how long templates are sent again, as datagrams get lost and collectors start anew (RFC 7011, section 8.4).
    /// A minute; collectors forget them after half an hour.
    pub templates_every: Duration,
}

impl Default for IpfixConfig {
    fn default() -> Self {
        Self { observation_domain: 0, most_bytes: 464, templates_every: Duration::from_secs(60) }
    }
}

/// Why there is no exporter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IpfixError {
    /// A message would have no room for a template, or a datagram of UDP none for a message.
    #[error("most_bytes is {value}: want {least} to {most}, 464 where the path's MTU is not known")]
    MostBytes {
        /// What was asked for.
        value: u16,
        /// The least.
        least: u16,
        /// The most.
        most: u16,
    },
    /// The socket cannot be made non-blocking.
    #[error("the exporter's socket cannot be made non-blocking: {0}; hand over a UDP socket that is open")]
    Blocking(#[source] io::Error),
    /// The socket has no peer.
    #[error("the exporter's socket is not connected to a collector: {0}; connect it, to port 4739 as a rule")]
    NotConnected(#[source] io::Error),
}

/// Sends flows to a collector.
///
/// Nothing fails because a collector does not listen: messages that the socket refuses are dropped, and their flows counted
/// ([`IpfixExporter::unsent`]). Whoever reads flows does not wait either: the socket is non-blocking from then on, with all
/// that share its file description.
#[derive(Debug)]
pub struct IpfixExporter {
    socket: UdpSocket,
    config: IpfixConfig,
    message: Message,
    /// Data records sent.
    sequence: u32,
    templates_at: Option<Instant>,
    /// Flows in the message that was sent last.
    last: u64,
    lost: u64,
    unsent: u64,
}

/// A message that is being gathered.
#[derive(Debug, Default)]
struct Message {
    bytes: Vec<u8>,
    /// Number and place of the set at the end.
    set: Option<(u16, usize)>,
    /// Data records in it, and how many of them are flows.
    records: u32,
    flows: u64,
}

impl IpfixExporter {
    /// Sends over a socket that is connected to the collector, in whichever network namespace that was made.
    ///
    /// # Errors
    /// See [`IpfixError`].
    pub fn new(socket: UdpSocket, config: IpfixConfig) -> Result<Self, IpfixError> {
        let least = MESSAGE_HEADER + SET_HEADER + templates().map(|t| t.len()).max().unwrap_or_default();
        let (value, least) = (config.most_bytes, least as u16);
        if !(least..=MOST_BYTES).contains(&value) {
            return Err(IpfixError::MostBytes { value, least, most: MOST_BYTES });
        }
        socket.peer_addr().map_err(IpfixError::NotConnected)?;
        socket.set_nonblocking(true).map_err(IpfixError::Blocking)?;
        let message = Message::default();
        Ok(Self { socket, config, message, sequence: 0, templates_at: None, last: 0, lost: 0, unsent: 0 })
    }

    /// Flows in messages that could not be sent, or that the collector's host has refused (ICMP port unreachable), as far
    /// as the system says. The collector is told of them, too, once it can be.
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    /// Puts a record into the message, which goes out first if there is no room.
    fn append(&mut self, set: u16, record: &[u8]) {
        let header = if self.message.set.is_some_and(|(number, _)| number == set) { 0 } else { SET_HEADER };
        if self.message.bytes.len() + header + record.len() > usize::from(self.config.most_bytes) {
            self.send();
        }
        let Message { bytes, set: open, records, .. } = &mut self.message;
        if bytes.is_empty() {
            bytes.resize(MESSAGE_HEADER, 0);
        }
        if open.is_none_or(|(number, _)| number != set) {
            *open = Some((set, bytes.len()));
            bytes.extend(set.to_be_bytes());
            bytes.extend([0; 2]);
        }
        bytes.extend(record);
        *records += u32::from(set >= FIRST_TEMPLATE);
        // The set's own length is written each time: it is the last only until another begins.
        if let Some((_, at)) = *open {
            let length = (bytes.len() - at) as u16;
            bytes[at + 2..at + 4].copy_from_slice(&length.to_be_bytes());
        }
    }

    fn send(&mut self) {
        let Message { mut bytes, records, flows, .. } = std::mem::take(&mut self.message);
        if bytes.is_empty() {
            return;
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as u32);
        let length = bytes.len() as u16;
        bytes[0..2].copy_from_slice(&VERSION.to_be_bytes());
        bytes[2..4].copy_from_slice(&length.to_be_bytes());
        bytes[4..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.config.observation_domain.to_be_bytes());
        let mut sent = self.socket.send(&bytes);
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            // That is of the message before, which nobody has read; this one was not tried.
            self.unsent = self.unsent.saturating_add(std::mem::take(&mut self.last));
            self.templates_at = None;
            sent = self.socket.send(&bytes);
        }
        match sent {
            // Datagrams go out whole.
            Ok(_) => {
                self.sequence = self.sequence.wrapping_add(records);
                self.last = flows;
            }
            Err(error) => {
                self.unsent = self.unsent.saturating_add(flows);
                // They may have been in it.
                self.templates_at = None;
                tracing::debug!(%error, flows, "a message to the IPFIX collector was not sent");
            }
        }
    }

    /// Sends templates where they are due, and with them what was lost.
    fn refresh(&mut self) {
        if self.templates_at.is_some_and(|at| at.elapsed() < self.config.templates_every) {
            return;
        }
        self.templates_at = Some(Instant::now());
        for template in templates() {
            self.append(template.set(), &template.record());
        }
        if self.lost > 0 || self.unsent > 0 {
            self.append_losses();
        }
    }

    fn append_losses(&mut self) {
        let mut record = Vec::new();
        record.extend(std::process::id().to_be_bytes());
        record.extend(milliseconds(SystemTime::now()).to_be_bytes());
        record.extend(self.lost.saturating_add(self.unsent).to_be_bytes());
        self.append(LOSSES, &record);
    }
}

impl FlowSink for IpfixExporter {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.refresh();
        let (template, record) = encode(flow, boot());
        self.append(template, &record);
        self.message.flows += 1;
        Ok(())
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.lost = self.lost.saturating_add(losses.total());
        self.refresh();
        self.append_losses();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send();
        Ok(())
    }
}

impl Drop for IpfixExporter {
    fn drop(&mut self) {
        self.send();
    }
}

/// An information element in a template: its number, its length, and whether it is reversed.
#[derive(Debug, Clone, Copy)]
struct Element(u16, u16, bool);

#[derive(Debug)]
struct Template {
    number: u16,
    /// How many elements at the beginning are the scope, for an options template.
    scope: u16,
    elements: Vec<Element>,
}

impl Template {
    /// The set that its record stands in (RFC 7011, section 3.3.2).
    fn set(&self) -> u16 {
        if self.scope == 0 { 2 } else { 3 }
    }

    fn record(&self) -> Vec<u8> {
        let Self { number, scope, elements } = self;
        let mut record = Vec::new();
        record.extend(number.to_be_bytes());
        record.extend((elements.len() as u16).to_be_bytes());
        if *scope > 0 {
            record.extend(scope.to_be_bytes());
        }
        for Element(number, length, reversed) in elements {
            record.extend((number | if *reversed { ENTERPRISE } else { 0 }).to_be_bytes());
            record.extend(length.to_be_bytes());
            if *reversed {
                record.extend(REVERSE_PEN.to_be_bytes());
            }
        }
        record
    }

    fn len(&self) -> usize {
        self.record().len()
    }
}

/// The version of IP, or that no address is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V4,
    V6,
    None,
}

fn template_number(ends: bool, version: Version) -> u16 {
    FIRST_TEMPLATE + if ends { 3 } else { 0 } + version as u16
}

/// Whether a record bears flowEndReason in the place of flowStartMilliseconds, and counts: collectors add up those of all
/// records, and more than one record would count the same packets.
fn end_reason(kind: FlowKind) -> Option<u8> {
    match kind {
        FlowKind::Ended => Some(1),
        FlowKind::Active => Some(2),
        FlowKind::Closed => Some(3),
        FlowKind::New | FlowKind::Denied | FlowKind::Sampled => None,
    }
}

fn templates() -> impl Iterator<Item = Template> {
    let own = |number, length| Element(number, length, false);
    let flows = [false, true].into_iter().flat_map(move |ends| {
        [Version::V4, Version::V6, Version::None].map(move |version| {
            let (addresses, icmp) = match version {
                Version::V4 => (vec![own(8, 4), own(12, 4)], vec![own(32, 2)]),
                Version::V6 => (vec![own(27, 16), own(28, 16)], vec![own(139, 2)]),
                Version::None => (vec![], vec![]),
            };
            let mut elements = vec![own(153, 8), if ends { own(136, 1) } else { own(152, 8) }];
            elements.extend(addresses);
            elements.extend([own(7, 2), own(11, 2), own(4, 1)]);
            elements.extend(icmp);
            elements.extend([own(6, 2), own(10, 4), own(14, 4), own(233, 1), own(89, 1), own(239, 1)]);
            for reversed in [false, true].into_iter().filter(|_| ends) {
                elements.extend([Element(86, 8, reversed), Element(85, 8, reversed)]);
            }
            elements.push(own(350, VARIABLE));
            Template { number: template_number(ends, version), scope: 0, elements }
        })
    });
    let losses = Template { number: LOSSES, scope: 1, elements: vec![own(144, 4), own(323, 8), own(166, 8)] };
    flows.chain([losses])
}

/// A flow's template and record. `boot` is when the machine's monotonic clock was 0.
fn encode(flow: &Flow, boot: SystemTime) -> (u16, Vec<u8>) {
    let Flow { kind, verdict, direction, pod, peer, protocol, .. } = flow;
    let time = boot.checked_add(Duration::from_nanos(flow.time)).map_or(0, milliseconds);
    let version = match (pod.address, peer.address) {
        (Some(IpAddr::V4(_)), Some(IpAddr::V4(_))) => Version::V4,
        (None, None) => Version::None,
        _ => Version::V6,
    };
    let (source, destination) = match direction {
        Direction::Egress => (pod, peer),
        Direction::Ingress => (peer, pod),
    };
    let mut record = Vec::with_capacity(160);
    record.extend(time.to_be_bytes());
    match end_reason(*kind) {
        Some(reason) => record.push(reason),
        None => record.extend(time.to_be_bytes()),
    }
    for end in [source, destination] {
        put_address(&mut record, version, end);
    }
    for end in [source, destination] {
        record.extend(end.port.to_be_bytes());
    }
    record.push(protocol.0);
    if version != Version::None {
        let (icmp_type, icmp_code) = flow.icmp.unwrap_or_default();
        record.extend([icmp_type, icmp_code]);
    }
    record.extend(u16::from(flow.tcp_flags.unwrap_or_default()).to_be_bytes());
    let device = flow.interface.map_or(0, |index| index.get());
    let (came_by, went_by) = match direction {
        Direction::Egress => (device, 0),
        Direction::Ingress => (0, device),
    };
    record.extend(came_by.to_be_bytes());
    record.extend(went_by.to_be_bytes());
    record.push(match kind {
        FlowKind::New => 1,
        FlowKind::Closed | FlowKind::Ended => 2,
        FlowKind::Denied => 3,
        FlowKind::Active | FlowKind::Sampled => 5,
    });
    record.push(match (verdict, flow.reason) {
        (Verdict::Allow, _) => 64,
        (Verdict::Deny, "denied" | "revoked") => 129,
        (Verdict::Deny, _) => 128,
    });
    // A FIN comes from either side, as do packets of a known flow, one that is no longer allowed among them.
    let opener = !matches!(kind, FlowKind::Closed | FlowKind::Sampled) && flow.reason != "revoked";
    record.push(u8::from(opener));
    let egress = (flow.egress_packets, flow.egress_bytes);
    let ingress = (flow.ingress_packets, flow.ingress_bytes);
    let (there, back) = match direction {
        Direction::Egress => (egress, ingress),
        Direction::Ingress => (ingress, egress),
    };
    for (packets, bytes) in [there, back].into_iter().filter(|_| end_reason(*kind).is_some()) {
        record.extend(packets.to_be_bytes());
        record.extend(bytes.saturating_sub(packets.saturating_mul(ETHERNET_HEADER)).to_be_bytes());
    }
    put_text(&mut record, &pod.workload.as_ref().map_or_else(String::new, ToString::to_string));
    (template_number(end_reason(*kind).is_some(), version), record)
}

fn put_address(record: &mut Vec<u8>, version: Version, end: &FlowEnd) {
    match (version, end.address) {
        (Version::None, _) => {}
        (Version::V4, Some(IpAddr::V4(address))) => record.extend(address.octets()),
        (_, Some(IpAddr::V4(address))) => record.extend(address.to_ipv6_mapped().octets()),
        (_, Some(IpAddr::V6(address))) => record.extend(address.octets()),
        (_, None) => record.extend([0; 16]),
    }
}

/// A string of variable length (RFC 7011, section 7).
fn put_text(record: &mut Vec<u8>, text: &str) {
    match u8::try_from(text.len()) {
        Ok(length) if length < u8::MAX => record.push(length),
        _ => {
            record.push(u8::MAX);
            record.extend((text.len() as u16).to_be_bytes());
        }
    }
    record.extend(text.as_bytes());
}

/// When the machine's monotonic clock was 0, by the clocks of now.
fn boot() -> SystemTime {
    let now = clock_gettime(ClockId::Monotonic);
    let up = Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec as u32);
    SystemTime::now().checked_sub(up).unwrap_or(UNIX_EPOCH)
}

fn milliseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

const VERSION: u16 = 10;
/// What a datagram of UDP over IPv4 has room for.
const MOST_BYTES: u16 = 65_507;
const MESSAGE_HEADER: usize = 16;
const SET_HEADER: usize = 4;
/// Numbers below are of sets of other kinds.
const FIRST_TEMPLATE: u16 = 256;
const LOSSES: u16 = FIRST_TEMPLATE + 6;
/// Set where a private enterprise number follows.
const ENTERPRISE: u16 = 1 << 15;
/// That of reverse information elements (RFC 5103, section 6.1).
const REVERSE_PEN: u32 = 29_305;
const VARIABLE: u16 = u16::MAX;
const ETHERNET_HEADER: u64 = 14;

#[cfg(test)]
mod tests;
