//! VLANs of bridges: which are kept apart, and who is in them (`net/bridge/br_vlan.c`, `br_netlink.c`).

use std::ops::RangeInclusive;

use super::link::{HEADER, NESTED, header, new_link};
use super::message::{Attributes, Message, field, text};
use super::{NetlinkError, Socket};
use crate::model::{IfIndex, IfName, VlanId, VlanRange};
use crate::plan::Tagging;

/// What a bridge does with VLANs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BridgeVlans {
    /// Whether it keeps them apart.
    pub filtering: bool,
    /// That of ports of which nobody says another; `None` where they get none.
    pub default: Option<VlanId>,
}

impl BridgeVlans {
    /// `None` where the link is no bridge, or the kernel was built without: then it tells no default
    /// (`br_fill_info` of `net/bridge/br_netlink.c`).
    pub(super) fn parse(info: &[u8]) -> Option<Self> {
        let info = Attributes::new(info);
        info.find(libc::IFLA_INFO_KIND).map(text).filter(|kind| kind == "bridge")?;
        let data = Attributes::new(info.find(libc::IFLA_INFO_DATA)?);
        let default = field(data.find(IFLA_BR_VLAN_DEFAULT_PVID)?, 0).map(u16::from_ne_bytes)?;
        let filtering = data.find(IFLA_BR_VLAN_FILTERING)?.first().is_some_and(|value| *value != 0);
        Some(Self { filtering, default: VlanId::try_from(default).ok() })
    }
}

/// The VLANs of a port of a bridge, or of the bridge's own end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortVlans {
    /// The port, or the bridge.
    pub index: IfIndex,
    vlans: Vec<Membership>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Membership {
    ids: RangeInclusive<u16>,
    flags: u16,
}

impl PortVlans {
    /// Reads a `RTM_NEWLINK` payload of the family `AF_BRIDGE`.
    pub(super) fn parse(payload: &[u8]) -> Option<Self> {
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let mut port = Self { index: IfIndex::new(u32::from_ne_bytes(field(payload, 4)?))?, vlans: Vec::new() };
        let mut first = None;
        for (kind, info) in Attributes::new(attributes.find(libc::IFLA_AF_SPEC)?) {
            // `struct bridge_vlan_info`.
            let (Some(flags), Some(id)) =
                (field(info, 0).map(u16::from_ne_bytes), field(info, 2).map(u16::from_ne_bytes))
            else {
                continue;
            };
            match flags {
                _ if kind != IFLA_BRIDGE_VLAN_INFO => {}
                _ if flags & RANGE_BEGIN != 0 => first = Some(id),
                _ => {
                    let begin = if flags & RANGE_END != 0 { first.take().unwrap_or(id) } else { id };
                    port.vlans.push(Membership { ids: begin..=id, flags });
                }
            }
        }
        Some(port)
    }

    /// Whether it is in the VLAN.
    pub fn is_in(&self, vlan: VlanId) -> bool {
        self.vlans.iter().any(|member| member.ids.contains(&vlan.get()))
    }

    /// Whether frames of all these VLANs leave by it, as they are to: without a tag, or with one.
    pub fn has(&self, vlans: VlanRange, untagged: bool) -> bool {
        let wanted = if untagged { PVID | UNTAGGED } else { 0 };
        vlans.ids().all(|id| {
            let fits = |member: &Membership| member.ids.contains(&id) && member.flags & (PVID | UNTAGGED) == wanted;
            self.vlans.iter().any(fits)
        })
    }
}

impl Socket {
    /// The VLANs of all ports of bridges, and of the bridges' own ends.
    pub fn port_vlans(&mut self) -> Result<Vec<PortVlans>, NetlinkError> {
        let mut message = Message::new(libc::RTM_GETLINK, 0, "list VLANs of bridges", &of_bridge(0));
        message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_BRVLAN_COMPRESSED);
        Ok(self.dump(&message)?.iter().filter_map(|reply| PortVlans::parse(&reply.payload)).collect())
    }
}

/// Has a bridge keep VLANs apart, or not.
pub(crate) fn filter_vlans(bridge: &IfName, index: IfIndex, on: bool) -> Message {
    let what = if on { "keep VLANs apart" } else { "keep no VLANs apart" };
    let mut message = new_link(0, format!("configure bridge {bridge}: {what}"), &header(index.get(), 0, 0));
    message.nest(libc::IFLA_LINKINFO, |info| {
        info.text(libc::IFLA_INFO_KIND, "bridge");
        write_filtering(info, on);
    });
    message
}

/// Within `IFLA_LINKINFO` of a bridge.
pub(super) fn write_filtering(info: &mut Message, on: bool) {
    info.nest(libc::IFLA_INFO_DATA, |data| {
        data.u8(IFLA_BR_VLAN_FILTERING, u8::from(on));
    });
}

/// Puts a port, or the bridge's own end, into VLANs. `EOPNOTSUPP` where the kernel was built without.
pub(crate) fn add_vlans(link: &IfName, index: IfIndex, vlans: VlanRange, tagging: Tagging) -> Message {
    let mut message =
        Message::new(libc::RTM_SETLINK, 0, format!("put {link} into VLAN {vlans}"), &of_bridge(index.get()));
    message.nest(libc::IFLA_AF_SPEC | NESTED, |spec| {
        if tagging == Tagging::Own {
            spec.bytes(IFLA_BRIDGE_FLAGS, &BRIDGE_FLAGS_SELF.to_ne_bytes());
        }
        let flags = if tagging == Tagging::Untagged { PVID | UNTAGGED } else { 0 };
        let (first, last) = (vlans.first().get(), vlans.last().get());
        if first == last {
            vlan_info(spec, flags, first);
        } else {
            vlan_info(spec, flags | RANGE_BEGIN, first);
            vlan_info(spec, flags | RANGE_END, last);
        }
    });
    message
}

/// Takes a port, or the bridge's own end, out of a VLAN. [`NO_VLAN`] where it was not in it.
pub(crate) fn delete_vlan(link: &IfName, index: IfIndex, vlan: VlanId, own: bool) -> Message {
    let mut message =
        Message::new(libc::RTM_DELLINK, 0, format!("take {link} out of VLAN {vlan}"), &of_bridge(index.get()));
    message.nest(libc::IFLA_AF_SPEC | NESTED, |spec| {
        if own {
            spec.bytes(IFLA_BRIDGE_FLAGS, &BRIDGE_FLAGS_SELF.to_ne_bytes());
        }
        vlan_info(spec, 0, vlan.get());
    });
    message
}

/// `struct bridge_vlan_info`.
fn vlan_info(spec: &mut Message, flags: u16, id: u16) {
    let mut info = [0; 4];
    info[..2].copy_from_slice(&flags.to_ne_bytes());
    info[2..].copy_from_slice(&id.to_ne_bytes());
    spec.bytes(IFLA_BRIDGE_VLAN_INFO, &info);
}

fn of_bridge(index: u32) -> [u8; HEADER] {
    let mut head = header(index, 0, 0);
    head[0] = libc::AF_BRIDGE as u8;
    head
}

/// It was not in the VLAN, or there is no such link, or the kernel has none.
pub(crate) const NO_VLAN: &[i32] = &[libc::ENOENT, libc::ENODEV, libc::EOPNOTSUPP];
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_DEFAULT_PVID: u16 = 39;
const IFLA_BRIDGE_FLAGS: u16 = 0;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
const BRIDGE_FLAGS_SELF: u16 = 2;
const PVID: u16 = 1 << 1;
const UNTAGGED: u16 = 1 << 2;
const RANGE_BEGIN: u16 = 1 << 3;
const RANGE_END: u16 = 1 << 4;
const RTEXT_FILTER_BRVLAN_COMPRESSED: u32 = 1 << 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::link::create_bridge;

    fn vlan(id: u16) -> VlanId {
        id.try_into().unwrap()
    }

    /// What iproute2 6.1 sent, by strace(1), behind the header of the message: ours says that what is nested is.
    #[test]
    fn messages_are_those_of_iproute2() {
        let (dc1, br0) =
            (("dc1".parse().unwrap(), IfIndex::new(4).unwrap()), ("br0".parse().unwrap(), IfIndex::new(2).unwrap()));
        let range = VlanRange::new(vlan(100), vlan(199)).unwrap();
        for (command, ours, theirs) in [
            (
                "bridge vlan add dev dc1 vid 10 pvid untagged",
                add_vlans(&dc1.0, dc1.1, vlan(10).into(), Tagging::Untagged),
                "070000000400000000000000000000000c001a000800020006000a00",
            ),
            (
                "bridge vlan add dev dc1 vid 100-199",
                add_vlans(&dc1.0, dc1.1, range, Tagging::Tagged),
                "0700000004000000000000000000000014001a00080002000800640008000200\
                 1000c700",
            ),
            (
                "bridge vlan add dev br0 vid 10 self",
                add_vlans(&br0.0, br0.1, vlan(10).into(), Tagging::Own),
                "0700000002000000000000000000000014001a00060000000200000008000200\
                 00000a00",
            ),
            (
                "bridge vlan del dev dc1 vid 1",
                delete_vlan(&dc1.0, dc1.1, vlan(1), false),
                "070000000400000000000000000000000c001a000800020000000100",
            ),
            (
                "ip link set br0 type bridge vlan_filtering 1",
                filter_vlans(&br0.0, br0.1, true),
                "000000000200000000000000000000001c0012000a0001006272696467650000\
                 0c0002000500070001000000",
            ),
        ] {
            let mut bytes = Vec::new();
            ours.encode(1, 0, &mut bytes);
            let ours: String = bytes[16..].iter().map(|byte| format!("{byte:02x}")).collect();
            // And what is text ends with a NUL, where iproute2 has the first byte of padding.
            let ours = ours.replace("001a80", "001a00").replace("0b000100627269646765", "0a000100627269646765");
            assert_eq!(ours, theirs, "{command}");
        }
        let made = create_bridge(&br0.0, crate::model::MacAddr::new([2, 0, 0, 0, 0, 9]), None, true);
        let mut bytes = Vec::new();
        made.encode(1, 0, &mut bytes);
        assert!(bytes.ends_with(&[12, 0, 2, 0, 5, 0, 7, 0, 1, 0, 0, 0]), "{bytes:?}");
    }

    #[test]
    fn memberships_are_read_with_their_ranges() {
        let mut reply = of_bridge(4).to_vec();
        let mut message = Message::new(libc::RTM_NEWLINK, 0, "", &[]);
        message.u32(libc::IFLA_MASTER, 2);
        message.nest(libc::IFLA_AF_SPEC, |spec| {
            vlan_info(spec, PVID | UNTAGGED, 10);
            vlan_info(spec, RANGE_BEGIN, 100);
            vlan_info(spec, RANGE_END, 199);
        });
        let mut bytes = Vec::new();
        message.encode(1, 0, &mut bytes);
        reply.extend(&bytes[16..]);
        let port = PortVlans::parse(&reply).unwrap();
        assert_eq!(port.index.get(), 4);
        let range = |first, last| VlanRange::new(vlan(first), vlan(last)).unwrap();
        assert!(port.has(range(10, 10), true) && !port.has(range(10, 10), false));
        assert!(
            port.has(range(100, 199), false) && !port.has(range(100, 200), false) && !port.has(range(150, 150), true)
        );
        assert!(port.is_in(vlan(199)) && !port.is_in(vlan(11)));
        assert_eq!(PortVlans::parse(&reply[..20]), None);
    }
}
