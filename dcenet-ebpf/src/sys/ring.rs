//! The shared memory of a ring buffer (Documentation/bpf/ringbuf.rst; kernel/bpf/ringbuf.c).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::SysError;
use super::fault::gated;

/// A part of a ring buffer map in our memory, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; all access goes through atomics.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, offset: usize, bytes: usize, protection: libc::c_int) -> Result<Self, SysError> {
        const CALL: &str = "mmap";
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| SysError { call: CALL, source: io::ErrorKind::InvalidInput.into() })?;
        let start = gated(CALL, || {
            let any = ptr::null_mut();
            // SAFETY: the kernel chooses the place, so nothing of ours is overwritten; it refuses lengths and offsets
            // that the map does not have.
            let start = unsafe { libc::mmap(any, bytes, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
            if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start) }
        })?;
        let start =
            NonNull::new(start.cast()).ok_or(SysError { call: CALL, source: io::ErrorKind::InvalidData.into() })?;
        Ok(Self { start, bytes })
    }

    /// The 64-bit word at a multiple of 8 bytes.
    fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.bytes, "word {offset} of {} bytes", self.bytes);
        // SAFETY: the word is inside the mapping, which starts on a page and is aligned therefore, and lives as long as
        // `self`. The kernel and other processes access it atomically, or before a release that we acquired.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The 32-bit word at a multiple of 4 bytes.
    fn u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "word {offset} of {} bytes", self.bytes);
        // SAFETY: as for `u64`.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is what mmap gave, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// The consumer's side of a ring buffer.
#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    /// The page with our position, the only one that we may write.
    consumer: Mapping,
    /// A page with the kernel's position, then the data twice over, so that a record never wraps.
    producer: Mapping,
    page: usize,
    /// Bytes of data: a power of two.
    size: usize,
    /// Where records are copied to, as whole words.
    words: Vec<u64>,
}

impl Ring {
    /// Maps the ring of a map that the caller knows to be a ring buffer of `size` bytes.
    pub(crate) fn new(fd: OwnedFd, size: usize) -> Result<Self, SysError> {
        let page = page_size();
        let consumer = Mapping::new(fd.as_fd(), 0, page, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = Mapping::new(fd.as_fd(), page, page + 2 * size, libc::PROT_READ)?;
        Ok(Self { fd, consumer, producer, page, size, words: Vec::new() })
    }

    /// Bytes that wait, headers included.
    pub(crate) fn pending(&self) -> u64 {
        self.producer.u64(0).load(Ordering::Acquire).wrapping_sub(self.consumer.u64(0).load(Ordering::Relaxed))
    }

    /// Hands each waiting record to `each` and gives its room back, until none waits or `most` were handed out.
    pub(crate) fn drain(&mut self, most: usize, mut each: impl FnMut(&[u8])) -> Result<usize, SysError> {
        let mut handed = 0;
        let mut position = self.consumer.u64(0).load(Ordering::Relaxed);
        // The kernel wakes a waiter only when a record is committed at the consumer's position, so the producer's is
        // read again after the last record.
        while handed < most && position < self.producer.u64(0).load(Ordering::Acquire) {
            let offset = self.page + (position as usize & (self.size - 1));
            let header = self.producer.u32(offset).load(Ordering::Acquire);
            if header & BUSY != 0 {
                break;
            }
            let length = (header & !DISCARDED) as usize;
            if length > self.size - HEADER {
                return Err(SysError { call: "ring buffer", source: io::ErrorKind::InvalidData.into() });
            }
            if header & DISCARDED == 0 {
                each(self.copy(offset + HEADER, length));
                handed += 1;
            }
            position += (HEADER + length.next_multiple_of(8)) as u64;
            self.consumer.u64(0).store(position, Ordering::Release);
        }
        Ok(handed)
    }

    /// Waits until a record is committed, at most for `limit`; `false` when none came, or a signal did.
    pub(crate) fn wait(&self, limit: Duration) -> Result<bool, SysError> {
        let mut wanted = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        gated("poll", || {
            // SAFETY: the one structure is ours and lives past the call.
            let ready = unsafe { libc::poll(&raw mut wanted, 1, limit) };
            if ready >= 0 {
                return Ok(ready > 0);
            }
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) }
        })
    }

    /// Records are copied word by word: a second consumer on the same map would otherwise change a slice that we hand
    /// out as constant.
    fn copy(&mut self, offset: usize, length: usize) -> &[u8] {
        let producer = &self.producer;
        self.words.clear();
        self.words.extend((0..length.div_ceil(8)).map(|i| producer.u64(offset + 8 * i).load(Ordering::Relaxed)));
        // SAFETY: the words are initialised, a byte needs no alignment, and `length` is at most their bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), length) }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) fn page_size() -> usize {
    // SAFETY: the call takes a number and has no other effect.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(page).unwrap_or(4096)
}

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER: usize = 8;
