//! A ledger: what is done to devices that outlive processes, attachments and boots, in one file for each device, under
//! `<state dir>/<kind>/<key>`.
//!
//! ```text
//!  (no file) --> {"standing": ..} --> {"begun": {"incarnation": 7, ..}} --> {"step": ..} .. --> {"ended": 7} --> {"begun": ..}
//!                  flushed to disk      flushed, before the first change
//! ```
//!
//! - What *stands* is true of the device whoever has it, such as what it was before anybody had it. The last one counts.
//! - What is *begun* is the intent to change it, with all that is needed to take the changes back. Its incarnation is a
//!   number that no other intent of the device ever has: whoever wants to end it must name it, and cannot end a later one.
//! - *Steps* say how far it came. They are not flushed: they outlive their process, and a reboot undoes what they tell of.
//!
//! The file stays when all has ended, for the numbers go on from it. While it is open it is locked (flock). A last line
//! without its end was being written by a process that was killed, or by a machine that lost its power: it says nothing,
//! and is cut off. What is otherwise unreadable is set aside, never overwritten.

use std::fs::{self, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Entered, Entry, Journal, JournalError, whole_lines};

/// The files of one kind of device. `S` is what stands, `I` an intent, `T` a step.
///
/// ```
/// # use dcenet_core::journal::Ledger;
/// # let state = tempfile::tempdir()?;
/// // The device's colour, the one that it is to get, and the coats so far.
/// let ledger = Ledger::<String, String, u32>::open(state.path(), "fences")?;
/// let mut page = ledger.enter("0000:03:10.2")?;
/// page.stand(&"white".to_owned())?;
/// let incarnation = page.begin(&"red".to_owned())?;
/// page.step(&1)?;
/// drop(page);
///
/// // After a kill.
/// let mut page = ledger.enter("0000:03:10.2")?;
/// let account = page.account()?;
/// assert_eq!(account.standing.as_deref(), Some("white"));
/// let open = account.open.as_ref().expect("begun and not ended");
/// assert_eq!((open.incarnation, &*open.intent, &*open.steps), (incarnation, "red", &[1][..]));
/// page.end()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ledger<S, I, T> {
    journal: Journal,
    lines: PhantomData<(S, I, T)>,
}

/// What a file of a [`Ledger`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account<S, I, T> {
    /// What is true of the device whoever has it; `None` where nobody has said yet.
    pub standing: Option<S>,
    /// The last incarnation, also one that has ended; 0 before the first.
    pub last: u64,
    /// What was begun and has not ended.
    pub open: Option<Open<I, T>>,
}

/// What was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open<I, T> {
    /// Its number.
    pub incarnation: u64,
    /// The boot during which it was begun (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// What was wanted.
    pub intent: I,
    /// How far it came.
    pub steps: Vec<T>,
}

/// A file of a [`Ledger`], open and locked until this is dropped.
#[derive(Debug)]
pub struct Page<S, I, T> {
    key: String,
    boot: String,
    entry: Entry,
    /// How much of the file is whole lines.
    len: u64,
    account: Result<Account<S, I, T>, Damage>,
}

#[derive(Debug, Clone)]
struct Damage {
    line: usize,
    reason: String,
    /// The greatest incarnation that can still be read.
    last: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum WriteLine<'a, S, I, T> {
    Standing(&'a S),
    Begun(Begun<&'a str, &'a I>),
    Step(&'a T),
    Ended(u64),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase", bound(deserialize = "S: DeserializeOwned, I: DeserializeOwned, T: DeserializeOwned"))]
enum ReadLine<S, I, T> {
    Standing(S),
    Begun(Begun<String, I>),
    Step(T),
    Ended(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Begun<B, I> {
    incarnation: u64,
    boot: B,
    intent: I,
}

impl<S, I, T> Default for Account<S, I, T> {
    fn default() -> Self {
        Self { standing: None, last: 0, open: None }
    }
}

impl<S, I, T> Account<S, I, T> {
    fn read(&mut self, line: ReadLine<S, I, T>) -> Result<(), String> {
        match line {
            ReadLine::Standing(standing) => self.standing = Some(standing),
            ReadLine::Begun(Begun { incarnation, boot, intent }) => {
                if let Some(open) = &self.open {
                    return Err(format!("incarnation {incarnation} begins before {} has ended", open.incarnation));
                }
                if incarnation <= self.last {
                    return Err(format!("incarnation {incarnation} follows {}", self.last));
                }
                self.last = incarnation;
                self.open = Some(Open { incarnation, boot, intent, steps: Vec::new() });
            }
            ReadLine::Step(step) => match &mut self.open {
                Some(open) => open.steps.push(step),
                None => return Err("a step of nothing that was begun".to_owned()),
            },
            ReadLine::Ended(incarnation) => match self.open.take() {
                Some(open) if open.incarnation != incarnation => {
                    return Err(format!("incarnation {incarnation} ends, but {} was begun", open.incarnation));
                }
                Some(_) => {}
                // The first line of a file that was written anew.
                None if incarnation > self.last => self.last = incarnation,
                None => return Err(format!("incarnation {incarnation} ends and was not begun")),
            },
        }
        Ok(())
    }
}

impl<S, I, T> Ledger<S, I, T>
where
    S: Serialize + DeserializeOwned + Clone,
    I: Serialize + DeserializeOwned + Clone,
    T: Serialize + DeserializeOwned + Clone,
{
    /// The ledger of a kind of devices. `state` is a directory that a reboot does not empty. Creates nothing.
    ///
    /// # Errors
    /// Where the boot's id cannot be read.
    pub fn open(state: &Path, kind: &str) -> Result<Self, LedgerError> {
        Ok(Self { journal: Journal::open_in(state.join(kind))?, lines: PhantomData })
    }

    /// The id of this boot.
    pub fn boot(&self) -> &str {
        self.journal.boot()
    }

    /// Opens and locks a device's file; makes it where it is missing.
    ///
    /// # Errors
    /// [`LedgerError::Busy`] where somebody has it now. What is in it may be unreadable all the same:
    /// [`Page::account`] tells.
    pub fn enter(&self, key: &str) -> Result<Page<S, I, T>, LedgerError> {
        let path = self.path(key)?;
        match self.journal.enter_at(&path).map_err(|e| LedgerError::of(key, e))? {
            Entered::New(entry) | Entered::Old(entry) => self.page(key, entry),
        }
    }

    /// As [`enter`](Self::enter), and `None` where there is no file.
    ///
    /// # Errors
    /// As of [`enter`](Self::enter).
    pub fn find(&self, key: &str) -> Result<Option<Page<S, I, T>>, LedgerError> {
        let path = self.path(key)?;
        let entry = self.journal.open_entry_at(&path).map_err(|e| LedgerError::of(key, e))?;
        entry.map(|entry| self.page(key, entry)).transpose()
    }

    /// What a device's file says, without its lock; `None` where there is none. It may be old when it is told.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] too.
    pub fn read(&self, key: &str) -> Result<Option<Account<S, I, T>>, LedgerError> {
        let path = self.path(key)?;
        match fs::read(&path) {
            Ok(bytes) => parse(&bytes).map(|(account, _)| Some(account)).map_err(|d| d.error(&path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(JournalError::io(&path, error).into()),
        }
    }

    /// The keys of all devices that have a file, sorted.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn keys(&self) -> Result<Vec<String>, LedgerError> {
        let mut keys: Vec<_> = self.journal.names()?.into_iter().filter(|name| is_key(name)).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    fn path(&self, key: &str) -> Result<PathBuf, LedgerError> {
        if is_key(key) { Ok(self.journal.directory.join(key)) } else { Err(LedgerError::Key { key: key.to_owned() }) }
    }

    fn page(&self, key: &str, mut entry: Entry) -> Result<Page<S, I, T>, LedgerError> {
        let bytes = entry.bytes()?;
        let (account, len) = match parse(&bytes) {
            Ok((account, len)) => (Ok(account), len),
            Err(damage) => (Err(damage), bytes.len() as u64),
        };
        Ok(Page { key: key.to_owned(), boot: self.boot().to_owned(), entry, len, account })
    }
}

impl<S, I, T> Page<S, I, T>
where
    S: Serialize + DeserializeOwned + Clone,
    I: Serialize + DeserializeOwned + Clone,
    T: Serialize + DeserializeOwned + Clone,
{
    /// The device.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What the file says, with what was written since.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`]: then nothing can be written either, until it is [set aside](Self::set_aside).
    pub fn account(&self) -> Result<&Account<S, I, T>, LedgerError> {
        self.account.as_ref().map_err(|damage| damage.error(self.entry.path()))
    }

    /// Writes what is true of the device whoever has it, and flushes it to disk. A file that has become long is written
    /// anew, where nothing is open.
    ///
    /// # Errors
    /// Where the file cannot be written. It is as before; where it cannot be cut off either, which is logged, it may say
    /// what was to be written.
    pub fn stand(&mut self, standing: &S) -> Result<(), LedgerError> {
        let account = self.account()?;
        if self.len > COMPACT && account.open.is_none() {
            let last = account.last;
            return self.replace(Some(standing), last);
        }
        self.write("write standing", &WriteLine::Standing(standing), Flush::Now)?;
        self.change(|account| account.standing = Some(standing.clone()))
    }

    /// Writes what is about to be done, flushes it to disk, and returns its number, which no other intent of the device
    /// ever has: it is greater than the last, and than the number of microseconds from 1970 until now, in case the file was
    /// lost.
    ///
    /// # Errors
    /// [`LedgerError::Open`] where something was begun and has not ended; where the file cannot be written, and then it is
    /// as before.
    pub fn begin(&mut self, intent: &I) -> Result<u64, LedgerError> {
        let account = self.account()?;
        if let Some(open) = &account.open {
            return Err(LedgerError::Open { key: self.key.clone(), incarnation: open.incarnation });
        }
        if self.len > COMPACT {
            let (standing, last) = (account.standing.clone(), account.last);
            self.replace(standing.as_ref(), last)?;
        }
        let last = self.account()?.last;
        let incarnation = last.saturating_add(1).max(microseconds());
        let boot = self.boot.clone();
        let begun = Begun { incarnation, boot: &*boot, intent };
        self.write("write intent", &WriteLine::Begun(begun), Flush::Now)?;
        let open = Open { incarnation, boot, intent: intent.clone(), steps: Vec::new() };
        self.change(|account| {
            account.last = incarnation;
            account.open = Some(open);
        })?;
        Ok(incarnation)
    }

    /// Writes how far it came.
    ///
    /// # Errors
    /// [`LedgerError::NotOpen`] where nothing was begun; where the file cannot be written, and then it is as before.
    pub fn step(&mut self, step: &T) -> Result<(), LedgerError> {
        self.open()?;
        self.write("write step", &WriteLine::Step(step), Flush::Later)?;
        self.change(|account| account.open.iter_mut().for_each(|open| open.steps.push(step.clone())))
    }

    /// Writes that what was begun has ended.
    ///
    /// # Errors
    /// As of [`step`](Self::step).
    pub fn end(&mut self) -> Result<(), LedgerError> {
        let incarnation = self.open()?.incarnation;
        self.write("write end", &WriteLine::Ended(incarnation), Flush::Later)?;
        self.change(|account| account.open = None)
    }

    /// Puts a file that cannot be read out of the way, as `<key>.unreadable-N`, for people to look at, and begins a new one
    /// with `standing`, both or nothing. Returns where the old one is.
    ///
    /// # Errors
    /// Where the file system refuses it.
    pub fn set_aside(&mut self, standing: &S) -> Result<PathBuf, LedgerError> {
        let last = self.account.as_ref().map_or_else(|damage| damage.last, |account| account.last);
        let path = self.entry.path().to_owned();
        let mut number = 1;
        let aside = loop {
            let aside = suffixed(&path, &format!("{UNREADABLE}{number}"));
            match fs::hard_link(&path, &aside) {
                Ok(()) => break aside,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(JournalError::io(&aside, error).into()),
            }
        };
        self.replace(Some(standing), last)?;
        Ok(aside)
    }

    /// What was begun.
    fn open(&self) -> Result<&Open<I, T>, LedgerError> {
        self.account()?.open.as_ref().ok_or_else(|| LedgerError::NotOpen { key: self.key.clone() })
    }

    fn change(&mut self, f: impl FnOnce(&mut Account<S, I, T>)) -> Result<(), LedgerError> {
        match &mut self.account {
            Ok(account) => {
                f(account);
                Ok(())
            }
            Err(damage) => Err(damage.error(self.entry.path())),
        }
    }

    fn write(&mut self, what: &'static str, line: &WriteLine<'_, S, I, T>, flush: Flush) -> Result<(), LedgerError> {
        // What a killed process began to write, or this one and was refused, must not become one line with the next.
        let length = |entry: &Entry| entry.file.metadata().map(|m| m.len());
        let now = length(&self.entry).map_err(|e| JournalError::io(self.entry.path(), e))?;
        if now != self.len {
            self.entry.file.set_len(self.len).map_err(|e| JournalError::io(self.entry.path(), e))?;
        }
        self.entry.append(what, line)?;
        if flush == Flush::Now
            && let Err(error) = self.entry.sync()
        {
            // The line is whole, and would count for whoever reads it next.
            if let Err(error) = self.entry.file.set_len(self.len) {
                tracing::warn!(path = %self.entry.path().display(), %error, "may say what was not flushed");
            }
            return Err(error.into());
        }
        self.len = length(&self.entry).map_err(|e| JournalError::io(self.entry.path(), e))?;
        Ok(())
    }

    /// Writes the file anew: a whole one takes the place of the old one.
    fn replace(&mut self, standing: Option<&S>, last: u64) -> Result<(), LedgerError> {
        let path = self.entry.path().to_owned();
        let new = suffixed(&path, NEW);
        let failed = |e| LedgerError::from(JournalError::io(&new, e));
        // One that a killed process left is nobody's: only who has the device's lock comes here.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let options = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&new);
        // Locked before it has the name under which others find it.
        let mut entry =
            Entry::lock(options.map_err(failed)?, &new)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        if last > 0 {
            entry.append("write anew", &WriteLine::<S, I, T>::Ended(last))?;
        }
        if let Some(standing) = standing {
            entry.append("write anew", &WriteLine::<S, I, T>::Standing(standing))?;
        }
        entry.sync()?;
        fs::rename(&new, &path).map_err(failed)?;
        entry.path.clone_from(&path);
        entry.sync()?;
        self.len = entry.file.metadata().map_err(|e| JournalError::io(&path, e))?.len();
        self.entry = entry;
        self.account = Ok(Account { standing: standing.cloned(), last, open: None });
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    Now,
    Later,
}

impl Damage {
    fn error(&self, path: &Path) -> LedgerError {
        LedgerError::Malformed { path: path.to_owned(), line: self.line, reason: self.reason.clone() }
    }
}

/// What the whole lines say, and how long they are.
fn parse<S, I, T>(bytes: &[u8]) -> Result<(Account<S, I, T>, u64), Damage>
where
    S: DeserializeOwned,
    I: DeserializeOwned,
    T: DeserializeOwned,
{
    let mut account = Account::default();
    let mut len = 0;
    for (number, line) in whole_lines(bytes).enumerate() {
        let read = serde_json::from_slice(line).map_err(|e| e.to_string()).and_then(|line| account.read(line));
        if let Err(reason) = read {
            return Err(Damage { line: number + 1, reason, last: last_of(bytes) });
        }
        len += line.len() as u64;
    }
    Ok((account, len))
}

/// The greatest incarnation of a file, of which not all can be read.
fn last_of(bytes: &[u8]) -> u64 {
    type Any = ReadLine<serde::de::IgnoredAny, serde::de::IgnoredAny, serde::de::IgnoredAny>;
    let numbers = whole_lines(bytes).filter_map(|line| match serde_json::from_slice::<Any>(line).ok()? {
        ReadLine::Begun(begun) => Some(begun.incarnation),
        ReadLine::Ended(incarnation) => Some(incarnation),
        _ => None,
    });
    numbers.max().unwrap_or_default()
}

fn microseconds() -> u64 {
    // A clock that is before 1970 only means that the numbers go on from the last.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or_default()
}

/// Whether it can be the name of a file, and is none of those that a ledger itself makes.
fn is_key(key: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b':' | b'.' | b'_' | b'-');
    !key.is_empty()
        && key.len() <= 200
        && !key.starts_with('.')
        && key.bytes().all(plain)
        && !key.ends_with(NEW)
        && !key.contains(UNREADABLE)
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Why a ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Another process or thread works on the device.
    #[error("{key}: another process works on this device now; try again")]
    Busy {
        /// The device.
        key: String,
    },
    /// It cannot be the name of a file.
    #[error("{key:?} cannot name a device's file: letters, digits and \":._-\" can, not in front a point")]
    Key {
        /// What was given.
        key: String,
    },
    /// Something was begun with the device and has not ended.
    #[error("{key}: incarnation {incarnation} has not ended; end or recover it first")]
    Open {
        /// The device.
        key: String,
        /// What was begun.
        incarnation: u64,
    },
    /// Nothing was begun with the device.
    #[error("{key}: nothing was begun; begin first")]
    NotOpen {
        /// The device.
        key: String,
    },
    /// The file is not what this program writes.
    #[error("{}: line {line}: {reason}; recovery sets the file aside, and nobody gets the device until it was looked at", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] JournalError),
}

impl LedgerError {
    fn of(key: &str, error: JournalError) -> Self {
        match error {
            JournalError::Busy { .. } => Self::Busy { key: key.to_owned() },
            error => Self::Io(error),
        }
    }
}

const NEW: &str = ".new";
const UNREADABLE: &str = ".unreadable-";
/// How long a file may become, in bytes, until it is written anew: some dozens of intents.
const COMPACT: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    type Fences = Ledger<String, String, u32>;
    const KEY: &str = "0000:03:10.2";

    fn write_one(ledger: &Fences) -> [u64; 2] {
        let mut page = ledger.enter(KEY).unwrap();
        page.stand(&"white".to_owned()).unwrap();
        let first = page.begin(&"red".to_owned()).unwrap();
        page.step(&1).unwrap();
        page.step(&2).unwrap();
        page.end().unwrap();
        let second = page.begin(&"blue".to_owned()).unwrap();
        page.step(&1).unwrap();
        [first, second]
    }

    #[test]
    fn a_file_cut_anywhere_says_what_was_written_whole_and_goes_on_from_there() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        let [first, second] = write_one(&ledger);
        let path = state.path().join("fences").join(KEY);
        let whole = fs::read(&path).unwrap();
        let mut states = Vec::new();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let seen = ledger.read(KEY).unwrap().unwrap();
            let mut page = ledger.enter(KEY).unwrap();
            assert_eq!(page.account().unwrap(), &seen, "cut at {cut}");
            // What is written next is a line of its own, whatever the cut left.
            let expected = match &seen.open {
                Some(open) => {
                    page.step(&9).unwrap();
                    let steps = open.steps.iter().copied().chain([9]).collect();
                    Account { open: Some(Open { steps, ..open.clone() }), ..seen.clone() }
                }
                None => {
                    page.stand(&"green".to_owned()).unwrap();
                    Account { standing: Some("green".to_owned()), ..seen.clone() }
                }
            };
            assert_eq!(page.account().unwrap(), &expected, "cut at {cut}");
            drop(page);
            assert_eq!(ledger.read(KEY).unwrap().unwrap(), expected, "cut at {cut}");
            if states.last() != Some(&seen) {
                states.push(seen);
            }
        }
        let boot = ledger.boot().to_owned();
        let standing = Some("white".to_owned());
        let open = |incarnation, intent: &str, steps: &[u32]| {
            Some(Open { incarnation, boot: boot.clone(), intent: intent.to_owned(), steps: steps.to_vec() })
        };
        let at = |last, open| Account { standing: standing.clone(), last, open };
        let expected = [
            Account::default(),
            at(0, None),
            at(first, open(first, "red", &[])),
            at(first, open(first, "red", &[1])),
            at(first, open(first, "red", &[1, 2])),
            at(first, None),
            at(second, open(second, "blue", &[])),
            at(second, open(second, "blue", &[1])),
        ];
        assert_eq!(states, expected);
    }

    #[test]
    fn numbers_never_repeat_though_the_file_is_written_anew_or_lost() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        let path = state.path().join("fences").join(KEY);
        let (mut last, mut longest, mut shrank) = (0, 0, 0);
        let colour = "red".repeat(1000);
        for round in 0..200 {
            let mut page = ledger.enter(KEY).unwrap();
            if round == 0 {
                page.stand(&"white".to_owned()).unwrap();
            }
            let incarnation = page.begin(&colour).unwrap();
            assert!(incarnation > last, "{incarnation} after {last}");
            assert!(matches!(page.begin(&colour), Err(LedgerError::Open { incarnation: i, .. }) if i == incarnation));
            last = incarnation;
            page.end().unwrap();
            assert!(matches!(page.end(), Err(LedgerError::NotOpen { .. })));
            let len = fs::metadata(&path).unwrap().len();
            shrank += u32::from(len < longest);
            longest = longest.max(len);
        }
        assert!(shrank > 0 && longest < COMPACT + 10_000, "{longest} bytes, {shrank} times shorter");
        assert_eq!(ledger.read(KEY).unwrap().unwrap().standing.as_deref(), Some("white"));
        assert_eq!(ledger.keys().unwrap(), [KEY]);
        fs::remove_file(&path).unwrap();
        assert!(ledger.enter(KEY).unwrap().begin(&colour).unwrap() > last);
    }

    #[test]
    fn what_stands_is_written_anew_when_the_file_is_long_and_nothing_is_open() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        let path = state.path().join("fences").join(KEY);
        let mut page = ledger.enter(KEY).unwrap();
        let last = page.begin(&"red".to_owned()).unwrap();
        let colours = |round: usize| format!("{round}{}", "white".repeat(500));
        for round in 0..100 {
            page.stand(&colours(round)).unwrap();
        }
        // Open, it keeps all that it needs.
        assert!(fs::metadata(&path).unwrap().len() > COMPACT && page.account().unwrap().open.is_some());
        page.end().unwrap();
        for round in 0..100 {
            page.stand(&colours(round)).unwrap();
            let read = ledger.read(KEY).unwrap().unwrap();
            assert_eq!((read.standing, read.last), (Some(colours(round)), last));
        }
        assert!(fs::metadata(&path).unwrap().len() < COMPACT + 10_000);
        assert!(matches!(ledger.enter(KEY), Err(LedgerError::Busy { .. })));
    }

    #[test]
    fn who_had_opened_a_file_before_it_was_set_aside_gets_the_one_that_took_its_place() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        write_one(&ledger);
        let path = state.path().join("fences").join(KEY);
        let before = OpenOptions::new().read(true).append(true).open(&path).unwrap();
        let mut page = ledger.enter(KEY).unwrap();
        page.set_aside(&"unknown".to_owned()).unwrap();
        drop(page);
        assert!(before.metadata().unwrap().nlink() > 0);
        assert!(Entry::lock(before, &path).unwrap().is_none());
        let now = OpenOptions::new().read(true).append(true).open(&path).unwrap();
        assert!(Entry::lock(now, &path).unwrap().is_some());
    }

    #[test]
    fn an_unreadable_file_is_set_aside_whole_and_its_numbers_go_on() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        let [_, second] = write_one(&ledger);
        let path = state.path().join("fences").join(KEY);
        let mut damaged = fs::read(&path).unwrap();
        damaged[3] = 0xff;
        for number in 1..=2 {
            fs::write(&path, &damaged).unwrap();
            let mut page = ledger.enter(KEY).unwrap();
            assert!(matches!(page.account(), Err(LedgerError::Malformed { line: 1, .. })));
            assert!(matches!(page.begin(&"red".to_owned()), Err(LedgerError::Malformed { .. })));
            let aside = page.set_aside(&"unknown".to_owned()).unwrap();
            assert_eq!(aside, suffixed(&path, &format!(".unreadable-{number}")));
            assert_eq!(fs::read(&aside).unwrap(), damaged);
            // The lock is on the file that has the name now.
            assert!(matches!(ledger.enter(KEY), Err(LedgerError::Busy { .. })));
            assert!(page.begin(&"red".to_owned()).unwrap() > second);
            assert_eq!(page.account().unwrap().standing.as_deref(), Some("unknown"));
        }
        assert_eq!(ledger.keys().unwrap(), [KEY]);
        assert!(ledger.read(KEY).unwrap().is_some_and(|account| account.open.is_some()));
    }

    #[test]
    fn what_no_ledger_writes_is_named_with_its_line() {
        let begun = |n: u64| format!("{{\"begun\":{{\"incarnation\":{n},\"boot\":\"b\",\"intent\":\"red\"}}}}\n");
        for (text, line) in [
            ("x\n".to_owned(), 1),
            ("{\"step\":1}\n".to_owned(), 1),
            (begun(5) + &begun(6), 2),
            (begun(5) + "{\"ended\":5}\n" + &begun(5), 3),
            (begun(5) + "{\"ended\":4}\n", 2),
            (begun(5) + "{\"ended\":5}\n{\"ended\":5}\n", 3),
            ("{\"standing\":1}\n".to_owned(), 1),
        ] {
            let damage = parse::<String, String, u32>(text.as_bytes()).unwrap_err();
            assert_eq!(damage.line, line, "{text}: {}", damage.reason);
        }
    }

    #[test]
    fn keys_are_names_of_files_and_no_others() {
        let state = tempfile::tempdir().unwrap();
        let ledger = Fences::open(state.path(), "fences").unwrap();
        assert!(ledger.keys().unwrap().is_empty() && ledger.find(KEY).unwrap().is_none());
        for bad in ["", ".", "..", "../x", "a/b", "x.new", "x.unreadable-1", "a b", &"x".repeat(300)] {
            assert!(matches!(ledger.enter(bad), Err(LedgerError::Key { .. })), "{bad}");
        }
    }
}
