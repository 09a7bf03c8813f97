//! Watches of the log, across processes.
//!
//! A watch is a place in a log file: it reads frame by frame what commits append, and waits by inotify(7) on the
//! directory. Every event only makes it look again, so that lost or merged events cost nothing. A log that a merge has
//! replaced stays open and is read to its end; the new one goes on from there. Where the new one begins later, for it
//! was replaced more than once meanwhile or the watch was to begin before it, there is a gap up to its base: a snapshot
//! knows what is, not what happened.
//!
//! It tells frames whose checksum is sound and which [`View`] accepts, under the same rules as a read: what a writer
//! that was killed left half written is never told, what is written and not yet flushed may be.
//!
//! The cost is one descriptor for inotify, whose number fs.inotify.max_user_instances limits per user, and the space
//! of a log that was replaced until the watch has read it.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::frame::{self, HEADER};
use super::view::{Log, View};
use super::{LOG, Shared};
use crate::store::{Change, Key, StoreError, Watch};

pub(super) struct LogWatch {
    shared: Arc<Shared>,
    events: OwnedFd,
    prefix: Key,
    /// What was told, or was asked not to be.
    after: u64,
    /// Where the next frame is; `None` after a gap, and where the log begins after it.
    place: Option<Place>,
    /// Asked to begin beyond the newest revision.
    ahead: bool,
}

#[derive(Debug)]
struct Place {
    log: Arc<Log>,
    offset: u64,
    /// The revision of the frame before.
    revision: u64,
    /// What was read from there on, and how much of it is used.
    bytes: Vec<u8>,
    used: usize,
}

impl Place {
    fn start(log: Arc<Log>) -> Self {
        let revision = log.base;
        Self { log, offset: HEADER, revision, bytes: Vec::new(), used: 0 }
    }
}

impl LogWatch {
    pub(super) fn open(shared: Arc<Shared>, prefix: &[u8], after: u64) -> Result<Self, StoreError> {
        let doing = |doing: &str| {
            let dir = shared.disk.path("");
            let doing = format!("cannot {doing} {} (see fs.inotify.max_user_instances and _watches)", dir.display());
            move |e: Errno| StoreError::Io { doing, source: e.into() }
        };
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(doing("watch"))?;
        // Frames are written, and a log that replaces another is moved to its name.
        inotify::add_watch(&events, shared.disk.path(""), WatchFlags::MODIFY | WatchFlags::MOVED_TO)
            .map_err(doing("watch"))?;
        let (ahead, place) = {
            let mut view = shared.view.lock();
            shared.refresh(&mut view)?;
            let ahead = after > view.revision;
            // The log is held from now on, should a merge come before the first look.
            let begins = !ahead && !view.log.stale && view.log.base <= after;
            (ahead, begins.then(|| Place::start(view.log.clone())))
        };
        Ok(Self { shared, events, prefix: prefix.to_vec(), after, place, ahead })
    }

    /// The next change that is there.
    fn look(&mut self) -> Result<Option<Change>, StoreError> {
        let shared = self.shared.clone();
        // Frames are read outside the view's lock: they do not change once they are sound.
        let (log, end, newest) = {
            let mut view = shared.view.lock();
            shared.refresh(&mut view)?;
            let View { log, end, revision, .. } = &*view;
            (log.clone(), *end, *revision)
        };
        if std::mem::take(&mut self.ahead) {
            return Ok(Some(self.gap(newest)));
        }
        loop {
            let Some(place) = &mut self.place else {
                if self.after == newest {
                    return Ok(None);
                }
                // What a stale log lacks is in the snapshot alone.
                if log.stale || log.base > self.after || newest < self.after {
                    let to = if log.stale || newest < self.after { newest } else { log.base };
                    return Ok(Some(self.gap(to)));
                }
                self.place = Some(Place::start(log.clone()));
                continue;
            };
            let same = place.log.identity == log.identity && place.log.generation == log.generation && !log.stale;
            if let Some(change) = read_on(&shared, place, same.then_some(end), &self.prefix, &mut self.after)? {
                return Ok(Some(change));
            }
            if same {
                if place.revision != newest {
                    // Not the log that was read from: somebody has put another one into its place by hand.
                    return Ok(Some(self.gap(newest)));
                }
                return Ok(None);
            }
            // The log is read to its end, and the next one goes on from there or begins later.
            self.after = self.after.max(place.revision);
            self.place = None;
        }
    }

    fn gap(&mut self, revision: u64) -> Change {
        self.after = revision;
        self.place = None;
        Change::Gap { revision }
    }

    /// Waits until something may have changed; false when the deadline has passed.
    fn wait(&self, deadline: Option<Instant>) -> Result<bool, StoreError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(false);
        }
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(&self.events, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => Ok(false),
            Ok(_) | Err(Errno::INTR) => Ok(true),
            Err(e) => Err(StoreError::Io { doing: "cannot wait for inotify".to_owned(), source: e.into() }),
        }
    }

    /// Forgets the events so far, all of which say the same: look.
    fn clear(&self) -> Result<(), StoreError> {
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut events = inotify::Reader::new(&self.events, &mut buffer);
        loop {
            match events.next() {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(StoreError::Io { doing: "cannot read inotify".to_owned(), source: e.into() }),
            }
        }
    }
}

/// The next change from a place on, which is moved behind it. `end` is where frames end if the log still grows.
fn read_on(
    shared: &Shared,
    place: &mut Place,
    end: Option<u64>,
    prefix: &[u8],
    after: &mut u64,
) -> Result<Option<Change>, StoreError> {
    loop {
        if place.used == place.bytes.len() {
            let end = match end {
                Some(end) => end,
                None => place.log.file.metadata().map(|m| m.len()).map_err(|source| StoreError::Io {
                    doing: format!("cannot look at {}", shared.disk.path(LOG).display()),
                    source,
                })?,
            };
            let length = end.saturating_sub(place.offset) as usize;
            (place.bytes, place.used) = (shared.disk.read_at(&place.log.file, LOG, place.offset, length)?, 0);
        }
        let rest = &place.bytes[place.used..];
        let frame = frame::decode(place.log.generation, place.offset, rest)
            .filter(|frame| frame.revision == place.revision + 1);
        let Some(frame) = frame else {
            place.bytes.clear();
            place.used = 0;
            return Ok(None);
        };
        place.used += frame.size;
        place.offset += frame.size as u64;
        place.revision = frame.revision;
        if frame.revision <= *after {
            continue;
        }
        *after = frame.revision;
        if let Some(change) = Change::of_batch(frame.revision, &frame.writes, prefix) {
            return Ok(Some(change));
        }
    }
}

#[async_trait]
impl Watch for LogWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        loop {
            // Before the look: what is written after it makes a new event.
            self.clear()?;
            if let Some(change) = self.look()? {
                return Ok(Some(change));
            }
            if !self.wait(deadline)? {
                return Ok(None);
            }
        }
    }
}
