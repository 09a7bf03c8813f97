//! The journal: one small file per attachment, under `<run dir>/attachments/<id>`.
//!
//! ```text
//!  (no file) --create, O_EXCL--> {"intent": ..} --first change .. last change--> {"intent": ..}{"done": ..}
//!  {"done": ..} --teardown--> (no file)
//! ```
//!
//! The intent is written before the first change and holds every undo, so that whoever finds it after a kill can take
//! back what was begun. Files are only appended to, never flushed to disk: they outlive processes; a reboot removes
//! what they describe, and the boot id in them tells.
//!
//! Who works on an attachment holds a lock (flock) on its file, from before its addresses are leased until they are
//! recorded, and from before its devices go until its addresses are released: [`Hold`](crate::engine::Hold).

mod ledger;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::link::{LinkConfig, Policy, link_local_of_another};
use crate::model::{AttachmentId, AttachmentKey, IfIndex, LabelSet, MacAddr, Mtu, NetworkName, Workload};
use crate::netlink::{Gate, gate};
use crate::netns::NetNsId;
use crate::plan::{End, Undo};
use crate::provider::{Endpoint, Lease, Place};

pub use self::ledger::{Account, Ledger, LedgerError, Open, Page};

/// The directory of records.
#[derive(Debug)]
pub(crate) struct Journal {
    directory: PathBuf,
    boot: String,
}

/// What is known about an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The attachment.
    pub key: AttachmentKey,
    /// The boot during which it was made (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The identity of the host's namespace in which it was made; not in records of releases that did not write it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<NetNsId>,
    /// The path of the pod's namespace, as it was given.
    pub netns_path: PathBuf,
    /// The namespace's identity.
    pub netns: NetNsId,
    /// The caller's digest of the configuration.
    pub fingerprint: String,
    /// The link's configuration.
    pub link: LinkConfig,
    /// Addresses and routes.
    pub lease: Lease,
    /// The pod end's Ethernet address.
    pub mac: MacAddr,
    /// The workload, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// The workload's labels.
    #[serde(default, skip_serializing_if = "LabelSet::is_empty")]
    pub labels: LabelSet,
    /// Whether it is under policy.
    pub policy: Policy,
    /// The host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_end: Option<End>,
    /// What takes it all back, in the order in which it was planned.
    pub undo: Vec<Undo>,
    /// What came of it; `None` where the attach did not finish.
    #[serde(skip)]
    pub done: Option<Done>,
}

impl Record {
    /// What policy decides for; `None` of an attachment that was not finished, or whose devices' indices are not known.
    pub fn endpoint(&self) -> Option<Endpoint> {
        let done = self.done.as_ref()?;
        let mac = done.interfaces.iter().find(|i| i.sandbox.is_some())?.mac;
        let (place, ifindex, ifname) = match &self.host_end {
            Some(end) => (Place::Host, done.host_index?, end.name.clone()),
            None => {
                let place = Place::Pod { path: self.netns_path.clone(), netns: self.netns };
                (place, done.pod_index?, self.key.ifname.clone())
            }
        };
        Some(Endpoint {
            attachment: self.key.clone(),
            ifindex,
            ifname,
            place,
            mac,
            link_local: link_local_of_another(mac, self.mac, &self.key),
            addresses: self.lease.addresses.iter().map(|a| a.address.addr()).collect(),
            workload: self.workload.clone(),
            labels: self.labels.clone(),
        })
    }
}

/// The end of a successful attach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The devices, in the order of the CNI result: bridge, host's end, pod's end.
    pub interfaces: Vec<Interface>,
    /// The host end's index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_index: Option<IfIndex>,
    /// The index of the pod's device in its namespace, where there is no host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_index: Option<IfIndex>,
    /// What the pod's settings were made, by their paths below `/proc/sys/net`, as the kernel says it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
}

/// A device of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: MacAddr,
    /// Its MTU, where it stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// The namespace's path where it is the pod's, as the caller gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<PathBuf>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum WriteLine<'a> {
    Intent(&'a Record),
    Done(&'a Done),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum ReadLine {
    Intent(Box<Record>),
    Done(Done),
}

/// A record's file, open and locked.
#[derive(Debug)]
pub(crate) struct Entry {
    file: File,
    path: PathBuf,
}

/// What [`Journal::enter`] found.
pub(crate) enum Entered {
    New(Entry),
    Old(Entry),
}

// The lock is given up by name: a child that another thread is just forking has a copy of the descriptor, and closing
// ours would not end the lock before the child executes its program.
impl Drop for Entry {
    fn drop(&mut self) {
        if let Err(error) = self.file.unlock() {
            tracing::warn!(path = %self.path.display(), %error, "cannot unlock");
        }
    }
}

impl Journal {
    /// Opens the journal of a run directory. Creates nothing.
    pub(crate) fn open(run: &Path) -> Result<Self, JournalError> {
        Self::open_in(run.join("attachments"))
    }

    /// Opens a directory of records of another kind.
    pub(crate) fn open_in(directory: PathBuf) -> Result<Self, JournalError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = std::fs::read_to_string(path).map_err(|e| JournalError::io(path, e))?;
        Ok(Self { directory, boot: boot.trim().to_owned() })
    }

    /// Whether a record could be written now: makes the directory where it is missing, and in it a file without a name.
    pub(crate) fn ready(&self) -> Result<(), JournalError> {
        self.make_directory()?;
        match OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(&self.directory) {
            // A file system without nameless files (open(2), `O_TMPFILE`) tells nothing here.
            Err(error) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => {
                Err(JournalError::io(&self.directory, error))
            }
            _ => Ok(()),
        }
    }

    /// The id of this boot.
    pub(crate) fn boot(&self) -> &str {
        &self.boot
    }

    pub(crate) fn path(&self, id: AttachmentId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn make_directory(&self) -> Result<(), JournalError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        made.map_err(|e| JournalError::io(&self.directory, e))
    }

    /// Creates the record's file, or opens it where it exists; locks it.
    pub(crate) fn enter(&self, id: AttachmentId) -> Result<Entered, JournalError> {
        self.enter_at(&self.path(id))
    }

    fn enter_at(&self, path: &Path) -> Result<Entered, JournalError> {
        loop {
            let after = pass_gate("create record", path)?;
            let created = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path);
            after.finish(path)?;
            match created {
                Ok(file) => {
                    if let Some(entry) = Entry::lock(file, path)? {
                        return Ok(Entered::New(entry));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if let Some(entry) = self.open_entry_at(path)? {
                        return Ok(Entered::Old(entry));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.make_directory()?,
                Err(error) => return Err(JournalError::io(path, error)),
            }
        }
    }

    /// Opens, locks and reads an existing record. The record itself is `None` where its writer was killed before anything
    /// was done.
    pub(crate) fn find(&self, id: AttachmentId) -> Result<Option<(Entry, Option<Record>)>, JournalError> {
        let Some(mut entry) = self.open_entry(id)? else { return Ok(None) };
        let record = entry.read()?;
        Ok(Some((entry, record)))
    }

    /// Opens and locks the file of an existing record.
    pub(crate) fn open_entry(&self, id: AttachmentId) -> Result<Option<Entry>, JournalError> {
        self.open_entry_at(&self.path(id))
    }

    fn open_entry_at(&self, path: &Path) -> Result<Option<Entry>, JournalError> {
        loop {
            let file = match OpenOptions::new().read(true).append(true).open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(JournalError::io(path, error)),
            };
            if let Some(entry) = Entry::lock(file, path)? {
                return Ok(Some(entry));
            }
        }
    }

    /// The ids of all records.
    pub(crate) fn ids(&self) -> Result<Vec<AttachmentId>, JournalError> {
        let mut ids: Vec<_> = self.names()?.iter().filter_map(|name| name.parse().ok()).collect();
        ids.sort();
        Ok(ids)
    }

    /// The names of all files.
    fn names(&self) -> Result<Vec<String>, JournalError> {
        let directory = match std::fs::read_dir(&self.directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(JournalError::io(&self.directory, error)),
        };
        let mut names = Vec::new();
        for file in directory {
            let file = file.map_err(|e| JournalError::io(&self.directory, e))?;
            names.extend(file.file_name().into_string());
        }
        Ok(names)
    }

    /// Whether there is a record.
    pub(crate) fn exists(&self, id: AttachmentId) -> Result<bool, JournalError> {
        let path = self.path(id);
        path.try_exists().map_err(|e| JournalError::io(&path, e))
    }

    /// What a record's file holds, without its lock; `None` where there is none.
    pub(crate) fn bytes(&self, id: AttachmentId) -> Result<Option<Vec<u8>>, JournalError> {
        let path = self.path(id);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(JournalError::io(&path, error)),
        }
    }

    /// Whether a record's file is there, and says nothing.
    pub(crate) fn is_empty(&self, id: AttachmentId) -> Result<bool, JournalError> {
        let Some(bytes) = self.bytes(id)? else { return Ok(false) };
        // One that cannot be read says something.
        Ok(matches!(parse(&bytes, &self.path(id)), Ok(None)))
    }

    /// Reads all finished and unfinished records of a network, without their locks.
    pub(crate) fn records(&self, network: &NetworkName) -> Result<Vec<Record>, JournalError> {
        self.records_that(|record| record.key.network == *network)
    }

    /// As [`Journal::records`], of whatever network.
    pub(crate) fn records_that(&self, wanted: impl Fn(&Record) -> bool) -> Result<Vec<Record>, JournalError> {
        let mut records = Vec::new();
        for id in self.ids()? {
            let Some(bytes) = self.bytes(id)? else { continue };
            match parse(&bytes, &self.path(id)) {
                Ok(record) => records.extend(record.filter(&wanted)),
                // Whose it is cannot be told; it must not stand in the way of all others.
                Err(error) => tracing::warn!(%error, "record left out"),
            }
        }
        Ok(records)
    }

    /// The first record that `wanted` takes, of those in which `text` is some string. Others are not parsed, and none behind it
    /// is read.
    pub(crate) fn first_with<E: From<JournalError>>(
        &self,
        text: &str,
        wanted: impl Fn(&Record) -> Result<bool, E>,
    ) -> Result<Option<Record>, E> {
        let quoted = serde_json::Value::from(text).to_string().into_bytes();
        for id in self.ids()? {
            let Some(bytes) = self.bytes(id)? else { continue };
            if !bytes.windows(quoted.len()).any(|part| part == quoted) {
                continue;
            }
            match parse(&bytes, &self.path(id)) {
                Ok(Some(record)) if wanted(&record)? => return Ok(Some(record)),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "record left out"),
            }
        }
        Ok(None)
    }

    /// Waits until nobody, in any process, changes settings that attachments share, of the host or of a pod. Held shortly, and
    /// while nothing else is waited for.
    pub(crate) fn lock_settings(&self) -> Result<SettingsLock, JournalError> {
        self.make_directory()?;
        // The records themselves are locked one by one.
        let directory = File::open(&self.directory).map_err(|e| JournalError::io(&self.directory, e))?;
        directory.lock().map_err(|e| JournalError::io(&self.directory, e))?;
        Ok(SettingsLock(directory))
    }
}

/// The lock on settings, until it is dropped.
#[derive(Debug)]
pub(crate) struct SettingsLock(File);

// As for an entry.
impl Drop for SettingsLock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "cannot unlock the directory of records");
        }
    }
}

impl Entry {
    /// `None` where the file was removed, or another took its name, before the lock was had.
    fn lock(file: File, path: &Path) -> Result<Option<Self>, JournalError> {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(JournalError::io(path, error)),
        }
        // Links do not tell: a file that was set aside has a name still.
        let locked = file.metadata().map_err(|e| JournalError::io(path, e))?;
        let named = match std::fs::metadata(path) {
            Ok(named) => named,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(JournalError::io(path, error)),
        };
        let is_same = (locked.dev(), locked.ino()) == (named.dev(), named.ino());
        Ok(is_same.then(|| Self { file, path: path.to_owned() }))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What it says. Called once, for reading goes on where it ended.
    pub(crate) fn read(&mut self) -> Result<Option<Record>, JournalError> {
        let bytes = self.bytes()?;
        parse(&bytes, &self.path)
    }

    /// What it says, as it is written. As for [`read`](Self::read).
    pub(crate) fn bytes(&mut self) -> Result<Vec<u8>, JournalError> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).map_err(|e| JournalError::io(&self.path, e))?;
        Ok(bytes)
    }

    /// Writes what is about to be done.
    pub(crate) fn begin(&mut self, record: &Record) -> Result<(), JournalError> {
        self.append("write intent", &WriteLine::Intent(record))
    }

    /// Writes that it is done.
    pub(crate) fn complete(&mut self, done: &Done) -> Result<(), JournalError> {
        self.append("write completion", &WriteLine::Done(done))
    }

    /// Writes what the record says from now on, with its end, at once: who is killed over it leaves what it said.
    pub(crate) fn rewrite(&mut self, record: &Record) -> Result<(), JournalError> {
        let mut text = self.line(&WriteLine::Intent(record))?;
        if let Some(done) = &record.done {
            text.extend(self.line(&WriteLine::Done(done))?);
        }
        let after = pass_gate("rewrite record", &self.path)?;
        let length = self.file.metadata().map_err(|e| JournalError::io(&self.path, e))?.len();
        if let Err(error) = self.file.write_all(&text) {
            self.file.set_len(length).map_err(|e| JournalError::io(&self.path, e))?;
            return Err(JournalError::io(&self.path, error));
        }
        after.finish(&self.path)
    }

    fn line(&self, line: &impl Serialize) -> Result<Vec<u8>, JournalError> {
        let mut text = serde_json::to_vec(line).map_err(|e| JournalError::io(&self.path, e.into()))?;
        text.push(b'\n');
        Ok(text)
    }

    /// Writes one more line. `what` names it, for faults.
    pub(crate) fn append(&mut self, what: &'static str, line: &impl Serialize) -> Result<(), JournalError> {
        let text = self.line(line)?;
        let after = pass_gate(what, &self.path)?;
        self.file.write_all(&text).map_err(|e| JournalError::io(&self.path, e))?;
        after.finish(&self.path)
    }

    /// Has what was written outlive the machine's end, and the file too.
    pub(crate) fn sync(&self) -> Result<(), JournalError> {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let synced = self.file.sync_data().and_then(|()| File::open(directory)?.sync_all());
        synced.map_err(|e| JournalError::io(&self.path, e))
    }

    /// Forgets what was written, when it has been undone.
    pub(crate) fn clear(&mut self) -> Result<(), JournalError> {
        self.file.set_len(0).map_err(|e| JournalError::io(&self.path, e))
    }

    /// Puts a record that cannot be read out of the way, for people to look at.
    pub(crate) fn set_aside(&self) -> Result<(), JournalError> {
        match std::fs::rename(&self.path, self.path.with_extension("unreadable")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(JournalError::io(&self.path, error)),
            _ => Ok(()),
        }
    }

    /// Removes the record. Whoever waits for its lock finds that it is gone.
    pub(crate) fn remove(&self) -> Result<(), JournalError> {
        let after = pass_gate("remove record", &self.path)?;
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(JournalError::io(&self.path, error)),
            _ => {}
        }
        after.finish(&self.path)
    }
}

/// Reads a record. A last line without its end was being written by a process that was killed, and says nothing.
///
/// Bytes that are no text make a line malformed as anything else does, and are not replaced: a name would become another.
fn parse(bytes: &[u8], path: &Path) -> Result<Option<Record>, JournalError> {
    let mut record: Option<Record> = None;
    for (number, line) in whole_lines(bytes).enumerate() {
        let malformed = |reason: String| JournalError::Malformed { path: path.to_owned(), line: number + 1, reason };
        match serde_json::from_slice(line).map_err(|e| malformed(e.to_string()))? {
            ReadLine::Intent(intent) => record = Some(*intent),
            ReadLine::Done(done) => match &mut record {
                Some(record) => record.done = Some(done),
                None => return Err(malformed("a completion without its intent".to_owned())),
            },
        }
    }
    Ok(record)
}

/// The lines of a file whose end was written.
pub(crate) fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"))
}

/// Reads a record whatever is in its file. For fuzzing: it must not panic.
#[cfg(feature = "test-support")]
pub fn read_hostile_record(text: &str) -> Result<Option<Record>, JournalError> {
    parse(text.as_bytes(), Path::new("record"))
}

struct After(Gate);

impl After {
    fn finish(self, path: &Path) -> Result<(), JournalError> {
        match self.0 {
            Gate::Lose => Err(JournalError::io(path, io::Error::other("injected: outcome unknown"))),
            Gate::DieAfter => std::process::abort(),
            Gate::Pass | Gate::Fail(_) => Ok(()),
        }
    }
}

fn pass_gate(what: &'static str, path: &Path) -> Result<After, JournalError> {
    match gate(what) {
        Gate::Fail(errno) => Err(JournalError::io(path, io::Error::from_raw_os_error(errno))),
        gate => Ok(After(gate)),
    }
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Another process or thread works on the same attachment.
    #[error("{}: another process works on this attachment now; try again", path.display())]
    Busy {
        /// The record's file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// The record is not what this program writes.
    #[error("{}: line {line}: {reason}; detach the attachment, or remove the file once its devices are gone", path.display())]
    Malformed {
        /// The record's file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl JournalError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Target;

    fn record() -> Record {
        let key = AttachmentKey {
            network: "shop".parse().unwrap(),
            container: "c1".parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        };
        let end = End { name: key.id().host_ifname(), mac: key.mac() };
        Record {
            boot: "b".into(),
            host: Some(NetNsId { dev: 4, inode: 4_026_531_840 }),
            netns_path: "/run/netns/p".into(),
            netns: NetNsId { dev: 4, inode: 4_026_532_000 },
            fingerprint: "f".into(),
            link: serde_json::from_str(r#"{"kind": "bridge", "bridge": "dc0"}"#).unwrap(),
            lease: Lease { addresses: Vec::new(), routes: Vec::new(), dns: Default::default(), mac: None },
            mac: key.mac(),
            workload: Some("shop/db".parse().unwrap()),
            labels: LabelSet::from([("app".into(), "db".into())]),
            policy: Policy::Wanted,
            host_end: Some(end.clone()),
            undo: vec![Undo::DeleteLink { target: Target::Host, end }, Undo::DetachPolicy],
            done: None,
            key,
        }
    }

    #[test]
    fn a_record_cut_anywhere_says_what_was_written_whole() {
        let begun = record();
        let done =
            Done { interfaces: Vec::new(), host_index: IfIndex::new(7), pod_index: None, settings: BTreeMap::new() };
        let intent = serde_json::to_string(&WriteLine::Intent(&begun)).unwrap() + "\n";
        let text = intent.clone() + &serde_json::to_string(&WriteLine::Done(&done)).unwrap() + "\n";
        let finished = Record { done: Some(done), ..begun.clone() };
        for cut in 0..=text.len() {
            let expected = match cut {
                _ if cut < intent.len() => None,
                _ if cut < text.len() => Some(&begun),
                _ => Some(&finished),
            };
            assert_eq!(parse(&text.as_bytes()[..cut], Path::new("r")).unwrap().as_ref(), expected, "cut at {cut}");
        }
        // An attach that was taken back inside the same file begins anew.
        assert_eq!(parse((text + &intent).as_bytes(), Path::new("r")).unwrap(), Some(begun));
    }

    #[test]
    fn what_is_no_record_is_named_with_its_line() {
        let mut bad_byte = serde_json::to_vec(&WriteLine::Intent(&record())).unwrap();
        *bad_byte.iter_mut().rfind(|byte| byte.is_ascii_alphabetic()).unwrap() = 0xff;
        bad_byte.push(b'\n');
        for (text, line) in
            [(&b"x\n"[..], 1), (b"{\"done\": {\"interfaces\": []}}\n", 1), (b"{\"intent\": {}}\n", 1), (&bad_byte, 1)]
        {
            match parse(text, Path::new("r")) {
                Err(JournalError::Malformed { line: at, .. }) => assert_eq!(at, line),
                other => panic!("{other:?}"),
            }
        }
    }
}
