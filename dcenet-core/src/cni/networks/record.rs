//! What was begun and done for a pod: one file for each attachment of several networks, under
//! `<state dir>/networks/<id>`.
//!
//! ```text
//!  (no file) --create--> {"intent": ..} -> {"begun": 0} {"told": ..} {"begun": 1} .. -> {"done": ..}
//!  any of these --all is taken back--> (no file)
//! ```
//!
//! The intent and the end are flushed to disk, for plugins keep addresses over a reboot and have to be told of it: what
//! comes between says only how far a process got that was killed. After a reboot an intent alone means all of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::Network;
use crate::engine::Steering;
use crate::journal::{Entered, Entry, Journal, JournalError};
use crate::model::{AttachmentKey, NetworkName};
use crate::netns::NetNsId;

/// The directory of records.
#[derive(Debug)]
pub(super) struct Records(Journal);

/// What is about to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Intent {
    /// The attachment, as the runtime knows it.
    pub(super) key: AttachmentKey,
    /// The boot during which it was made.
    pub(super) boot: String,
    /// The path of the pod's namespace, as it was given.
    pub(super) netns_path: PathBuf,
    /// The namespace's identity.
    pub(super) netns: NetNsId,
    /// A digest of the networks.
    pub(super) fingerprint: String,
    /// The networks, in the order in which they are attached.
    pub(super) networks: Vec<Network>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Done {
    /// The result, in the newest version's form.
    pub(super) result: Value,
    /// The `network-status` of the standard.
    pub(super) status: Vec<Value>,
}

/// Everything that a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) intent: Intent,
    /// How many networks were begun.
    pub(super) begun: usize,
    /// The last result of each network, where there is one.
    pub(super) told: Vec<Option<Value>>,
    /// What decides where its packets go.
    pub(super) steering: Option<Steering>,
    pub(super) done: Option<Done>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Line {
    Intent(Box<Intent>),
    /// The network of this number is attached next.
    Begun(usize),
    /// A plugin of the network answered.
    Told {
        network: usize,
        result: Value,
    },
    /// Routes and rules are added next.
    Steering(Steering),
    Done(Done),
}

/// A record's file, open and locked.
#[derive(Debug)]
pub(super) struct Held {
    entry: Entry,
    /// What it says; `Err` where that cannot be read.
    pub(super) record: Result<Option<Record>, JournalError>,
    /// Whether its file says nothing, and goes when nobody holds it.
    empty: bool,
}

impl Record {
    /// Of what is about to be done.
    pub(super) fn of(intent: Intent) -> Self {
        Self { begun: 0, told: vec![None; intent.networks.len()], steering: None, done: None, intent }
    }
}

impl Records {
    /// The records of a state directory. Creates nothing.
    pub(super) fn open(state: &Path) -> Result<Self, JournalError> {
        Journal::open_in(state.join("networks")).map(Self)
    }

    /// The id of this boot.
    pub(super) fn boot(&self) -> &str {
        self.0.boot()
    }

    /// Whether a record could be written now.
    pub(super) fn ready(&self) -> Result<(), JournalError> {
        self.0.ready()
    }

    /// Holds the record of an attachment, made where there is none.
    pub(super) fn enter(&self, key: &AttachmentKey) -> Result<Held, JournalError> {
        match self.0.enter(key.id())? {
            Entered::New(entry) => Ok(Held { entry, record: Ok(None), empty: true }),
            Entered::Old(entry) => Held::of(entry),
        }
    }

    /// Holds the record of an attachment, if there is one.
    pub(super) fn find(&self, key: &AttachmentKey) -> Result<Option<Held>, JournalError> {
        self.0.open_entry(key.id())?.map(Held::of).transpose()
    }

    /// What all records say that can be read, without their locks.
    pub(super) fn all(&self) -> Result<Vec<Record>, JournalError> {
        let mut records = Vec::new();
        for id in self.0.ids()? {
            let Some(text) = self.0.text(id)? else { continue };
            match parse(&text, Path::new(&id.to_string())) {
                Ok(record) => records.extend(record),
                // Whose it is cannot be told; it must not stand in the way of all others.
                Err(error) => tracing::warn!(%error, "record left out"),
            }
        }
        Ok(records)
    }
}

impl Held {
    fn of(mut entry: Entry) -> Result<Self, JournalError> {
        let text = entry.text()?;
        let record = parse(&text, entry.path());
        let empty = matches!(record, Ok(None));
        Ok(Self { entry, record, empty })
    }

    /// Writes what is about to be done.
    pub(super) fn begin(&mut self, intent: &Intent) -> Result<(), JournalError> {
        self.entry.append("write networks", &Line::Intent(Box::new(intent.clone())))?;
        self.entry.sync()?;
        self.empty = false;
        Ok(())
    }

    /// Writes how far it came.
    pub(super) fn note(&mut self, line: &Line) -> Result<(), JournalError> {
        self.entry.append("write progress", line)
    }

    /// Writes that it is done.
    pub(super) fn complete(&mut self, done: &Done) -> Result<(), JournalError> {
        self.entry.append("write networks done", &Line::Done(done.clone()))?;
        self.entry.sync()
    }

    /// Forgets what was written, when all of it was taken back, and goes on holding the attachment.
    pub(super) fn clear(&mut self) -> Result<(), JournalError> {
        self.entry.clear()?;
        (self.record, self.empty) = (Ok(None), true);
        Ok(())
    }

    /// Removes the record, when all of it was taken back.
    pub(super) fn remove(mut self) -> Result<(), JournalError> {
        self.empty = false;
        self.entry.remove()
    }

    /// Puts a record that cannot be read out of the way, for people to look at.
    pub(super) fn set_aside(self) -> Result<(), JournalError> {
        self.entry.set_aside()
    }
}

// Whoever held an attachment of which nothing was begun leaves no file.
impl Drop for Held {
    fn drop(&mut self) {
        if self.empty
            && let Err(error) = self.entry.remove()
        {
            tracing::warn!(%error, "a record of nothing is left");
        }
    }
}

/// Reads a record. A last line without its end was being written by a process that was killed, and says nothing.
fn parse(text: &str, path: &Path) -> Result<Option<Record>, JournalError> {
    let mut record: Option<Record> = None;
    for (number, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
        let malformed = |reason: String| JournalError::Malformed { path: path.to_owned(), line: number + 1, reason };
        let line: Line = serde_json::from_str(line).map_err(|e| malformed(e.to_string()))?;
        match (line, &mut record) {
            (Line::Intent(intent), _) => record = Some(Record::of(*intent)),
            (_, None) => return Err(malformed("progress without its intent".to_owned())),
            (Line::Begun(network), Some(record)) => record.begun = network.saturating_add(1),
            (Line::Told { network, result }, Some(record)) => match record.told.get_mut(network) {
                Some(told) => *told = Some(result),
                None => return Err(malformed(format!("there is no network of number {network}"))),
            },
            (Line::Steering(steering), Some(record)) => record.steering = Some(steering),
            (Line::Done(done), Some(record)) => record.done = Some(done),
        }
    }
    Ok(record)
}

/// Whether an attachment of this key, or any of the network where there is none, was made as one of several networks: it
/// is removed as such, whatever the configuration is by now.
pub(in crate::cni) fn is_recorded(
    state: &Path,
    network: &NetworkName,
    key: Option<&AttachmentKey>,
) -> Result<bool, JournalError> {
    let records = Records::open(state)?;
    match key {
        Some(key) => records.0.exists(key.id()),
        None => Ok(records.all()?.iter().any(|record| record.intent.key.network == *network)),
    }
}

/// The `network-status` of an attachment of several networks (Kubernetes Network Custom Resource Definition De-facto
/// Standard, "Network Attachment Status Annotation"), as the record in the state directory has it; `None` where there is
/// no such attachment, or it is not finished.
///
/// # Errors
/// Where the record cannot be read, or another process works on the attachment now.
pub fn network_status(state: &Path, key: &AttachmentKey) -> Result<Option<Vec<Value>>, JournalError> {
    let Some(held) = Records::open(state)?.find(key)? else { return Ok(None) };
    let record = match &held.record {
        Ok(record) => record.as_ref().filter(|record| record.intent.key == *key),
        Err(JournalError::Malformed { path, line, reason }) => {
            return Err(JournalError::Malformed { path: path.clone(), line: *line, reason: reason.clone() });
        }
        Err(_) => None,
    };
    Ok(record.and_then(|record| record.done.as_ref()).map(|done| done.status.clone()))
}
