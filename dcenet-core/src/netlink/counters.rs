//! What links and virtual functions have counted (`IFLA_STATS64` and `IFLA_VF_STATS` of `include/uapi/linux/if_link.h`).

use super::detail::LinkDetail;
use super::link::{HEADER, header};
use super::message::{Attributes, Message, field};
use super::vf::{RTEXT_FILTER_VF, number_of, walk};
use super::{NetlinkError, Socket, VfListError};
use crate::model::IfIndex;

/// What went one way since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that were dropped.
    pub dropped: u64,
}

/// What a device counted, as itself sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkCounters {
    /// What it received.
    pub received: Traffic,
    /// What it sent.
    pub sent: Traffic,
}

impl Socket {
    /// What a physical function's driver counted of its virtual functions, with their numbers, which rise. A driver that does not
    /// count is not told from one that has nothing to count: the kernel presets zeros (`rtnl_fill_vfinfo` in
    /// net/core/rtnetlink.c).
    ///
    /// The kernel asks the driver for each, under the lock of all links.
    ///
    /// # Errors
    /// As of [`vfs`](Self::vfs).
    ///
    /// # Minimum kernel version
    /// 4.2; 4.18 for what was dropped.
    pub fn vf_counters(&mut self, link: IfIndex) -> Result<Vec<(u32, LinkCounters)>, VfListError> {
        let operation = format!("read counters of virtual functions of link {link}");
        let mut message = Message::new(libc::RTM_GETLINK, 0, operation, &header(link.get(), 0, 0));
        message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_VF);
        let replies = self.request_large(&message)?;
        let Some(reply) = replies.iter().find(|reply| reply.kind == libc::RTM_NEWLINK) else { return Ok(Vec::new()) };
        walk(&reply.payload, of_function).map_err(|(wanted, found)| VfListError::Incomplete { link, wanted, found })
    }

    /// All links, with what they counted.
    pub fn link_counters(&mut self) -> Result<Vec<(LinkDetail, LinkCounters)>, NetlinkError> {
        let message = Message::new(libc::RTM_GETLINK, 0, "read counters of links", &header(0, 0, 0));
        let replies = self.dump(&message)?;
        let of = |payload: &[u8]| Some((LinkDetail::parse(payload)?, of_link(payload)?));
        Ok(replies.iter().filter_map(|reply| of(&reply.payload)).collect())
    }
}

fn of_function(info: &[u8]) -> Option<(u32, LinkCounters)> {
    let attributes = Attributes::new(info);
    let counted = Attributes::new(attributes.find(IFLA_VF_STATS).unwrap_or_default());
    let count = |kind| counted.find(kind).and_then(|content| field(content, 0)).map_or(0, u64::from_ne_bytes);
    let traffic = |[packets, bytes, dropped]: [u16; 3]| Traffic {
        packets: count(packets),
        bytes: count(bytes),
        dropped: count(dropped),
    };
    Some((number_of(&attributes)?, LinkCounters { received: traffic(RECEIVED), sent: traffic(SENT) }))
}

/// `struct rtnl_link_stats64`.
fn of_link(payload: &[u8]) -> Option<LinkCounters> {
    let counted = Attributes::new(payload.get(HEADER..)?).find(IFLA_STATS64)?;
    let count = |place: usize| field(counted, place * 8).map(u64::from_ne_bytes);
    let traffic =
        |first: usize| Some(Traffic { packets: count(first)?, bytes: count(first + 2)?, dropped: count(first + 6)? });
    Some(LinkCounters { received: traffic(0)?, sent: traffic(1)? })
}

const IFLA_STATS64: u16 = 23;
const IFLA_VF_STATS: u16 = 8;
/// `IFLA_VF_STATS_RX_PACKETS`, `_RX_BYTES`, `_RX_DROPPED`.
const RECEIVED: [u16; 3] = [0, 2, 7];
/// The same of `_TX_`.
const SENT: [u16; 3] = [1, 3, 8];

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable;
    use netlink_packet_route::link::{LinkAttribute, LinkVfInfo, VfInfo, VfInfoMac, VfStats};

    use super::*;

    /// As another library writes it.
    #[test]
    fn counters_of_functions_are_read_by_their_kinds() {
        let function = |n: u32| {
            let counted = u64::from(n) * 10;
            let stats = vec![
                VfStats::RxPackets(counted + 1),
                VfStats::TxPackets(counted + 2),
                VfStats::RxBytes(counted + 3),
                VfStats::TxBytes(u64::MAX),
                VfStats::Broadcast(99),
                VfStats::Multicast(99),
                VfStats::RxDropped(counted + 5),
                VfStats::TxDropped(counted + 6),
            ];
            LinkVfInfo(vec![VfInfo::Mac(VfInfoMac::new(n, &[2, 0, 0, 0, 0, 1])), VfInfo::Stats(stats)])
        };
        let mut payload = vec![0; HEADER];
        for attribute in [LinkAttribute::NumVf(2), LinkAttribute::VfInfoList(vec![function(0), function(1)])] {
            let start = payload.len();
            payload.resize(start + attribute.buffer_len(), 0);
            attribute.emit(&mut payload[start..]);
        }
        let expected = |n: u32| {
            let counted = u64::from(n) * 10;
            LinkCounters {
                received: Traffic { packets: counted + 1, bytes: counted + 3, dropped: counted + 5 },
                sent: Traffic { packets: counted + 2, bytes: u64::MAX, dropped: counted + 6 },
            }
        };
        assert_eq!(walk(&payload, of_function), Ok(vec![(0, expected(0)), (1, expected(1))]));
    }

    #[test]
    fn a_link_says_what_it_counted() {
        use crate::test_support::{Rung, TestHost, ping, require};
        if !require(Rung::Netns) {
            return;
        }
        let host = TestHost::new();
        let netns = host.new_pod();
        netns.sh("ip link set lo up");
        let mut socket = netns.run(|| Socket::open_here(super::super::Family::Route)).unwrap();
        let mut lo = || {
            let all = socket.link_counters().unwrap();
            all.into_iter().find_map(|(detail, counters)| (detail.link.name == "lo").then_some(counters)).unwrap()
        };
        let before = lo();
        ping(&netns, "127.0.0.1".parse().unwrap(), std::time::Duration::from_secs(20)).unwrap();
        let after = lo();
        // What it sends it receives: a request and an answer at the least.
        assert!(after.sent.packets >= before.sent.packets + 2, "{before:?} {after:?}");
        assert_eq!((after.sent.packets, after.sent.bytes), (after.received.packets, after.received.bytes));
        assert!(after.sent.bytes >= before.sent.bytes + 2 * 28, "{before:?} {after:?}");
    }
}
