//! Objects at addresses at which their tables can be read in place.

use std::borrow::Cow;

/// The bytes of an object from a border of 8 bytes on: its own, or a copy.
pub(super) struct Aligned<'a> {
    bytes: Cow<'a, [u8]>,
    start: usize,
    length: usize,
}

impl<'a> Aligned<'a> {
    pub(super) fn new(object: &'a [u8]) -> Self {
        let length = object.len();
        if object.as_ptr().cast::<u64>().is_aligned() {
            return Self { bytes: Cow::Borrowed(object), start: 0, length };
        }
        let mut buffer = vec![0; length + 8];
        let start = buffer.as_ptr().align_offset(8).min(8);
        buffer[start..start + length].copy_from_slice(object);
        Self { bytes: Cow::Owned(buffer), start, length }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}
