//! Helpers that send packets elsewhere, or ask where to.

use super::helpers::{EINVAL, errno};
use super::machine::Machine;
use super::packet::Packet;
use super::trap::TrapKind;
use super::xdp::XdpAction;
use super::{Redirect, SentClone};
use crate::insn::{Helper, Reg};

/// The neighbour that `bpf_fib_lookup` finds for every packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// `ifindex`: the device that leads there.
    pub ifindex: u32,
    /// `smac`: the device's address.
    pub source_mac: [u8; 6],
    /// `dmac`: the neighbour's address.
    pub destination_mac: [u8; 6],
    /// `rt_metric`: the route's metric, which takes the place of type of service or flow label.
    pub metric: u32,
}

const BPF_F_INGRESS: u64 = 1;

impl Machine<'_, '_> {
    /// `bpf_redirect(ifindex, flags)`; XDP has no flags, and results of its own.
    pub(super) fn redirect_to(&mut self) -> Result<u64, TrapKind> {
        const TC_ACT_SHOT: u64 = 2;
        const TC_ACT_REDIRECT: u64 = 7;
        let (ifindex, flags) = (self.number(Reg::R1)? as u32, self.number(Reg::R2)?);
        let (known, refused, done) = match self.packet {
            Packet::Xdp(_) => (0, XdpAction::Aborted as u64, XdpAction::Redirect as u64),
            Packet::Skb(_) => (BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_REDIRECT),
        };
        if flags & !known != 0 {
            return Ok(refused);
        }
        self.redirect = Some(Redirect { ifindex, ingress: flags == BPF_F_INGRESS });
        Ok(done)
    }

    /// `bpf_clone_redirect(skb, ifindex, flags)`.
    pub(super) fn clone_redirect(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let (ifindex, flags) = (self.number(Reg::R2)? as u32, self.number(Reg::R3)?);
        self.epoch += 1;
        let bytes = self.skb(Helper::CloneRedirect)?.packet.len();
        if flags & !BPF_F_INGRESS != 0 || !self.env.devices.contains(&ifindex) {
            return Ok(errno(EINVAL));
        }
        const MAX_CLONED: usize = 64 << 20;
        // What is kept of an empty one takes room too.
        self.cloned += bytes + size_of::<SentClone>();
        if self.cloned > MAX_CLONED {
            return Err(TrapKind::Clones);
        }
        let packet = self.skb(Helper::CloneRedirect)?.packet.clone();
        let redirect = Redirect { ifindex, ingress: flags == BPF_F_INGRESS };
        self.env.clones.push(SentClone { redirect, packet });
        Ok(0)
    }

    /// `bpf_fib_lookup(ctx, params, size, flags)`, with the flags of Linux 6.10; earlier ones refuse some.
    pub(super) fn fib_lookup(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let params = self.outside_packet(Reg::R2)?;
        let len = self.length(Reg::R3)?;
        let flags = self.number(Reg::R4)? as u32;
        // struct bpf_fib_lookup (include/uapi/linux/bpf.h).
        const BYTES: usize = 64;
        const IFINDEX: usize = 8;
        const VLAN: usize = 48;
        const SOURCE_MAC: usize = 52;
        const DESTINATION_MAC: usize = 58;
        const METRIC: usize = 12;
        const FLAGS: u32 = 0x3f;
        const SKIP_NEIGH: u32 = 4;
        // BPF_FIB_LOOKUP_TBID, _SRC and _MARK, with which more is read or written.
        const NOT_SIMULATED: u32 = 0x38;
        const FAMILIES: [u8; 2] = [2, 10];
        const NOT_FWDED: u64 = 4;
        const ENODEV: i32 = 19;
        const EAFNOSUPPORT: i32 = 97;
        // All of it must be written, whatever comes of it.
        let given = self.bytes(params, len)?.to_vec();
        if len < BYTES || flags & !FLAGS != 0 {
            return Ok(errno(EINVAL));
        }
        if flags & NOT_SIMULATED != 0 {
            return Err(TrapKind::Argument { argument: 4, reason: "no flags but DIRECT, OUTPUT and SKIP_NEIGH" });
        }
        if !FAMILIES.contains(&given[0]) {
            return Ok(errno(EAFNOSUPPORT));
        }
        let ifindex = u32::from_le_bytes([given[IFINDEX], given[IFINDEX + 1], given[IFINDEX + 2], given[IFINDEX + 3]]);
        if !self.env.devices.contains(&ifindex) {
            return Ok(errno(ENODEV));
        }
        let Some(route) = self.env.route else { return Ok(NOT_FWDED) };
        let found = self.bytes_mut(params, BYTES)?;
        found[IFINDEX..IFINDEX + 4].copy_from_slice(&route.ifindex.to_le_bytes());
        found[VLAN..SOURCE_MAC].fill(0);
        found[METRIC..METRIC + 4].copy_from_slice(&route.metric.to_le_bytes());
        if flags & SKIP_NEIGH == 0 {
            found[SOURCE_MAC..DESTINATION_MAC].copy_from_slice(&route.source_mac);
            found[DESTINATION_MAC..BYTES].copy_from_slice(&route.destination_mac);
        }
        Ok(0)
    }
}
