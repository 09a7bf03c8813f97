//! What was begun and done for a pod: one file for each attachment of several networks, under
//! `<state dir>/networks/<id>`.
//!
//! ```text
//!  (no file) --create--> {"intent": ..} -> {"begun": 0} {"started": ..} {"told": ..} {"begun": 1} .. -> {"done": ..}
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
use crate::journal::{Entered, Entry, Journal, JournalError, whole_lines};
use crate::model::{AttachmentKey, ContainerId, IfName, NetworkName};
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
    /// The process group of the plugin that was started last and has not answered.
    pub(super) running: Option<u32>,
    /// The last result of each network, where there is one.
    pub(super) told: Vec<Option<Value>>,
    /// What decides where its packets go.
    pub(super) steering: Option<Steering>,
    pub(super) done: Option<Done>,
    /// The first line after the intent that cannot be read, and why. Nobody knows then how far it came: every network was
    /// begun, and it is not finished.
    pub(super) damage: Option<(usize, String)>,
}

/// What all records say.
#[derive(Debug, Default)]
pub(super) struct All {
    pub(super) records: Vec<Record>,
    /// Why others cannot be read. Whose they are and what they hold cannot be told.
    pub(super) unreadable: Vec<JournalError>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Line {
    Intent(Box<Intent>),
    /// The network of this number is attached next.
    Begun(usize),
    /// A plugin of it was started, in this process group.
    Started(u32),
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
        let told = vec![None; intent.networks.len()];
        Self { begun: 0, running: None, told, steering: None, done: None, damage: None, intent }
    }
}

impl Record {
    /// What it has attached to a network.
    fn has<'r>(&'r self, network: &'r NetworkName) -> impl Iterator<Item = (ContainerId, IfName)> + 'r {
        let of_name = move |one: &&Network| one.name().is_ok_and(|name| name == *network);
        let of_pod = |one: &Network| (self.intent.key.container.clone(), one.ifname.clone());
        self.intent.networks.iter().filter(of_name).map(of_pod)
    }

    /// Takes in a line after the intent.
    fn read(&mut self, line: &[u8]) -> Result<(), String> {
        match serde_json::from_slice(line).map_err(|e| e.to_string())? {
            Line::Intent(_) => return Err("a second intent".to_owned()),
            Line::Begun(network) => self.begun = network.saturating_add(1),
            Line::Started(group) => self.running = Some(group),
            Line::Told { network, result } => match self.told.get_mut(network) {
                Some(told) => (*told, self.running) = (Some(result), None),
                None => return Err(format!("there is no network of number {network}")),
            },
            Line::Steering(steering) => self.steering = Some(steering),
            Line::Done(done) => self.done = Some(done),
        }
        Ok(())
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

    /// What all records say, without their locks.
    pub(super) fn all(&self) -> Result<All, JournalError> {
        let mut all = All::default();
        for id in self.0.ids()? {
            let read = self.0.bytes(id).and_then(|bytes| bytes.map_or(Ok(None), |b| parse(&b, &self.0.path(id))));
            match read {
                Ok(record) => all.records.extend(record),
                Err(error) => all.unreadable.push(error),
            }
        }
        Ok(all)
    }
}

impl Held {
    fn of(mut entry: Entry) -> Result<Self, JournalError> {
        let bytes = entry.bytes()?;
        let record = parse(&bytes, entry.path());
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
///
/// # Errors
/// Where the intent cannot be read. What can be read before and after another bad line is known.
fn parse(bytes: &[u8], path: &Path) -> Result<Option<Record>, JournalError> {
    let mut lines = whole_lines(bytes);
    let Some(first) = lines.next() else { return Ok(None) };
    let malformed = |reason: String| JournalError::Malformed { path: path.to_owned(), line: 1, reason };
    let mut record = match serde_json::from_slice(first) {
        Ok(Line::Intent(intent)) => Record::of(*intent),
        Ok(_) => return Err(malformed("progress without its intent".to_owned())),
        Err(error) => return Err(malformed(error.to_string())),
    };
    for (number, line) in lines.enumerate() {
        if let Err(reason) = record.read(line) {
            record.damage.get_or_insert((number + 2, reason));
        }
    }
    if record.damage.is_some() {
        (record.begun, record.done) = (record.intent.networks.len(), None);
    }
    Ok(Some(record))
}

/// Whether an attachment of this key, or any of the network where there is none, was made as one of several networks: it
/// is removed as such, whatever the configuration is by now, and is in no runtime's list where its network has another name
/// than its configuration. A record that cannot be read may be of any network.
pub(in crate::cni) fn is_recorded(
    state: &Path,
    network: &NetworkName,
    key: Option<&AttachmentKey>,
) -> Result<bool, JournalError> {
    let records = Records::open(state)?;
    match key {
        Some(key) => records.0.exists(key.id()),
        None => {
            let All { records, unreadable } = records.all()?;
            let is_of = |record: &Record| record.intent.key.network == *network || record.has(network).next().is_some();
            Ok(!unreadable.is_empty() || records.iter().any(is_of))
        }
    }
}

/// The attachments of a network that pods of several networks have, whatever their configurations are called.
///
/// # Errors
/// Where a record cannot be read: it may have any.
pub(in crate::cni) fn alive(state: &Path, network: &NetworkName) -> Result<Vec<(ContainerId, IfName)>, JournalError> {
    let All { records, unreadable } = Records::open(state)?.all()?;
    match unreadable.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(records.iter().flat_map(|record| record.has(network)).collect()),
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
    let malformed = |line: usize, reason: &str| {
        Err(JournalError::Malformed { path: held.entry.path().to_owned(), line, reason: reason.to_owned() })
    };
    match &held.record {
        Ok(Some(Record { damage: Some((line, reason)), .. })) => malformed(*line, reason),
        Ok(record) => {
            let own = record.as_ref().filter(|record| record.intent.key == *key);
            Ok(own.and_then(|record| record.done.as_ref()).map(|done| done.status.clone()))
        }
        Err(JournalError::Malformed { line, reason, .. }) => malformed(*line, reason),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read<L: AsRef<[u8]>>(lines: &[L]) -> Result<Option<Record>, JournalError> {
        let lines: Vec<u8> = lines.iter().flat_map(|line| [line.as_ref(), b"\n"].concat()).collect();
        parse(&lines, Path::new("/state/networks/x"))
    }

    #[test]
    fn a_bad_line_leaves_what_stands_before_and_after_it() {
        let network =
            |ifname: &str| json!({ "label": ifname, "ifname": ifname, "default": false, "by": { "own": {} } });
        let intent = json!({ "intent": {
            "key": { "network": "pods", "container": "c1", "ifname": "eth0" }, "boot": "b", "netns_path": "/run/netns/p",
            "netns": NetNsId { dev: 1, inode: 2 }, "fingerprint": "f", "networks": [network("eth0"), network("net1")],
        } })
        .to_string();
        let (begun, told) = ("{\"begun\":0}", "{\"told\":{\"network\":0,\"result\":{\"ips\":[]}}}");
        let done = "{\"done\":{\"result\":{},\"status\":[]}}";
        let steering = "{\"steering\":{\"routes\":[],\"rules\":[]}}";
        let whole = read(&[&intent, begun, told, done]).unwrap().unwrap();
        assert_eq!((whole.begun, whole.done.is_some(), &whole.damage), (1, true, &None));
        let bad_byte = b"{\"told\":{\"network\":0,\"result\":{\"ips\":\"\xff\"}}}";
        for bad in [
            &b"{\"told\":{\"network\":2,\"result\":{}}}"[..],
            b"\0\0",
            b"{\"begun\":0,\"newer\":1}",
            intent.as_bytes(),
            bad_byte,
        ] {
            let lines =
                [intent.as_bytes(), begun.as_bytes(), told.as_bytes(), bad, steering.as_bytes(), done.as_bytes()];
            let damaged = read(&lines).unwrap().unwrap();
            assert!(damaged.steering.is_some(), "{bad:?}");
            assert_eq!(damaged.intent, whole.intent);
            assert_eq!((damaged.begun, damaged.done.is_some()), (2, false), "any of them may have been begun");
            assert_eq!(damaged.told, whole.told);
            assert_eq!(damaged.damage.unwrap().0, 4, "{bad:?}");
        }
        let bad_intent = intent.replace("pods", "p\u{7f}ds").into_bytes();
        let bad_intent: Vec<u8> = bad_intent.into_iter().map(|byte| if byte == 0x7f { 0xff } else { byte }).collect();
        for bad in [b"{}", begun.as_bytes(), b"", &bad_intent] {
            let read = read(&[bad, begun.as_bytes()]);
            assert!(matches!(read, Err(JournalError::Malformed { line: 1, .. })), "{bad:?}");
        }
        assert_eq!(
            parse(intent.as_bytes(), Path::new("/x")).unwrap(),
            None,
            "nothing was begun before its end was written"
        );
    }
}
