//! The context of classifiers, `struct __sk_buff`.

/// A packet and what the kernel knows of it, as a classifier sees it (`struct __sk_buff`, `include/uapi/linux/bpf.h`).
/// Fields that are not here, and accesses that the kernel's `tc_cls_act_is_valid_access` refuses, trap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skb {
    /// The frame, from the Ethernet header on.
    pub packet: Vec<u8>,
    /// How many bytes can be reached by address (up to `data_end`); the rest needs `bpf_skb_load_bytes` or
    /// `bpf_skb_pull_data`. More than the packet has means all of it.
    pub linear: usize,
    /// `pkt_type`: 0 to this host, 1 broadcast, 2 multicast, 3 to another host, 4 outgoing.
    pub pkt_type: u32,
    /// `mark`; writable.
    pub mark: u32,
    /// `queue_mapping`; writable.
    pub queue_mapping: u32,
    /// `protocol`: the EtherType as a number, 0x0800 for IPv4. Programs read it in network order.
    pub protocol: u16,
    /// `vlan_present`, `vlan_tci` and `vlan_proto`: the tag that the device took off, and its EtherType.
    pub vlan: Option<Vlan>,
    /// `priority`; writable.
    pub priority: u32,
    /// `ingress_ifindex`: where it came in, 0 if it was made here.
    pub ingress_ifindex: u32,
    /// `ifindex`: the device whose hook runs.
    pub ifindex: u32,
    /// `tc_index`; writable.
    pub tc_index: u32,
    /// `cb`: room for programs; writable.
    pub cb: [u32; 5],
    /// `hash`.
    pub hash: u32,
    /// `tc_classid`; writable.
    pub tc_classid: u32,
    /// `tstamp` in nanoseconds; writable.
    pub tstamp: u64,
}

/// A VLAN tag beside the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vlan {
    /// Priority, drop eligibility and id.
    pub tci: u16,
    /// EtherType of the tag, 0x8100 or 0x88a8.
    pub proto: u16,
}

impl Skb {
    /// A linear packet on a device of index 1 whose MAC address is zero, its protocol and type read from the Ethernet
    /// header, all else zero: what `BPF_PROG_TEST_RUN` makes. It takes the loopback device, to which a broadcast is just
    /// another multicast.
    pub fn new(packet: impl Into<Vec<u8>>) -> Self {
        let packet = packet.into();
        let protocol = packet.get(12..14).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        let pkt_type = match packet.get(..6) {
            None | Some([0, 0, 0, 0, 0, 0]) => PACKET_HOST,
            Some(mac) if mac[0] & 1 == 1 => PACKET_MULTICAST,
            Some(_) => PACKET_OTHERHOST,
        };
        Self {
            packet,
            linear: usize::MAX,
            pkt_type,
            mark: 0,
            queue_mapping: 0,
            protocol,
            vlan: None,
            priority: 0,
            ingress_ifindex: 0,
            ifindex: 1,
            tc_index: 0,
            cb: [0; 5],
            hash: 0,
            tc_classid: 0,
            tstamp: 0,
        }
    }

    pub(super) fn linear_len(&self) -> usize {
        self.linear.min(self.packet.len())
    }

    /// The context as the program reads it, but for addresses.
    pub(super) fn to_context(&self) -> [u8; CONTEXT_BYTES] {
        let Self {
            packet,
            linear: _,
            pkt_type,
            mark,
            queue_mapping,
            protocol,
            vlan,
            priority,
            ingress_ifindex,
            ifindex,
            tc_index,
            cb,
            hash,
            tc_classid,
            tstamp,
        } = self;
        let network = |value: u16| u32::from(value.to_be());
        let words = [
            (LEN, packet.len() as u32),
            (PKT_TYPE, *pkt_type),
            (MARK, *mark),
            (QUEUE_MAPPING, *queue_mapping),
            (PROTOCOL, network(*protocol)),
            (VLAN_PRESENT, u32::from(vlan.is_some())),
            (VLAN_TCI, vlan.map_or(0, |v| u32::from(v.tci))),
            (VLAN_PROTO, vlan.map_or(0, |v| network(v.proto))),
            (PRIORITY, *priority),
            (INGRESS_IFINDEX, *ingress_ifindex),
            (IFINDEX, *ifindex),
            (TC_INDEX, *tc_index),
            (CB, cb[0]),
            (CB + 4, cb[1]),
            (CB + 8, cb[2]),
            (CB + 12, cb[3]),
            (CB + 16, cb[4]),
            (HASH, *hash),
            (TC_CLASSID, *tc_classid),
        ];
        let mut bytes = [0; CONTEXT_BYTES];
        for (at, value) in words {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[TSTAMP..TSTAMP + 8].copy_from_slice(&tstamp.to_le_bytes());
        bytes
    }

    /// Takes over what the program wrote.
    pub(super) fn take_context(&mut self, bytes: &[u8; CONTEXT_BYTES]) {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        self.mark = word(MARK);
        self.queue_mapping = word(QUEUE_MAPPING);
        self.priority = word(PRIORITY);
        self.tc_index = word(TC_INDEX);
        self.tc_classid = word(TC_CLASSID);
        for (index, cb) in self.cb.iter_mut().enumerate() {
            *cb = word(CB + 4 * index);
        }
        self.tstamp = u64::from(word(TSTAMP)) | u64::from(word(TSTAMP + 4)) << 32;
    }
}

/// What a read of the context at an offset gives.
pub(super) enum Field {
    Number,
    Data,
    DataEnd,
}

/// Which reads the kernel allows: aligned, within a field; of addresses, the whole.
pub(super) fn readable(offset: usize, size: usize) -> Option<Field> {
    if !offset.is_multiple_of(size) {
        return None;
    }
    match offset {
        DATA if size == 4 => Some(Field::Data),
        DATA_END if size == 4 => Some(Field::DataEnd),
        CB..HASH if offset + size <= HASH => Some(Field::Number),
        LEN..DATA if size <= 4 => Some(Field::Number),
        TSTAMP if size == 8 => Some(Field::Number),
        _ => None,
    }
}

/// Which writes the kernel allows.
pub(super) fn writable(offset: usize, size: usize) -> bool {
    offset.is_multiple_of(size)
        && match offset {
            CB..HASH => offset + size <= HASH,
            MARK | QUEUE_MAPPING | PRIORITY | TC_INDEX | TC_CLASSID => size == 4,
            TSTAMP => size == 8,
            _ => false,
        }
}

pub(super) const CONTEXT_BYTES: usize = 192;

const PACKET_HOST: u32 = 0;
const PACKET_MULTICAST: u32 = 2;
const PACKET_OTHERHOST: u32 = 3;

const LEN: usize = 0;
const PKT_TYPE: usize = 4;
const MARK: usize = 8;
const QUEUE_MAPPING: usize = 12;
const PROTOCOL: usize = 16;
const VLAN_PRESENT: usize = 20;
const VLAN_TCI: usize = 24;
const VLAN_PROTO: usize = 28;
const PRIORITY: usize = 32;
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;
const TC_INDEX: usize = 44;
const CB: usize = 48;
const HASH: usize = 68;
const TC_CLASSID: usize = 72;
const DATA: usize = 76;
const DATA_END: usize = 80;
const TSTAMP: usize = 152;
