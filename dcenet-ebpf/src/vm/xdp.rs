//! The context of XDP programs, `struct xdp_md`.

use super::trap::{Memory, TrapKind};

/// A frame as an XDP program sees it (`struct xdp_md`, `include/uapi/linux/bpf.h`), in one buffer without fragments.
///
/// `egress_ifindex`, which only programs of a device map may read, traps, as the verifier refuses it elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xdp {
    /// The frame, from the Ethernet header on (`data` to `data_end`).
    pub packet: Vec<u8>,
    /// Metadata in front of the frame (`data_meta` to `data`), which takes of the headroom.
    pub meta: Vec<u8>,
    /// Bytes in front of the frame that `bpf_xdp_adjust_head` and metadata can take together. All of the frame, with what
    /// is before and behind it, has at most 1 MiB, or the run is [`TrapKind::FrameSize`].
    pub headroom: usize,
    /// Bytes behind the frame that `bpf_xdp_adjust_tail` can take.
    pub tailroom: usize,
    /// `ingress_ifindex`: the device.
    pub ingress_ifindex: u32,
    /// `rx_queue_index`: the queue of the device.
    pub rx_queue_index: u32,
}

impl Xdp {
    /// A frame without metadata from queue 0 of device 1, in a page with `XDP_PACKET_HEADROOM` (256 bytes) in front, of
    /// which the kernel keeps 40 for `struct xdp_frame`, and `struct skb_shared_info` (320) behind, on x86-64: what
    /// `BPF_PROG_TEST_RUN` makes.
    pub fn new(packet: impl Into<Vec<u8>>) -> Self {
        let packet = packet.into();
        let tailroom = (4096_usize - 256 - 320).saturating_sub(packet.len());
        Self { packet, meta: Vec::new(), headroom: 256 - 40, tailroom, ingress_ifindex: 1, rx_queue_index: 0 }
    }
}

/// What the kernel does with the frame (`enum xdp_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum XdpAction {
    /// Dropped and traced as an error; so is every value that is no action (`bpf_warn_invalid_xdp_action`).
    Aborted = 0,
    /// Dropped.
    Drop = 1,
    /// Handed to the network stack.
    Pass = 2,
    /// Sent back out of the device that it came from.
    Tx = 3,
    /// Sent where a redirect helper said.
    Redirect = 4,
}

impl XdpAction {
    /// What the kernel makes of a program's result.
    pub const fn from_result(value: u32) -> Self {
        match value {
            1 => Self::Drop,
            2 => Self::Pass,
            3 => Self::Tx,
            4 => Self::Redirect,
            _ => Self::Aborted,
        }
    }
}

/// The memory of a run: headroom, metadata, frame, tailroom.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    meta: usize,
    data: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn new(xdp: &Xdp) -> Result<Self, TrapKind> {
        let data = xdp.headroom.max(xdp.meta.len());
        let meta = data - xdp.meta.len();
        let end = data.checked_add(xdp.packet.len()).ok_or(TrapKind::FrameSize)?;
        let size = end.checked_add(xdp.tailroom).filter(|size| *size <= MAX_FRAME).ok_or(TrapKind::FrameSize)?;
        let mut bytes = vec![0; size];
        bytes[meta..data].copy_from_slice(&xdp.meta);
        bytes[data..end].copy_from_slice(&xdp.packet);
        Ok(Self { bytes, meta, data, end })
    }

    /// Takes over what the program made of it.
    pub(super) fn give_back(&self, xdp: &mut Xdp) {
        xdp.packet = self.bytes[self.data..self.end].to_vec();
        xdp.meta = self.bytes[self.meta..self.data].to_vec();
        xdp.headroom = self.data;
        xdp.tailroom = self.bytes.len() - self.end;
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.data
    }

    pub(super) fn meta_len(&self) -> usize {
        self.data - self.meta
    }

    /// Where `len` bytes lie that begin `offset` after the frame's first byte; negative in the metadata.
    fn place(&self, offset: i64, len: usize) -> Result<usize, TrapKind> {
        let error = TrapKind::OutOfBounds { memory: Memory::Packet, offset, size: len, len: self.len() };
        let at = usize::try_from(offset.saturating_add(self.data as i64)).map_err(|_| error)?;
        if at < self.meta || at > self.end || len > self.end - at {
            return Err(error);
        }
        Ok(at)
    }

    pub(super) fn bytes(&self, offset: i64, len: usize) -> Result<&[u8], TrapKind> {
        let at = self.place(offset, len)?;
        Ok(&self.bytes[at..at + len])
    }

    pub(super) fn bytes_mut(&mut self, offset: i64, len: usize) -> Result<&mut [u8], TrapKind> {
        let at = self.place(offset, len)?;
        Ok(&mut self.bytes[at..at + len])
    }

    /// `bpf_xdp_adjust_head`: metadata moves along. False where there is no room, or the frame would lose its header.
    pub(super) fn adjust_head(&mut self, by: i32) -> bool {
        let metalen = self.meta_len();
        let Some(data) = self.data.checked_add_signed(by as isize) else { return false };
        if data < metalen || data + ETH_HLEN > self.end {
            return false;
        }
        self.bytes.copy_within(self.meta..self.data, data - metalen);
        self.meta = data - metalen;
        self.data = data;
        true
    }

    /// `bpf_xdp_adjust_tail`: new bytes are zero. False where there is no room, or the frame would lose its header.
    pub(super) fn adjust_tail(&mut self, by: i32, clear: bool) -> bool {
        let Some(end) = self.end.checked_add_signed(by as isize) else { return false };
        if end > self.bytes.len() || end < self.data + ETH_HLEN {
            return false;
        }
        if clear && end > self.end {
            self.bytes[self.end..end].fill(0);
        }
        self.end = end;
        true
    }

    /// `bpf_xdp_adjust_meta`: the metadata's new length, or why not.
    pub(super) fn adjust_meta(&mut self, by: i32) -> Result<(), AdjustMeta> {
        let meta = self.meta.checked_add_signed(by as isize).ok_or(AdjustMeta::NoRoom)?;
        let len = self.data.checked_sub(meta).ok_or(AdjustMeta::NoRoom)?;
        if !len.is_multiple_of(4) || len > META_MAX {
            return Err(AdjustMeta::Size);
        }
        self.meta = meta;
        Ok(())
    }
}

/// Why metadata cannot be resized.
#[derive(Debug, Clone, Copy)]
pub(super) enum AdjustMeta {
    /// Beyond the headroom or the frame's begin (EINVAL).
    NoRoom,
    /// No multiple of 4, or too long (EACCES).
    Size,
}

/// What a read of the context at an offset gives.
pub(super) enum Field {
    Number,
    Data,
    DataEnd,
    DataMeta,
}

/// Which reads the kernel allows (`xdp_is_valid_access`, `net/core/filter.c`).
pub(super) fn readable(offset: usize, size: usize) -> Option<Field> {
    match offset {
        _ if size != 4 => None,
        DATA => Some(Field::Data),
        DATA_END => Some(Field::DataEnd),
        DATA_META => Some(Field::DataMeta),
        INGRESS_IFINDEX | RX_QUEUE_INDEX => Some(Field::Number),
        _ => None,
    }
}

/// The context as the program reads it, but for addresses.
pub(super) fn to_context(xdp: &Xdp, bytes: &mut [u8]) {
    for (at, value) in [(INGRESS_IFINDEX, xdp.ingress_ifindex), (RX_QUEUE_INDEX, xdp.rx_queue_index)] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

const MAX_FRAME: usize = 1 << 20;
const ETH_HLEN: usize = 14;
/// The length of metadata must fit in `meta_len` of `struct skb_shared_info`, a byte (`xdp_metalen_invalid`,
/// `include/net/xdp.h`); older kernels, 6.1 for one, allow 32.
const META_MAX: usize = 255;

const DATA: usize = 0;
const DATA_END: usize = 4;
const DATA_META: usize = 8;
const INGRESS_IFINDEX: usize = 12;
const RX_QUEUE_INDEX: usize = 16;
