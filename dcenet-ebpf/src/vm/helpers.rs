//! The kernel's helper functions, as far as programs here use them.

use super::machine::Machine;
use super::maps::{MapError, Update};
use super::packet::Packet;
use super::skb::Skb;
use super::trap::TrapKind;
use super::value::{Address, Region, Value};
use super::xdp::{AdjustMeta, Buffer};
use super::{MAX_TAIL_CALLS, TailTarget};
use crate::insn::{Helper, Reg};
use crate::object::MapKind;

impl Machine<'_, '_> {
    /// The value for `R0`.
    pub(super) fn call(&mut self, helper: Helper) -> Result<Value, TrapKind> {
        Ok(Value::Number(match helper {
            Helper::MapLookupElem => return self.map_lookup(),
            Helper::MapUpdateElem => self.map_update()?,
            Helper::MapDeleteElem => self.map_delete()?,
            Helper::KtimeGetNs => self.env.ktime_ns,
            Helper::KtimeGetBootNs => self.env.boottime_ns,
            Helper::KtimeGetCoarseNs => self.env.coarse_ns,
            Helper::Jiffies64 => self.env.jiffies,
            Helper::GetPrandomU32 => u64::from(self.env.next_random()),
            Helper::GetSmpProcessorId => u64::from(self.env.cpu),
            Helper::SkbLoadBytes => self.skb_load_bytes()?,
            Helper::SkbStoreBytes => self.skb_store_bytes()?,
            Helper::SkbPullData => self.skb_pull_data()?,
            Helper::SkbChangeTail => self.skb_change_tail()?,
            Helper::L3CsumReplace => self.l3_csum_replace()?,
            Helper::L4CsumReplace => self.l4_csum_replace()?,
            Helper::CsumDiff => self.csum_diff()?,
            Helper::Redirect => self.redirect_to()?,
            Helper::CloneRedirect => self.clone_redirect()?,
            Helper::FibLookup => self.fib_lookup()?,
            Helper::RingbufOutput => self.ringbuf_output()?,
            Helper::RingbufReserve => return self.ringbuf_reserve(),
            Helper::RingbufSubmit => return self.ringbuf_release(true),
            Helper::RingbufDiscard => return self.ringbuf_release(false),
            Helper::XdpAdjustHead => self.xdp_adjust(helper, |buffer, by, _| status_of(buffer.adjust_head(by)))?,
            Helper::XdpAdjustTail => {
                self.xdp_adjust(helper, |buffer, by, clear| status_of(buffer.adjust_tail(by, clear)))?
            }
            Helper::XdpAdjustMeta => self.xdp_adjust(helper, |buffer, by, _| match buffer.adjust_meta(by) {
                Ok(()) => 0,
                Err(AdjustMeta::NoRoom) => errno(EINVAL),
                Err(AdjustMeta::Size) => errno(EACCES),
            })?,
            Helper::XdpGetBuffLen => {
                self.context_argument()?;
                self.xdp(helper)?.len() as u64
            }
            Helper::XdpLoadBytes => self.xdp_load_bytes()?,
            Helper::XdpStoreBytes => self.xdp_store_bytes()?,
            other => return Err(TrapKind::Helper(other)),
        }))
    }

    fn map_lookup(&mut self) -> Result<Value, TrapKind> {
        let map = self.map(WITH_KEYS)?;
        let slot = self.with_key(map, |machine, key| machine.maps.at_mut(map.into()).and_then(|m| m.find(key)))?;
        Ok(match slot {
            Some(slot) => Value::Address(Address::new(Region::MapValue { map, slot }, 0)),
            None => Value::Number(0),
        })
    }

    fn map_update(&mut self) -> Result<u64, TrapKind> {
        let map = self.map(WITH_KEYS)?;
        let flags = self.number(Reg::R4)?;
        let value = self.address(Reg::R3)?;
        let value_size = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?.spec().value_size as usize;
        // Checked before the key is taken, so that both borrows below cannot fail half way.
        let value = self.bytes(value, value_size)?.to_vec();
        self.with_key(map, |machine, key| {
            let map = machine.maps.at_mut(map.into()).ok_or(MapError::Invalid);
            let mode = Update::from_flags(flags).ok_or(MapError::Invalid);
            status(map.and_then(|map| map.update(key, &value, mode?)))
        })
    }

    fn map_delete(&mut self) -> Result<u64, TrapKind> {
        let map = self.map(WITH_KEYS)?;
        self.with_key(map, |machine, key| {
            let map = machine.maps.at_mut(map.into()).ok_or(MapError::Invalid);
            status(map.and_then(|map| map.delete(key)))
        })
    }

    /// The packet of a classifier; other programs have no such helper.
    pub(super) fn skb(&mut self, helper: Helper) -> Result<&mut Skb, TrapKind> {
        match &mut *self.packet {
            Packet::Skb(skb) => Ok(skb),
            Packet::Xdp(_) => Err(TrapKind::Helper(helper)),
        }
    }

    fn xdp(&mut self, helper: Helper) -> Result<&mut Buffer, TrapKind> {
        match &mut *self.packet {
            Packet::Xdp(buffer) => Ok(buffer),
            Packet::Skb(_) => Err(TrapKind::Helper(helper)),
        }
    }

    /// `bpf_xdp_adjust_*(xdp, delta)`. The last argument of `adjust` is whether new bytes are cleared.
    fn xdp_adjust(
        &mut self,
        helper: Helper,
        adjust: impl FnOnce(&mut Buffer, i32, bool) -> u64,
    ) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let by = self.number(Reg::R2)? as i32;
        #[cfg(not(feature = "test-support"))]
        let clear = true;
        #[cfg(feature = "test-support")]
        let clear = self.bug != Some(super::PlantedBug::GrownTailKept);
        self.epoch += 1;
        Ok(adjust(self.xdp(helper)?, by, clear))
    }

    /// `bpf_xdp_load_bytes(xdp, offset, to, len)`.
    fn xdp_load_bytes(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let offset = self.number(Reg::R2)? as u32;
        let to = self.outside_packet(Reg::R3)?;
        let len = self.length(Reg::R4)?;
        match xdp_range(self.xdp(Helper::XdpLoadBytes)?, offset, len).map(|bytes| bytes.to_vec()) {
            Ok(bytes) => {
                self.bytes_mut(to, len)?.copy_from_slice(&bytes);
                Ok(0)
            }
            Err(number) => {
                self.leave_as_is(to, len)?;
                Ok(errno(number))
            }
        }
    }

    /// `bpf_xdp_store_bytes(xdp, offset, from, len)`; unlike the other writers it keeps packet addresses valid.
    fn xdp_store_bytes(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let offset = self.number(Reg::R2)? as u32;
        let from = self.outside_packet(Reg::R3)?;
        let len = self.length(Reg::R4)?;
        let bytes = self.bytes(from, len)?.to_vec();
        Ok(match xdp_range(self.xdp(Helper::XdpStoreBytes)?, offset, len) {
            Ok(to) => {
                to.copy_from_slice(&bytes);
                0
            }
            Err(number) => errno(number),
        })
    }

    /// `bpf_skb_load_bytes(skb, offset, to, len)`.
    fn skb_load_bytes(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let offset = self.number(Reg::R2)? as u32 as usize;
        let to = self.outside_packet(Reg::R3)?;
        let len = self.length(Reg::R4)?;
        // Taken out of the machine for the time of the copy, as the other side is in the machine too.
        let packet = std::mem::take(&mut self.skb(Helper::SkbLoadBytes)?.packet);
        let copied = self.bytes_mut(to, len).map(|to| match packet.get(offset..offset + len) {
            Some(from) => {
                to.copy_from_slice(from);
                0
            }
            None => {
                // The kernel clears the room on failure.
                to.fill(0);
                errno(EFAULT)
            }
        });
        self.skb(Helper::SkbLoadBytes)?.packet = packet;
        copied
    }

    /// `bpf_skb_store_bytes(skb, offset, from, len, flags)`; of the flags, which concern checksum and hash, none shows in
    /// the packet's bytes.
    fn skb_store_bytes(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let offset = self.number(Reg::R2)? as u32 as usize;
        let from = self.outside_packet(Reg::R3)?;
        let len = self.length(Reg::R4)?;
        const FLAGS: u64 = 0b11;
        if self.number(Reg::R5)? & !FLAGS != 0 {
            return Ok(errno(EINVAL));
        }
        let bytes = self.bytes(from, len)?.to_vec();
        self.epoch += 1;
        let skb = self.skb(Helper::SkbStoreBytes)?;
        Ok(match skb.packet.get_mut(offset..offset + len) {
            Some(to) => {
                to.copy_from_slice(&bytes);
                skb.linear = skb.linear.max(offset + len);
                0
            }
            None => errno(EFAULT),
        })
    }

    /// `bpf_skb_pull_data(skb, len)`; 0 asks for the linear part, which is linear already.
    fn skb_pull_data(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let len = self.number(Reg::R2)? as u32 as usize;
        self.epoch += 1;
        let skb = self.skb(Helper::SkbPullData)?;
        if len > skb.packet.len() {
            return Ok(errno(ENOMEM));
        }
        skb.linear = skb.linear_len().max(len);
        Ok(0)
    }

    /// `bpf_skb_change_tail(skb, len, flags)`, without the kernel's bounds that come of headers that it has parsed and of the
    /// device's MTU.
    fn skb_change_tail(&mut self) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let (len, flags) = (self.number(Reg::R2)? as u32 as usize, self.number(Reg::R3)?);
        self.epoch += 1;
        if flags != 0 || len > MAX_SKB {
            return Ok(errno(EINVAL));
        }
        let skb = self.skb(Helper::SkbChangeTail)?;
        skb.packet.resize(len, 0);
        skb.linear = usize::MAX;
        Ok(0)
    }

    /// `bpf_tail_call(ctx, array, index)`: the program to go on in; none where this one goes on instead.
    ///
    /// One that falls through leaves no packet address valid, as in the verifier since Linux 6.13 and some stable kernels
    /// (`bpf_helper_changes_pkt_data`, `net/core/filter.c`). Here as in the x86 JIT since Linux 6.12 an empty place does not count towards the limit
    /// (`arch/x86/net/bpf_jit_comp.c`, `emit_bpf_tail_call_indirect`); earlier, and in the interpreter, it does.
    pub(super) fn tail_call(&mut self) -> Result<Option<TailTarget>, TrapKind> {
        if self.in_callback() {
            return Err(TrapKind::TailCallInCallback);
        }
        self.context_argument()?;
        let wrong = TrapKind::Argument { argument: 2, reason: "an array of programs, from Asm::load_map" };
        let Address { region: Region::Map(map), .. } = self.address(Reg::R2)? else { return Err(wrong) };
        let map = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?;
        if map.spec().kind != MapKind::ProgArray {
            return Err(wrong);
        }
        let index = self.number(Reg::R3)? as u32;
        self.epoch += 1;
        if self.reserved > 0 {
            return Err(TrapKind::UnreleasedRecord);
        }
        #[cfg(not(feature = "test-support"))]
        let limit = MAX_TAIL_CALLS;
        #[cfg(feature = "test-support")]
        let limit = MAX_TAIL_CALLS + u32::from(self.bug == Some(super::PlantedBug::OneTailCallMore));
        if self.tail_calls >= limit {
            return Ok(None);
        }
        let target = map.program(index);
        self.tail_calls += u32::from(target.is_some());
        Ok(target)
    }

    fn ringbuf_output(&mut self) -> Result<u64, TrapKind> {
        let map = self.map(&[MapKind::Ringbuf])?;
        let from = self.address(Reg::R2)?;
        let len = self.length(Reg::R3)?;
        if self.number(Reg::R4)? & !WAKEUP_FLAGS != 0 {
            return Ok(errno(EINVAL));
        }
        let bytes = self.bytes(from, len)?.to_vec();
        let map = self.maps.at_mut(map.into()).ok_or(TrapKind::WrongMaps)?;
        Ok(match map.reserve(len) {
            Ok(index) => {
                if let Some(record) = map.record_mut(index) {
                    record.copy_from_slice(&bytes);
                }
                map.release(index, true);
                0
            }
            Err(error) => errno(error.errno()),
        })
    }

    fn ringbuf_reserve(&mut self) -> Result<Value, TrapKind> {
        let map = self.map(&[MapKind::Ringbuf])?;
        let len = self.length(Reg::R2)?;
        if self.number(Reg::R3)? != 0 {
            return Ok(Value::Number(0));
        }
        Ok(match self.maps.at_mut(map.into()).ok_or(TrapKind::WrongMaps)?.reserve(len) {
            Ok(index) => {
                self.reserved += 1;
                Value::Address(Address::new(Region::Record { map, index }, 0))
            }
            Err(_) => Value::Number(0),
        })
    }

    /// As a function without a result (`RET_VOID`), of which the verifier lets nobody read `R0`.
    fn ringbuf_release(&mut self, submit: bool) -> Result<Value, TrapKind> {
        let Address { region: Region::Record { map, index }, offset: 0 } = self.address(Reg::R1)? else {
            return Err(TrapKind::Argument { argument: 1, reason: "the record as bpf_ringbuf_reserve gave it" });
        };
        if self.number(Reg::R2)? & !WAKEUP_FLAGS != 0 {
            return Err(TrapKind::Argument { argument: 2, reason: "BPF_RB_NO_WAKEUP, BPF_RB_FORCE_WAKEUP or 0" });
        }
        if !self.maps.at_mut(map.into()).ok_or(TrapKind::WrongMaps)?.release(index, submit) {
            return Err(TrapKind::Dangling);
        }
        self.reserved -= 1;
        Ok(Value::Nothing)
    }

    /// The map in `R1`, of one of the kinds that the helper takes.
    fn map(&self, kinds: &[MapKind]) -> Result<u16, TrapKind> {
        let wrong = TrapKind::Argument { argument: 1, reason: "a map of a kind that the helper takes" };
        let Address { region: Region::Map(map), .. } = self.address(Reg::R1)? else { return Err(wrong) };
        let kind = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?.spec().kind;
        if kinds.contains(&kind) { Ok(map) } else { Err(wrong) }
    }

    /// Gives `then` a copy of the key that `R2` points to.
    fn with_key<T>(&mut self, map: u16, then: impl FnOnce(&mut Self, &[u8]) -> T) -> Result<T, TrapKind> {
        let size = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?.spec().key_size as usize;
        let address = self.address(Reg::R2)?;
        let mut key = std::mem::take(&mut self.scratch);
        key.clear();
        key.extend_from_slice(self.bytes(address, size)?);
        let result = then(self, &key);
        self.scratch = key;
        Ok(result)
    }

    pub(super) fn context_argument(&self) -> Result<(), TrapKind> {
        match self.address(Reg::R1)? {
            Address { region: Region::Context, offset: 0 } => Ok(()),
            _ => Err(TrapKind::Argument { argument: 1, reason: "the context as the program got it" }),
        }
    }

    /// An address that is not in the packet: the verifier gives packet addresses only to helpers that are marked for it
    /// (`may_access_direct_pkt_data`, `kernel/bpf/verifier.c`).
    pub(super) fn outside_packet(&self, reg: Reg) -> Result<Address, TrapKind> {
        let address = self.address(reg)?;
        if matches!(address.region, Region::Packet { .. }) {
            return Err(TrapKind::Argument { argument: reg.index() as u8, reason: "stack, map value or record" });
        }
        Ok(address)
    }

    /// A size in bytes, which the verifier wants to be positive and bounded.
    pub(super) fn length(&self, reg: Reg) -> Result<usize, TrapKind> {
        const MAX: u64 = 1 << 29;
        let len = self.number(reg)?;
        if len == 0 || len > MAX {
            return Err(TrapKind::Argument { argument: reg.index() as u8, reason: "a size from 1 to 512 MiB" });
        }
        Ok(len as usize)
    }
}

fn status_of(done: bool) -> u64 {
    if done { 0 } else { errno(EINVAL) }
}

/// Bytes of the frame, or why not (`bpf_xdp_pointer`, `net/core/filter.c`).
fn xdp_range(buffer: &mut Buffer, offset: u32, len: usize) -> Result<&mut [u8], i32> {
    if offset > 0xffff || len > 0xffff {
        return Err(EFAULT);
    }
    buffer.bytes_mut(i64::from(offset), len).map_err(|_| EINVAL)
}

fn status(result: Result<(), MapError>) -> u64 {
    result.map_or_else(|error| errno(error.errno()), |()| 0)
}

pub(super) fn errno(number: i32) -> u64 {
    i64::from(-number) as u64
}

/// What lookup, update and delete take.
const WITH_KEYS: &[MapKind] =
    &[MapKind::Array, MapKind::PercpuArray, MapKind::Hash, MapKind::PercpuHash, MapKind::LruHash, MapKind::LpmTrie];
/// Far beyond what a program answers with.
const MAX_SKB: usize = 65_535;

const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
pub(super) const EFAULT: i32 = 14;
pub(super) const EINVAL: i32 = 22;
/// `BPF_RB_NO_WAKEUP` and `BPF_RB_FORCE_WAKEUP`.
const WAKEUP_FLAGS: u64 = 0b11;
