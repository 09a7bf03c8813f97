//! Three levels of 64 with the records at the lowest.

use super::Record;

/// Bits of an address that are a place in a chunk.
pub(super) const CHUNK: u32 = <Chunk as Level>::BITS;

pub(super) type Chunk = Node<Node<Leaf>>;

/// Addresses as places from 0 to 2^BITS - 1, with a record or without.
pub(super) trait Level: Default {
    /// Of a place.
    const BITS: u32;

    fn get(&self, place: u32) -> Option<&Record>;

    /// Returns the record before.
    fn insert(&mut self, place: u32, record: Record) -> Option<Record>;

    fn remove(&mut self, place: u32) -> Option<Record>;

    /// The first place from `place` on without a record.
    fn first_free(&self, place: u32) -> Option<u32>;

    fn is_full(&self) -> bool;

    fn is_empty(&self) -> bool;
}

/// 64 addresses.
#[derive(Debug, Default)]
pub(super) struct Leaf {
    /// Which have a record.
    present: u64,
    /// In order of their places while they are few; all 64, some of them meaningless, once they are many, so that one can
    /// come and go without the others' moving.
    records: Vec<Record>,
}

/// 64 children, of which those exist that hold a record.
#[derive(Debug, Default)]
pub(super) struct Node<T> {
    present: u64,
    full: u64,
    /// In order of their places.
    children: Vec<T>,
}

/// Records of a leaf that holds a place for each address; with more than this many of them it does, a record then takes
/// at most 48 bytes, and with fewer than this it does not any more.
const WIDE: usize = 64;
const MANY: usize = 32;
const FEW: u32 = 16;

/// How many of the lower bits are set: where the child of this bit is, or would be.
fn rank(bits: u64, bit: u32) -> usize {
    (bits & ((1 << bit) - 1)).count_ones() as usize
}

/// The first bit from `bit` on that is not set.
fn first_zero(bits: u64, bit: u32) -> Option<u32> {
    let open = !bits & (u64::MAX << bit);
    (open != 0).then(|| open.trailing_zeros())
}

impl Leaf {
    fn is_wide(&self) -> bool {
        self.records.len() == WIDE
    }

    /// Where the record of a place is, or would be.
    fn position(&self, place: u32) -> usize {
        if self.is_wide() { place as usize } else { rank(self.present, place) }
    }

    fn widen(&mut self) {
        let mut few = std::mem::take(&mut self.records).into_iter();
        let meaningless = Record { sequence: 0, at: 0, owner: 0 };
        self.records = Vec::with_capacity(WIDE);
        self.records.extend((0..WIDE).map(|place| match self.present >> place & 1 {
            1 => few.next().unwrap_or(meaningless),
            _ => meaningless,
        }));
    }

    fn narrow(&mut self) {
        let present = self.present;
        let mut place = 0;
        self.records.retain(|_| {
            place += 1;
            present >> (place - 1) & 1 == 1
        });
        self.records.shrink_to_fit();
    }
}

impl Level for Leaf {
    const BITS: u32 = 6;

    fn get(&self, place: u32) -> Option<&Record> {
        (self.present >> place & 1 == 1).then(|| &self.records[self.position(place)])
    }

    fn insert(&mut self, place: u32, record: Record) -> Option<Record> {
        let at = self.position(place);
        if self.present >> place & 1 == 1 {
            return Some(std::mem::replace(&mut self.records[at], record));
        }
        if self.is_wide() {
            self.records[at] = record;
        } else {
            self.records.insert(at, record);
        }
        self.present |= 1 << place;
        if self.records.len() > MANY && !self.is_wide() {
            self.widen();
        }
        None
    }

    fn remove(&mut self, place: u32) -> Option<Record> {
        if self.present >> place & 1 == 0 {
            return None;
        }
        let at = self.position(place);
        self.present &= !(1 << place);
        if !self.is_wide() {
            return Some(self.records.remove(at));
        }
        let record = self.records[at];
        if self.present.count_ones() < FEW {
            self.narrow();
        }
        Some(record)
    }

    fn first_free(&self, place: u32) -> Option<u32> {
        first_zero(self.present, place)
    }

    fn is_full(&self) -> bool {
        self.present == u64::MAX
    }

    fn is_empty(&self) -> bool {
        self.present == 0
    }
}

impl<T: Level> Node<T> {
    fn child(&self, bit: u32) -> Option<&T> {
        (self.present >> bit & 1 == 1).then(|| &self.children[rank(self.present, bit)])
    }
}

impl<T: Level> Level for Node<T> {
    const BITS: u32 = T::BITS + 6;

    fn get(&self, place: u32) -> Option<&Record> {
        let (bit, below) = (place >> T::BITS, place & ((1 << T::BITS) - 1));
        self.child(bit)?.get(below)
    }

    fn insert(&mut self, place: u32, record: Record) -> Option<Record> {
        let (bit, below) = (place >> T::BITS, place & ((1 << T::BITS) - 1));
        let at = rank(self.present, bit);
        if self.present >> bit & 1 == 0 {
            self.children.insert(at, T::default());
            self.present |= 1 << bit;
        }
        let child = &mut self.children[at];
        let before = child.insert(below, record);
        if child.is_full() {
            self.full |= 1 << bit;
        }
        before
    }

    fn remove(&mut self, place: u32) -> Option<Record> {
        let (bit, below) = (place >> T::BITS, place & ((1 << T::BITS) - 1));
        if self.present >> bit & 1 == 0 {
            return None;
        }
        let at = rank(self.present, bit);
        let record = self.children[at].remove(below)?;
        self.full &= !(1 << bit);
        if self.children[at].is_empty() {
            self.children.remove(at);
            self.present &= !(1 << bit);
        }
        Some(record)
    }

    fn first_free(&self, place: u32) -> Option<u32> {
        let (bit, below) = (place >> T::BITS, place & ((1 << T::BITS) - 1));
        match self.child(bit) {
            None => return Some(place),
            Some(child) => {
                if let Some(free) = child.first_free(below) {
                    return Some(bit << T::BITS | free);
                }
            }
        }
        if bit == 63 {
            return None;
        }
        let next = first_zero(self.full, bit + 1)?;
        // One that is not full has a free place.
        let free = self.child(next).map_or(Some(0), |child| child.first_free(0))?;
        Some(next << T::BITS | free)
    }

    fn is_full(&self) -> bool {
        self.full == u64::MAX
    }

    fn is_empty(&self) -> bool {
        self.present == 0
    }
}
