//! Addresses from the IPAM plugin of others, such as host-local (CNI 1.1.0, section 4, "Plugin Delegation").
//!
//! Such a plugin takes an address back only when it is asked as it was asked to give it, and tells nobody what it gave. So the
//! question is written down before it is asked, and the answer behind it, in one file for each attachment under
//! `<state dir>/ipam/<id>`:
//!
//! ```text
//!  (no file) --> {"intent": ..} {"started": ..} --> {"lease": ..}
//!  either of these --DEL of the plugin--> (no file)
//! ```
//!
//! Where a call was killed between the two, the next one about the attachment has the plugin take back what it may have given.
//! The files outlive a reboot, as what the plugin keeps does.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{DelegateError, PluginCall, PluginName, Plugins};
use crate::cni::{CniError, CniResult, Invocation, NetConf, SpecVersion, Verb};
use crate::journal::{Entered, Entry, Journal, JournalError, whole_lines};
use crate::model::{AttachmentKey, ContainerId, IfName, NetworkName};
use crate::provider::{AddressSource, Lease, LeaseError, LeaseRequest, LeasedAddress, LeasedRoute};

/// The IPAM plugin that a configuration names, as a source of addresses.
///
/// It has no pools by name, no claims, no workloads: what it can be asked for is what its own section of the configuration,
/// `CNI_ARGS` and `runtimeConfig` say, which it gets as they are.
#[derive(Debug)]
pub struct PluginAddresses {
    plugins: Plugins,
    plugin: PluginName,
    conf: Value,
    /// Without an attachment.
    call: PluginCall,
    notes: Journal,
}

/// How the plugin was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Intent {
    key: AttachmentKey,
    plugin: String,
    conf: Value,
    args: String,
    netns: Option<PathBuf>,
    netns_override: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Line {
    Intent(Box<Intent>),
    /// The plugin was started, in this process group.
    Started(u32),
    Lease(Lease),
}

/// What a file says.
#[derive(Debug, PartialEq)]
struct Record {
    intent: Intent,
    group: Option<u32>,
    lease: Option<Lease>,
}

/// A file, open and locked.
struct Note {
    entry: Entry,
    record: Option<Record>,
}

impl PluginAddresses {
    /// The plugin that the section `ipam` names, called as `environment` says.
    ///
    /// # Errors
    /// Code 7 where `ipam.type` names none, and what [`Invocation::from_env`] refuses.
    pub fn new(conf: &NetConf, environment: impl Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let args = environment("CNI_ARGS").and_then(|args| args.into_string().ok()).unwrap_or_default();
        let Invocation { netns, path, netns_override, trace, .. } = Invocation::from_env(environment)?;
        let mut whole = conf.whole();
        // What an IPAM plugin answers is the same since, and many know no newer one.
        whole["cniVersion"] = conf.version.min(SpecVersion::V1_0_0).as_str().into();
        let plugin = conf.key("ipam").and_then(|ipam| ipam.get("type")).and_then(Value::as_str).unwrap_or_default();
        Ok(Self {
            plugins: Plugins::new(&path, Plugins::LIMIT),
            plugin: plugin.parse().map_err(|error| crate::cni::config::field("ipam.type", error))?,
            conf: whole,
            call: PluginCall { container: None, netns, ifname: None, args, netns_override, trace },
            notes: Journal::open_in(conf.state_dir.join("ipam")).map_err(crate::cni::verbs::journal)?,
        })
    }

    fn enter(&self, key: &AttachmentKey) -> Result<Note, LeaseError> {
        match self.notes.enter(key.id()).map_err(stored)? {
            Entered::New(entry) => Ok(Note { entry, record: None }),
            Entered::Old(entry) => Note::of(entry),
        }
    }

    fn find(&self, key: &AttachmentKey) -> Result<Option<Note>, LeaseError> {
        self.notes.open_entry(key.id()).map_err(stored)?.map(Note::of).transpose()
    }

    /// The lease that an answer describes.
    fn read(&self, answer: Option<Value>, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        let told = |reason: String| LeaseError::Outside {
            retryable: false,
            source: format!("plugin {}: ADD: {reason}", self.plugin).into(),
        };
        let result = CniResult::deserialize(answer.unwrap_or_default()).map_err(|error| told(error.to_string()))?;
        let sequence = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
        let of_ip = |ip: &crate::cni::Ip| LeasedAddress {
            gateway: ip.gateway,
            ..LeasedAddress::new(ip.address, self.plugin.as_str(), sequence)
        };
        let addresses: Vec<LeasedAddress> = result.ips.iter().map(of_ip).collect();
        if addresses.is_empty() {
            return Err(told("it gave no address".to_owned()));
        }
        let given = |wanted: &std::net::IpAddr| addresses.iter().any(|given| given.address.addr() == *wanted);
        if let Some(missed) = request.addresses.iter().find(|wanted| !given(wanted)) {
            let reason = format!(
                "{missed} was not given by plugin {}, which may not take such requests; leave it to the plugin, or use \
                 ipam.type dcenet",
                self.plugin
            );
            return Err(LeaseError::Invalid { field: "addresses".to_owned(), reason });
        }
        let of_route = |route: &crate::cni::Route| LeasedRoute { destination: route.dst, gateway: route.gw };
        let routes = result.routes.iter().map(of_route).collect();
        Ok(Lease { addresses, routes, dns: result.dns, mac: None })
    }

    /// Has the plugin take back what a note says, and forgets it.
    fn take_back(&self, note: Note) -> Result<(), LeaseError> {
        let Note { entry, record } = note;
        if let Some(Record { intent, group, .. }) = record {
            if let Some(group) = group {
                let container = &intent.key.container;
                Plugins::end_group(group, container).map_err(|error| outside(true, error))?;
            }
            let plugin: PluginName =
                intent.plugin.parse().map_err(|error: crate::model::ParseError| LeaseError::Damaged(error.into()))?;
            let call = PluginCall { trace: self.call.trace.clone(), ..intent.call() };
            match self.plugins.run(&plugin, Verb::Del, &call, &intent.conf) {
                Ok(_) => {}
                Err(error) => return Err(refused(error)),
            }
        }
        entry.remove().map_err(stored)
    }
}

impl Intent {
    fn call(&self) -> PluginCall {
        PluginCall {
            container: Some(self.key.container.clone()),
            netns: self.netns.clone(),
            ifname: Some(self.key.ifname.clone()),
            args: self.args.clone(),
            netns_override: self.netns_override,
            trace: None,
        }
    }
}

impl Note {
    fn of(mut entry: Entry) -> Result<Self, LeaseError> {
        let bytes = entry.bytes().map_err(stored)?;
        let record = parse(&bytes)
            .map_err(|reason| stored(JournalError::Malformed { path: entry.path().to_owned(), line: 1, reason }))?;
        Ok(Self { entry, record })
    }

    fn append(&mut self, line: &Line) -> Result<(), JournalError> {
        self.entry.append("write addresses of a plugin", line)?;
        self.entry.sync()
    }
}

/// A last line without its end was being written by a process that was killed, and says nothing.
fn parse(bytes: &[u8]) -> Result<Option<Record>, String> {
    let mut record: Option<Record> = None;
    for line in whole_lines(bytes) {
        match (serde_json::from_slice(line).map_err(|error| error.to_string())?, &mut record) {
            (Line::Intent(intent), None) => record = Some(Record { intent: *intent, group: None, lease: None }),
            (Line::Started(group), Some(record)) => record.group = Some(group),
            (Line::Lease(lease), Some(record)) => (record.lease, record.group) = (Some(lease), None),
            _ => return Err("its lines are in no order that is written".to_owned()),
        }
    }
    Ok(record)
}

#[async_trait]
impl AddressSource for PluginAddresses {
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        if let Some(pool) = request.pools.first() {
            let reason = format!("{pool:?} cannot be asked of plugin {}, which has no pools by name", self.plugin);
            return Err(LeaseError::Invalid { field: "pools[0]".to_owned(), reason });
        }
        let mut note = self.enter(&request.attachment)?;
        match &note.record {
            Some(Record { lease: Some(lease), .. }) => return Ok(lease.clone()),
            Some(_) => {
                self.take_back(note)?;
                note = self.enter(&request.attachment)?;
            }
            None => {}
        }
        let PluginCall { netns, args, netns_override, .. } = self.call.clone();
        let (key, plugin, conf) = (request.attachment.clone(), self.plugin.as_str().to_owned(), self.conf.clone());
        let intent = Intent { key, plugin, conf, args, netns, netns_override };
        note.append(&Line::Intent(Box::new(intent.clone()))).map_err(stored)?;
        let call = PluginCall { trace: self.call.trace.clone(), ..intent.call() };
        let mut noted = |group| note.append(&Line::Started(group)).map_err(std::io::Error::other);
        let answer = self.plugins.run_noting(&self.plugin, Verb::Add, &call, &self.conf, &mut noted);
        let leased = answer.map_err(refused).and_then(|answer| self.read(answer, request));
        let failed = match leased {
            Ok(lease) => match note.append(&Line::Lease(lease.clone())) {
                Ok(()) => return Ok(lease),
                Err(error) => stored(error),
            },
            Err(error) => error,
        };
        note.record = Some(Record { intent, group: None, lease: None });
        if let Err(error) = self.take_back(note) {
            // The note stays for whoever comes next.
            tracing::warn!(key = %request.attachment, %error, "what a plugin may have given is not taken back yet");
        }
        Err(failed)
    }

    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        let Some(mut note) = self.find(attachment)? else { return Ok(None) };
        match note.record.as_mut().and_then(|record| record.lease.take()) {
            Some(lease) => Ok(Some(lease)),
            // Nobody knows what was given, so nobody could release it.
            None => self.take_back(note).map(|()| None),
        }
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        let Some(note) = self.find(attachment)? else { return Ok(()) };
        let held = note.record.as_ref().and_then(|record| record.lease.as_ref()).map(Lease::sequence);
        if held == Some(sequence) { self.take_back(note) } else { Ok(()) }
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let stale = |key: &AttachmentKey| {
            key.network == *network && !valid.iter().any(|(c, i)| *c == key.container && *i == key.ifname)
        };
        let (mut released, mut failed) = (Vec::new(), None);
        for id in self.notes.ids().map_err(stored)? {
            let Some(bytes) = self.notes.bytes(id).map_err(stored)? else { continue };
            // Whose it is cannot be told; it must not stand in the way of all others.
            let Ok(Some(Record { intent: Intent { key, .. }, .. })) = parse(&bytes) else { continue };
            if !stale(&key) {
                continue;
            }
            match self.find(&key).and_then(|note| note.map_or(Ok(()), |note| self.take_back(note))) {
                Ok(()) => released.push(key),
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        failed.map_or(Ok(released), Err)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        self.notes.ready().map_err(stored)?;
        self.plugins.find(&self.plugin).map(drop).map_err(refused)
    }
}

fn outside(retryable: bool, error: impl std::error::Error + Send + Sync + 'static) -> LeaseError {
    LeaseError::Outside { retryable, source: Box::new(error) }
}

fn refused(error: DelegateError) -> LeaseError {
    let retryable = matches!(
        error,
        DelegateError::TimedOut { .. } | DelegateError::Refused { code: 11, .. } | DelegateError::Start { .. }
    );
    outside(retryable, error)
}

fn stored(error: JournalError) -> LeaseError {
    match error {
        JournalError::Busy { .. } => LeaseError::Busy(error.to_string()),
        JournalError::Malformed { .. } => LeaseError::Damaged(error.into()),
        error => LeaseError::Store(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::json;

    use super::super::tests::Directory;
    use super::*;

    /// A plugin that writes down what it is called for; `add` is what it does for ADD.
    struct World(Directory);

    const GIVES: &str = r#"echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24","gateway":"10.9.0.1"}],
        "routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["10.9.0.53"]}}'"#;

    impl World {
        fn new(add: &str) -> Self {
            let world = Self(Directory::new());
            world.install(add);
            world
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn install(&self, add: &str) {
            let note = "cat >/dev/null; echo $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS >>calls";
            self.0.install("theirs", &format!("{note}\n[ $CNI_COMMAND = ADD ] || exit 0\n{add}"));
        }

        fn source(&self) -> PluginAddresses {
            let conf = json!({
                "cniVersion": "1.0.0", "name": "shop", "type": "dcenet", "stateDir": self.path().join("state"),
                "link": { "kind": "bridge", "bridge": "dc0" }, "ipam": { "type": "theirs", "subnet": "10.9.0.0/24" },
            });
            let conf = NetConf::parse(conf.to_string().as_bytes()).unwrap();
            let environment = |name: &str| match name {
                "CNI_COMMAND" => Some("ADD".into()),
                "CNI_CONTAINERID" => Some("c1".into()),
                "CNI_IFNAME" => Some("eth0".into()),
                "CNI_NETNS" => Some("/run/netns/p".into()),
                "CNI_ARGS" => Some("IgnoreUnknown=1".into()),
                "CNI_PATH" => Some(self.path().into()),
                _ => None,
            };
            PluginAddresses::new(&conf, environment).unwrap()
        }

        /// What the plugin was called for since it was asked last.
        fn calls(&self) -> Vec<String> {
            let file = self.path().join("calls");
            let calls = fs::read_to_string(&file).unwrap_or_default();
            fs::remove_file(&file).ok();
            calls.lines().map(str::to_owned).collect()
        }

        fn notes(&self) -> usize {
            fs::read_dir(self.path().join("state/ipam")).map_or(0, Iterator::count)
        }
    }

    fn request(container: &str) -> LeaseRequest {
        let key = json!({ "network": "shop", "container": container, "ifname": "eth0" });
        LeaseRequest::new(serde_json::from_value(key).unwrap())
    }

    const ADDED: &str = "ADD c1 eth0 IgnoreUnknown=1";
    const DELETED: &str = "DEL c1 eth0 IgnoreUnknown=1";

    #[test]
    fn an_address_is_given_once_and_taken_back_once() {
        let world = World::new(GIVES);
        let request = request("c1");
        let key = &request.attachment;
        pollster::block_on(async {
            let lease = world.source().lease(&request).await.unwrap();
            assert_eq!(lease.addresses[0].address, "10.9.0.2/24".parse().unwrap());
            assert_eq!(lease.addresses[0].gateway, Some("10.9.0.1".parse().unwrap()));
            assert_eq!((lease.routes.len(), lease.dns.nameservers.as_slice()), (1, &["10.9.0.53".to_owned()][..]));
            assert_eq!(world.source().lease(&request).await.unwrap(), lease);
            assert_eq!(world.source().held(key).await.unwrap().as_ref(), Some(&lease));
            assert_eq!(world.calls(), [ADDED]);
            // Of another lease of the attachment.
            world.source().release(key, lease.sequence() - 1).await.unwrap();
            assert_eq!((world.calls().len(), world.notes()), (0, 1));
            for _ in 0..2 {
                world.source().release(key, lease.sequence()).await.unwrap();
            }
            assert_eq!((world.calls(), world.notes()), (vec![DELETED.to_owned()], 0));
            let again = world.source().lease(&request).await.unwrap();
            assert_ne!(again.sequence(), lease.sequence());
        });
    }

    #[test]
    fn what_a_killed_call_may_have_got_is_taken_back_by_the_next() {
        let world = World::new(GIVES);
        let request = request("c1");
        let killed = || {
            let source = world.source();
            pollster::block_on(source.lease(&request)).unwrap();
            // The answer was never written.
            let path = source.notes.path(request.attachment.id());
            let text = fs::read_to_string(&path).unwrap();
            let kept: String = text.split_inclusive('\n').filter(|line| !line.starts_with("{\"lease\"")).collect();
            fs::write(&path, kept + "{\"lease\":{\"addr").unwrap();
            assert_eq!(world.calls(), [ADDED]);
        };
        killed();
        assert_eq!(pollster::block_on(world.source().held(&request.attachment)).unwrap(), None);
        assert_eq!((world.calls(), world.notes()), (vec![DELETED.to_owned()], 0));
        killed();
        pollster::block_on(world.source().lease(&request)).unwrap();
        assert_eq!(world.calls(), [DELETED, ADDED]);
    }

    #[test]
    fn what_fails_leaves_nothing_and_says_whether_to_ask_again() {
        for (add, told, retryable) in [
            ("echo '{\"code\": 11, \"msg\": \"busy\"}'; exit 1", "busy", true),
            ("echo '{\"code\": 999, \"msg\": \"no free address\"}'; exit 1", "no free address", false),
            ("exit 3", "exit status: 3", false),
            ("echo '{}'", "it gave no address", false),
            ("echo '{\"ips\": [{\"address\": \"x\"}]}'", "plugin theirs: ADD: ", false),
        ] {
            let world = World::new(add);
            let error = pollster::block_on(world.source().lease(&request("c1"))).unwrap_err();
            assert!(error.to_string().contains(told) && error.is_retryable() == retryable, "{error}");
            assert_eq!((world.calls(), world.notes()), (vec![ADDED.to_owned(), DELETED.to_owned()], 0), "{add}");
        }
        let world = World::new(GIVES);
        let asked = LeaseRequest { addresses: vec!["10.9.0.7".parse().unwrap()], ..request("c1") };
        let error = pollster::block_on(world.source().lease(&asked)).unwrap_err().to_string();
        assert!(error.starts_with("addresses: 10.9.0.7 was not given by plugin theirs"), "{error}");
        assert_eq!((world.calls().len(), world.notes()), (2, 0));
        let asked = LeaseRequest { pools: vec!["fast".into()], ..request("c1") };
        let error = pollster::block_on(world.source().lease(&asked)).unwrap_err().to_string();
        assert!(error.starts_with("pools[0]: \"fast\"") && world.calls().is_empty(), "{error}");
        fs::remove_file(world.path().join("theirs")).unwrap();
        let error = pollster::block_on(world.source().ready()).unwrap_err().to_string();
        assert!(error.contains("theirs") && error.contains("CNI_PATH"), "{error}");
    }

    #[test]
    fn those_that_are_in_no_list_are_collected() {
        let world = World::new(GIVES);
        for container in ["c1", "c2", "c3"] {
            pollster::block_on(world.source().lease(&request(container))).unwrap();
        }
        world.calls();
        let valid = [("c2".parse().unwrap(), "eth0".parse().unwrap())];
        let other: NetworkName = "other".parse().unwrap();
        assert_eq!(pollster::block_on(world.source().retain(&other, &[])).unwrap(), []);
        let network: NetworkName = "shop".parse().unwrap();
        let released = pollster::block_on(world.source().retain(&network, &valid)).unwrap();
        let mut names: Vec<&str> = released.iter().map(|key| key.container.as_str()).collect();
        names.sort_unstable();
        assert_eq!((names, world.notes()), (vec!["c1", "c3"], 1));
        assert_eq!(world.calls().len(), 2);
    }
}
