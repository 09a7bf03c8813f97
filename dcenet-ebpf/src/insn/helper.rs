//! Helper functions of the kernel.

use std::fmt;

macro_rules! helpers {
    ($($(#[$doc:meta])* $variant:ident = $id:literal $name:literal;)+) => {
        /// A function of the kernel that a program may call (`enum bpf_func_id`, `include/uapi/linux/bpf.h`).
        ///
        /// Arguments go in `r1` to `r5`, the result comes in `r0`; `r1` to `r5` are lost, `r6` to `r9` are kept.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum Helper { $($(#[$doc])* #[doc = concat!("\n\n`", $name, "`")] #[doc(alias = $name)] $variant = $id,)+ }

        impl Helper {
            /// Every helper that this crate names, by ascending id.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The helper of this id, if this crate names it.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)+ _ => None }
            }

            /// The kernel's name, with `bpf_` in front.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

helpers! {
    /// `(map, &key)`: pointer to the value, or null.
    MapLookupElem = 1 "bpf_map_lookup_elem";
    /// `(map, &key, &value, flags)`: 0 or a negative errno.
    MapUpdateElem = 2 "bpf_map_update_elem";
    /// `(map, &key)`: 0 or a negative errno.
    MapDeleteElem = 3 "bpf_map_delete_elem";
    /// `()`: nanoseconds since boot without suspend.
    KtimeGetNs = 5 "bpf_ktime_get_ns";
    /// `(&format, size, ..)`: writes to the trace pipe; for debugging.
    TracePrintk = 6 "bpf_trace_printk";
    /// `()`: a pseudo-random 32-bit number.
    GetPrandomU32 = 7 "bpf_get_prandom_u32";
    /// `()`: number of the CPU that runs the program.
    GetSmpProcessorId = 8 "bpf_get_smp_processor_id";
    /// `(skb, offset, &from, len, flags)`: writes into the packet.
    SkbStoreBytes = 9 "bpf_skb_store_bytes";
    /// `(skb, offset, from, to, size)`: corrects an IPv4 header checksum.
    L3CsumReplace = 10 "bpf_l3_csum_replace";
    /// `(skb, offset, from, to, flags)`: corrects a transport checksum.
    L4CsumReplace = 11 "bpf_l4_csum_replace";
    /// `(ctx, prog_array, index)`: continues in another program.
    TailCall = 12 "bpf_tail_call";
    /// `(skb, ifindex, flags)`: sends a clone out of another interface.
    CloneRedirect = 13 "bpf_clone_redirect";
    /// `(skb, protocol, tci)`: adds a VLAN tag; the protocol is in network order.
    SkbVlanPush = 18 "bpf_skb_vlan_push";
    /// `(ifindex, flags)`: redirects the packet when the program returns.
    Redirect = 23 "bpf_redirect";
    /// `(skb, offset, &to, len)`: copies out of the packet, also where it is not linear.
    SkbLoadBytes = 26 "bpf_skb_load_bytes";
    /// `(&from, from_size, &to, to_size, seed)`: difference of two one's complement sums.
    CsumDiff = 28 "bpf_csum_diff";
    /// `(skb, len, flags)`: makes the packet this long, linear and writable; what is added is zero. Packet addresses are lost.
    SkbChangeTail = 38 "bpf_skb_change_tail";
    /// `(skb, len)`: makes the first bytes of the packet linear and writable.
    SkbPullData = 39 "bpf_skb_pull_data";
    /// `(skb, csum)`: adds to the packet's checksum.
    CsumUpdate = 40 "bpf_csum_update";
    /// `(xdp, delta)`: moves the frame's first byte; packet addresses are lost. Since Linux 4.10.
    XdpAdjustHead = 44 "bpf_xdp_adjust_head";
    /// `(xdp, delta)`: moves the first byte of the metadata in front of the frame; packet addresses are lost. Since Linux 4.15.
    XdpAdjustMeta = 54 "bpf_xdp_adjust_meta";
    /// `(xdp, delta)`: moves the frame's end; packet addresses are lost. Since Linux 4.18.
    XdpAdjustTail = 65 "bpf_xdp_adjust_tail";
    /// `(skb, &params, size, flags)`: looks up route and neighbour.
    FibLookup = 69 "bpf_fib_lookup";
    /// `()`: the kernel's counter of ticks; the verifier writes a load in its place (on 64-bit machines with a JIT). Since Linux
    /// 5.6.
    Jiffies64 = 118 "bpf_jiffies64";
    /// `(skb)`: the number of the network namespace of the packet's socket; that of the first one where there is no socket.
    /// Classifiers have it since Linux 6.13.
    GetNetnsCookie = 122 "bpf_get_netns_cookie";
    /// `()`: nanoseconds since boot with suspend. Since Linux 5.8.
    KtimeGetBootNs = 125 "bpf_ktime_get_boot_ns";
    /// `(ringbuf, &data, size, flags)`: copies a record. Since Linux 5.8.
    RingbufOutput = 130 "bpf_ringbuf_output";
    /// `(ringbuf, size, flags)`: room for a record, or null. Since Linux 5.8.
    RingbufReserve = 131 "bpf_ringbuf_reserve";
    /// `(record, flags)`: publishes a reserved record. Since Linux 5.8.
    RingbufSubmit = 132 "bpf_ringbuf_submit";
    /// `(record, flags)`: throws a reserved record away. Since Linux 5.8.
    RingbufDiscard = 133 "bpf_ringbuf_discard";
    /// `(ifindex, &params, len, flags)`: redirects through the neighbour table. Since Linux 5.10.
    RedirectNeigh = 152 "bpf_redirect_neigh";
    /// `(ifindex, flags)`: redirects into the peer's namespace. Since Linux 5.10.
    RedirectPeer = 155 "bpf_redirect_peer";
    /// `()`: nanoseconds since boot at tick resolution, cheaper. Since Linux 5.11.
    KtimeGetCoarseNs = 160 "bpf_ktime_get_coarse_ns";
    /// `(count, callback, &ctx, flags)`: calls a function up to `count` times. Since Linux 5.17.
    Loop = 181 "bpf_loop";
    /// `(xdp)`: the frame's length. Since Linux 5.18.
    XdpGetBuffLen = 188 "bpf_xdp_get_buff_len";
    /// `(xdp, offset, &to, len)`: copies out of the frame. Since Linux 5.18.
    XdpLoadBytes = 189 "bpf_xdp_load_bytes";
    /// `(xdp, offset, &from, len)`: writes into the frame. Since Linux 5.18.
    XdpStoreBytes = 190 "bpf_xdp_store_bytes";
}

impl Helper {
    /// The number in the instruction.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// How many arguments it takes, from `R1` on; of [`Helper::TracePrintk`], the least.
    pub const fn arguments(self) -> u8 {
        match self {
            Self::KtimeGetNs
            | Self::GetPrandomU32
            | Self::GetSmpProcessorId
            | Self::Jiffies64
            | Self::KtimeGetBootNs
            | Self::KtimeGetCoarseNs => 0,
            Self::XdpGetBuffLen | Self::GetNetnsCookie => 1,
            Self::MapLookupElem
            | Self::MapDeleteElem
            | Self::TracePrintk
            | Self::Redirect
            | Self::SkbPullData
            | Self::XdpAdjustHead
            | Self::XdpAdjustMeta
            | Self::XdpAdjustTail
            | Self::CsumUpdate
            | Self::RingbufSubmit
            | Self::RingbufDiscard
            | Self::RedirectPeer => 2,
            Self::TailCall | Self::CloneRedirect | Self::SkbVlanPush | Self::SkbChangeTail | Self::RingbufReserve => 3,
            Self::MapUpdateElem
            | Self::SkbLoadBytes
            | Self::FibLookup
            | Self::RingbufOutput
            | Self::RedirectNeigh
            | Self::Loop
            | Self::XdpLoadBytes
            | Self::XdpStoreBytes => 4,
            Self::SkbStoreBytes | Self::L3CsumReplace | Self::L4CsumReplace | Self::CsumDiff => 5,
        }
    }
}

impl fmt::Display for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
