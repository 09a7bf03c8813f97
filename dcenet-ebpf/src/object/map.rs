//! What a map is to be.

use std::ops::BitOr;

use super::ObjectError;

/// The kind of a map (`enum bpf_map_type`, `include/uapi/linux/bpf.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum MapKind {
    /// Any key to a value.
    Hash = 1,
    /// Values by index from 0, all there from the start.
    Array = 2,
    /// Programs of one type by index, for [`Helper::TailCall`](crate::insn::Helper::TailCall). Since Linux 4.2.
    ProgArray = 3,
    /// As [`MapKind::Hash`], with a value per CPU. Since Linux 4.6.
    PercpuHash = 5,
    /// As [`MapKind::Array`], with a value per CPU.
    PercpuArray = 6,
    /// As [`MapKind::Hash`]; drops what was used least recently when it is full.
    LruHash = 9,
    /// Prefixes to values; a lookup finds the longest prefix of its key. Since Linux 4.11.
    LpmTrie = 11,
    /// Records from programs to user space. Since Linux 5.8.
    Ringbuf = 27,
}

impl MapKind {
    /// The kernel's number.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// Flags for a map's creation (`BPF_F_*`); join them with `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MapFlags(u32);

impl MapFlags {
    /// None.
    pub const NONE: Self = Self(0);
    /// A hash takes memory per entry, not in advance (`BPF_F_NO_PREALLOC`); a trie cannot do otherwise.
    pub const NO_PREALLOC: Self = Self(1);
    /// Programs can only read it (`BPF_F_RDONLY_PROG`). Since Linux 5.2.
    pub const RDONLY_PROG: Self = Self(1 << 7);
    /// User space can map an array into its memory (`BPF_F_MMAPABLE`). Since Linux 5.5.
    pub const MMAPABLE: Self = Self(1 << 10);

    /// The kernel's bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `flags` are set.
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }
}

impl BitOr for MapFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Whether the loader pins a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Pinning {
    /// No.
    #[default]
    None,
    /// Under its name in the loader's pin directory, where it is taken over if it exists (`LIBBPF_PIN_BY_NAME`).
    ByName,
}

/// A map to be made by the loader. The constructors fill in what follows from the kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MapSpec {
    /// Its name, a C identifier of at most 15 bytes.
    pub name: String,
    /// Its kind.
    pub kind: MapKind,
    /// Size of a key in bytes.
    pub key_size: u32,
    /// Size of a value in bytes.
    pub value_size: u32,
    /// How many entries it holds; for a ring buffer, its bytes.
    pub max_entries: u32,
    /// Flags.
    pub flags: MapFlags,
    /// Whether the loader pins it.
    pub pinning: Pinning,
}

impl MapSpec {
    /// `entries` values of `value_size` bytes, by index.
    pub fn array(name: impl Into<String>, value_size: u32, entries: u32) -> Self {
        Self::new(name, MapKind::Array, 4, value_size, entries)
    }

    /// As [`MapSpec::array`], a value per CPU.
    pub fn percpu_array(name: impl Into<String>, value_size: u32, entries: u32) -> Self {
        Self::new(name, MapKind::PercpuArray, 4, value_size, entries)
    }

    /// Keys to values.
    pub fn hash(name: impl Into<String>, key_size: u32, value_size: u32, entries: u32) -> Self {
        Self::new(name, MapKind::Hash, key_size, value_size, entries)
    }

    /// As [`MapSpec::hash`]; drops old entries when it is full.
    pub fn lru_hash(name: impl Into<String>, key_size: u32, value_size: u32, entries: u32) -> Self {
        Self::new(name, MapKind::LruHash, key_size, value_size, entries)
    }

    /// As [`MapSpec::hash`], a value per CPU.
    pub fn percpu_hash(name: impl Into<String>, key_size: u32, value_size: u32, entries: u32) -> Self {
        Self::new(name, MapKind::PercpuHash, key_size, value_size, entries)
    }

    /// Prefixes of at most `8 * data_size` bits to values. A key is `struct bpf_lpm_trie_key_u8`
    /// (`include/uapi/linux/bpf.h`): the prefix length in bits, 4 bytes in the host's order, then `data_size` bytes whose
    /// first bit is the highest of the first byte.
    pub fn lpm_trie(name: impl Into<String>, data_size: u32, value_size: u32, entries: u32) -> Self {
        let key_size = data_size.saturating_add(LPM_PREFIX_BYTES);
        Self::new(name, MapKind::LpmTrie, key_size, value_size, entries).with_flags(MapFlags::NO_PREALLOC)
    }

    /// Programs by index, all places empty.
    pub fn prog_array(name: impl Into<String>, entries: u32) -> Self {
        Self::new(name, MapKind::ProgArray, 4, 4, entries)
    }

    /// Records for user space; `bytes` is a power of two and a multiple of the page size.
    pub fn ringbuf(name: impl Into<String>, bytes: u32) -> Self {
        Self::new(name, MapKind::Ringbuf, 0, 0, bytes)
    }

    /// Adds flags.
    #[must_use]
    pub fn with_flags(mut self, flags: MapFlags) -> Self {
        self.flags = self.flags | flags;
        self
    }

    /// Pins it by its name.
    #[must_use]
    pub fn pinned(mut self) -> Self {
        self.pinning = Pinning::ByName;
        self
    }

    fn new(name: impl Into<String>, kind: MapKind, key_size: u32, value_size: u32, max_entries: u32) -> Self {
        let (flags, pinning) = (MapFlags::NONE, Pinning::None);
        Self { name: name.into(), kind, key_size, value_size, max_entries, flags, pinning }
    }

    /// Refuses what the kernel would (`map_alloc_check` of each kind), with the field's name instead of EINVAL.
    pub(super) fn check(&self) -> Result<(), ObjectError> {
        let error = |field, value, reason| Err(ObjectError::Map { map: self.name.clone(), field, value, reason });
        if self.name.len() > 15 {
            return Err(ObjectError::Name {
                name: self.name.clone(),
                reason: "the kernel keeps 15 bytes of a map's name (BPF_OBJ_NAME_LEN)",
            });
        }
        if self.max_entries == 0 {
            return error("max_entries", 0, "at least 1");
        }
        if self.flags.contains(MapFlags::MMAPABLE) && self.kind != MapKind::Array {
            return error("flags", self.flags.bits(), "only an array can be mapped into memory");
        }
        let preallocates = matches!(self.kind, MapKind::Hash | MapKind::PercpuHash);
        match (self.flags.contains(MapFlags::NO_PREALLOC), self.kind) {
            (true, kind) if !preallocates && kind != MapKind::LpmTrie => {
                return error("flags", self.flags.bits(), "NO_PREALLOC is for hashes and tries");
            }
            (false, MapKind::LpmTrie) => return error("flags", self.flags.bits(), "a trie has NO_PREALLOC"),
            _ => {}
        }
        if self.flags.contains(MapFlags::RDONLY_PROG) && self.kind == MapKind::ProgArray {
            return error("flags", self.flags.bits(), "programs cannot write an array of programs anyway");
        }
        match self.kind {
            MapKind::Array | MapKind::PercpuArray | MapKind::ProgArray if self.key_size != 4 => {
                return error("key_size", self.key_size, "an array's key has 4 bytes");
            }
            MapKind::ProgArray if self.value_size != 4 => {
                return error("value_size", self.value_size, "a program's descriptor has 4 bytes");
            }
            MapKind::Ringbuf if self.key_size != 0 => {
                return error("key_size", self.key_size, "a ring buffer has no keys");
            }
            MapKind::Ringbuf if self.value_size != 0 => {
                return error("value_size", self.value_size, "a ring buffer has no values");
            }
            MapKind::Ringbuf if !self.max_entries.is_power_of_two() || self.max_entries < 4096 => {
                return error("max_entries", self.max_entries, "a power of two and a multiple of the page size");
            }
            MapKind::Hash | MapKind::PercpuHash | MapKind::LruHash if self.key_size == 0 || self.key_size > 512 => {
                return error("key_size", self.key_size, "1 to 512 bytes, as a key lies on the stack");
            }
            MapKind::LpmTrie if !LPM_KEY_SIZES.contains(&self.key_size) => {
                return error("key_size", self.key_size, "4 bytes of prefix length and 1 to 256 bytes of data");
            }
            _ => {}
        }
        if self.kind != MapKind::Ringbuf && self.value_size == 0 {
            return error("value_size", 0, "at least 1");
        }
        if matches!(self.kind, MapKind::PercpuArray | MapKind::PercpuHash) && self.value_size > 32 << 10 {
            return error("value_size", self.value_size, "at most 32 KiB (PCPU_MIN_UNIT_SIZE)");
        }
        Ok(())
    }
}

/// The prefix length in front of the data of a trie's key.
pub(crate) const LPM_PREFIX_BYTES: u32 = 4;
/// `LPM_KEY_SIZE_MIN` to `LPM_KEY_SIZE_MAX` (`kernel/bpf/lpm_trie.c`).
const LPM_KEY_SIZES: std::ops::RangeInclusive<u32> = LPM_PREFIX_BYTES + 1..=LPM_PREFIX_BYTES + 256;
