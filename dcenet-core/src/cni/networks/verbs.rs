//! ADD, CHECK, DEL and STATUS of several networks.

use std::fmt::Display;
use std::path::PathBuf;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::config::{By, Network, configured, resolve};
use super::record::{Done, Held, Intent, Line, Record, Records};
use super::result;
use crate::cni::serve::Backends;
use crate::cni::verbs::{Call, detach, engine, journal, netns, still_awaited};
use crate::cni::{CniError, ErrorCode, Invocation, NetConf, PluginCall, Plugins, Progress, SpecVersion};
use crate::engine::{AttachError, Engine, PodInterface, SteerError, Steering};
use crate::link::Policy;
use crate::model::{AttachmentKey, MacAddr};
use crate::netlink::Family;
use crate::netns::NetNs;

/// A call about a pod of several networks.
pub(in crate::cni) struct Networks<'a> {
    invocation: &'a Invocation,
    pub(super) conf: &'a NetConf,
    pub(super) backends: &'a dyn Backends,
    pub(super) engine: Engine,
    pub(super) plugins: Plugins,
    pub(super) records: Records,
}

impl<'a> Networks<'a> {
    pub(in crate::cni) fn new(
        invocation: &'a Invocation,
        conf: &'a NetConf,
        backends: &'a dyn Backends,
    ) -> Result<Self, CniError> {
        Ok(Self {
            invocation,
            conf,
            backends,
            engine: engine(conf, None)?,
            plugins: Plugins::new(&invocation.path, Plugins::LIMIT),
            records: Records::open(&conf.state_dir).map_err(journal)?,
        })
    }

    pub(in crate::cni) async fn add(&self) -> Result<String, CniError> {
        let (key, path) = (self.key()?, self.netns_path()?);
        let pod = NetNs::open(&path).map_err(netns)?;
        if pod.id() == self.engine.host().0.id() && !self.invocation.netns_override {
            return Err(netns(AttachError::HostNamespace { path }));
        }
        let networks = resolve(self.conf, self.invocation, &key.ifname)?;
        let fingerprint = fingerprint(&networks);
        let mut held = self.records.enter(&key).map_err(journal)?;
        still_awaited(self.backends)?;
        if let Some(record) = self.readable(&held)? {
            let same_pod = record.intent.netns == pod.id() && record.intent.boot == self.records.boot();
            let living = record.done.is_some() && self.pod_of(&record).is_some();
            if living && !(same_pod && record.intent.fingerprint == fingerprint) {
                let difference = if same_pod { "another configuration" } else { "another network namespace" };
                let message = format!("attachment {key} exists already, with {difference}; delete it first");
                return Err(CniError::new(ErrorCode::InvalidConfig, message));
            }
            if same_pod
                && let Some(done) = &record.done
                && self.stands(&record, &pod).await?
            {
                return Ok(in_version(&done.result, self.conf.version));
            }
            let left = self.take_back(&record).await;
            if !left.is_empty() {
                let message = format!("an unfinished attach of {key} stands in the way: {}", joined(&left));
                return Err(CniError::new(ErrorCode::RollbackIncomplete, message));
            }
            held.clear().map_err(journal)?;
        }
        let intent = Intent {
            key,
            boot: self.records.boot().to_owned(),
            netns_path: path,
            netns: pod.id(),
            fingerprint,
            networks,
        };
        self.refuse_taken(&intent.networks, &pod)?;
        for network in &intent.networks {
            if let By::Plugins { chain, .. } = &network.by {
                chain.find_all(&self.plugins).map_err(|e| network.blame(e.into()))?;
            }
        }
        let mut record = Record::of(intent);
        held.begin(&record.intent).map_err(journal)?;
        let error = match self.attach_all(&mut held, &mut record, &pod).await {
            Ok(done) => return Ok(in_version(&done.result, self.conf.version)),
            Err(error) => error,
        };
        let left = self.take_back(&record).await;
        if left.is_empty() {
            if let Err(error) = held.remove() {
                tracing::warn!(%error, "a record is left of what was taken back");
            }
            return Err(error);
        }
        let details = format!("{}; and it could not all be taken back: {}", error.details, joined(&left));
        Err(CniError { code: ErrorCode::RollbackIncomplete, ..error.with_details(details) })
    }

    /// Attaches all networks in order, and writes down each before it is begun.
    async fn attach_all(&self, held: &mut Held, record: &mut Record, pod: &NetNs) -> Result<Done, CniError> {
        let mut interfaces = Vec::new();
        let networks = &record.intent.networks;
        let steered = networks.len() > 1 || networks.iter().any(|network| network.default_route.is_some());
        for (i, network) in record.intent.networks.clone().iter().enumerate() {
            held.note(&Line::Begun(i)).map_err(journal)?;
            record.begun = i + 1;
            let result = match &network.by {
                By::Own(conf) => {
                    let result =
                        self.attach_own(network, conf, &record.intent.key).await.map_err(|e| network.blame(e))?;
                    held.note(&Line::Told { network: i, result: result.clone() }).map_err(journal)?;
                    result
                }
                By::Plugins { chain, capabilities, .. } => {
                    let call = self.plugin_call(network, &record.intent, Some(record.intent.netns_path.clone()));
                    let progress = |progress: Progress<'_>| match progress {
                        Progress::Started(group) => held.note(&Line::Started(group)).map_err(journal),
                        Progress::Told(result) => {
                            record.told[i] = Some(result.clone());
                            held.note(&Line::Told { network: i, result: result.clone() }).map_err(journal)
                        }
                    };
                    let added = chain.add(&self.plugins, &call, capabilities, progress);
                    added.and_then(|r| self.honoured(network, r)).map_err(|e| network.blame(e))?
                }
            };
            if steered {
                let found = self.engine.take_defaults(pod, &network.ifname).map_err(|e| network.blame(steer(e)))?;
                if found.is_none() && !result::addresses(&result).is_empty() {
                    let message =
                        format!("its plugins tell of addresses, and the pod has no interface {}", network.ifname);
                    return Err(network.blame(CniError::new(ErrorCode::Failed, message)));
                }
                let found = found.unwrap_or_else(|| PodInterface::none(&network.ifname));
                let gateways = result::gateways(network, &result);
                interfaces.push(PodInterface { gateways, default_route: network.default_route.clone(), ..found });
            }
            record.told[i] = Some(result);
        }
        if !interfaces.is_empty() {
            let default = record.intent.networks.iter().position(|network| network.default).unwrap_or_default();
            interfaces[..=default].rotate_right(1);
            let steering = Steering::plan(&interfaces).map_err(|error| {
                let whose = record.intent.networks.iter().find(|network| network.ifname == error.interface);
                let refused = CniError::new(ErrorCode::InvalidConfig, format!("default route: {error}"));
                whose.map_or(refused.clone(), |network| network.blame(refused))
            })?;
            self.steer(held, record, pod, &steering)?;
        }
        let parts: Vec<(&Network, &Value)> =
            record.intent.networks.iter().zip(&record.told).filter_map(|(n, r)| Some((n, r.as_ref()?))).collect();
        let done = Done { result: result::compose(&parts), status: result::status(&parts, record.steering.as_ref()) };
        held.complete(&done).map_err(journal)?;
        Ok(done)
    }

    /// Adds routes and rules, and has the results of the networks tell which of them has the default routes: CHECK compares
    /// with them.
    fn steer(&self, held: &mut Held, record: &mut Record, pod: &NetNs, steering: &Steering) -> Result<(), CniError> {
        held.note(&Line::Steering(steering.clone())).map_err(journal)?;
        record.steering = Some(steering.clone());
        self.engine.steer(pod, steering).map_err(steer)?;
        for (i, (network, told)) in record.intent.networks.iter().zip(&mut record.told).enumerate() {
            let Some(result) = told else { continue };
            let before = result.clone();
            for ipv4 in [true, false] {
                let own = steering.default_of(ipv4).filter(|(name, _)| **name == network.ifname);
                result::set_default(result, ipv4, own.map(|(_, route)| route.gateway));
            }
            if *result != before {
                held.note(&Line::Told { network: i, result: result.clone() }).map_err(journal)?;
            }
        }
        Ok(())
    }

    async fn attach_own(&self, network: &Network, conf: &Value, key: &AttachmentKey) -> Result<Value, CniError> {
        let (invocation, conf) = self.single(network, conf, Some(key))?;
        let result = Call::new(&invocation, &conf, self.backends)?.add().await?;
        serde_json::from_str(&result.to_json(SpecVersion::NEWEST))
            .map_err(|e| CniError::new(ErrorCode::Failed, e.to_string()))
    }

    /// Refuses networks whose interface is in the pod already: a plugin that finds it there fails, and its DEL would remove
    /// what is not its own.
    fn refuse_taken(&self, networks: &[Network], pod: &NetNs) -> Result<(), CniError> {
        let links = links(pod)?;
        match networks.iter().find(|network| links.iter().any(|link| *link == network.ifname.as_str())) {
            None => Ok(()),
            Some(network) => {
                let message =
                    format!("the pod has an interface {} already; remove it or ask for another", network.ifname);
                Err(network.blame(CniError::new(ErrorCode::LinkExists, message)))
            }
        }
    }

    /// Whether all of a finished attachment is still there. Networks of our own answer a repeated ADD themselves.
    async fn stands(&self, record: &Record, pod: &NetNs) -> Result<bool, CniError> {
        let links = links(pod)?;
        if record.intent.networks.iter().any(|network| !links.iter().any(|link| *link == network.ifname.as_str())) {
            return Ok(false);
        }
        for network in &record.intent.networks {
            if let By::Own(conf) = &network.by {
                self.attach_own(network, conf, &record.intent.key).await.map_err(|e| network.blame(e))?;
            }
        }
        Ok(true)
    }

    pub(in crate::cni) async fn check(&self) -> Result<(), CniError> {
        let (key, path) = (self.key()?, self.netns_path()?);
        let pod = NetNs::open(&path).map_err(netns)?;
        let drift = |what: String| Err(CniError::new(ErrorCode::Drift, what));
        let held = self.records.find(&key).map_err(journal)?;
        let record = held.as_ref().map(|held| self.readable(held)).transpose()?.flatten();
        let Some(record) = record.filter(|record| record.done.is_some()) else {
            return drift("no finished attachment is recorded".to_owned());
        };
        if record.intent.netns != pod.id() {
            return drift("the namespace is not the one that was attached".to_owned());
        }
        let mut errors = Vec::new();
        for (network, told) in record.intent.networks.iter().zip(&record.told) {
            match &network.by {
                By::Own(conf) => {
                    let checked = async {
                        let (invocation, conf) = self.single(network, conf, Some(&key))?;
                        Call::new(&invocation, &conf, self.backends)?.check().await
                    };
                    errors.extend(checked.await.err().map(|e| network.blame(e)));
                }
                By::Plugins { chain, capabilities, .. } => {
                    let call = self.plugin_call(network, &record.intent, Some(path.clone()));
                    let result = told.as_ref().unwrap_or(&Value::Null);
                    let found = chain.check(&self.plugins, &call, capabilities, result);
                    errors.extend(found.into_iter().map(|e| network.blame(e)));
                }
            }
        }
        let mut drifts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        if let Some(steering) = &record.steering {
            drifts.extend(self.engine.check_steering(&pod, steering).map_err(steer)?);
        }
        if drifts.is_empty() { Ok(()) } else { drift(drifts.join("; ")) }
    }

    pub(in crate::cni) async fn del(&self) -> Result<(), CniError> {
        let key = self.key()?;
        match self.records.find(&key).map_err(journal)? {
            Some(held) => self.remove(&key, held).await,
            None => self.remove_single(&key).await,
        }
    }

    /// Removes what has no record of several networks: runtimes repeat DEL, and a configuration of one network may have got
    /// further ones while pods stood, or have had its sections moved into `networks`. Its addresses are under its own name
    /// still, in the store of whichever network of ours has it.
    pub(super) async fn remove_single(&self, key: &AttachmentKey) -> Result<(), CniError> {
        let mut networks = configured(self.conf, self.invocation, &key.ifname).unwrap_or_else(|error| {
            tracing::warn!(%error, "going without the configuration");
            Vec::new()
        });
        networks.sort_by_key(|network| !network.default);
        let mut calls = Vec::new();
        for network in &networks {
            let By::Own(conf) = &network.by else { continue };
            let mut conf = conf.clone();
            conf["name"] = json!(key.network);
            let (mut invocation, conf) = self.single(network, &conf, Some(key))?;
            invocation.ifname = Some(key.ifname.clone());
            calls.push((invocation, conf));
        }
        let (mut holder, mut free, mut unread) = (None, None, None);
        for (i, (invocation, conf)) in calls.iter().enumerate() {
            match Call::new(invocation, conf, self.backends)?.held(key).await {
                Ok(Some(_)) => {
                    holder = Some(i);
                    break;
                }
                Ok(None) => free = free.or(Some(i)),
                Err(error) => unread = unread.or(Some(error)),
            }
        }
        let record = self.engine.attachments(&key.network).map_err(journal)?.into_iter().find(|r| r.key == *key);
        // Which addresses are whose cannot be told; of what is long gone DEL must not fail.
        if let Some(error) = unread.filter(|_| holder.is_none() && (record.is_some() || free.is_none())) {
            return Err(error);
        }
        let mut chosen = holder.or(free);
        if record.is_some_and(|record| record.policy == Policy::Wanted) && !calls.is_empty() {
            let has_policy = |i: &usize| calls.get(*i).is_some_and(|(_, conf)| has_section(conf, "policy"));
            chosen = match holder {
                Some(_) => holder.filter(has_policy),
                None => (0..calls.len()).find(has_policy),
            };
            if chosen.is_none() {
                let message = format!(
                    "{key} is under policy, and no network of the configuration that may hold its addresses has a section \
                     policy, so that nobody can take that back; add it"
                );
                return Err(CniError::new(ErrorCode::InvalidConfig, message));
            }
        }
        if let Some((invocation, conf)) = chosen.and_then(|i| calls.get(i)) {
            return Call::new(invocation, conf, self.backends)?.del().await;
        }
        let attached = self.engine.attached(key).map_err(journal)?;
        self.engine.detach(key, None).map_err(detach)?;
        let leased: Vec<_> = attached.iter().flat_map(|a| &a.lease.addresses).map(|a| a.address.to_string()).collect();
        if leased.is_empty() {
            return Ok(());
        }
        let message = format!(
            "the devices of {key} are removed, and its addresses ({}) are not released: no network of the configuration has a \
             link, with the section ipam that it had; add it, and collect (GC)",
            leased.join(", ")
        );
        Err(CniError::new(ErrorCode::InvalidConfig, message))
    }

    /// Takes back what a record says, then removes it.
    pub(super) async fn remove(&self, key: &AttachmentKey, held: Held) -> Result<(), CniError> {
        let errors = match &held.record {
            Ok(None) => Vec::new(),
            Ok(Some(record)) if record.intent.key != *key => {
                let message = format!("the record of id {} belongs to {}", key.id(), record.intent.key);
                return Err(CniError::new(ErrorCode::Failed, message));
            }
            Ok(Some(record)) => {
                let errors = self.take_back(record).await;
                if let Some((line, reason)) = record.damage.as_ref().filter(|_| errors.is_empty()) {
                    tracing::warn!(%key, line, reason, "a record was damaged after its intent; all of it was taken back");
                    return held.set_aside().map_err(journal);
                }
                errors
            }
            Err(error) => {
                // All that is known is what the configuration says of every pod.
                tracing::warn!(%error, "record unreadable; going by the configuration");
                let errors = self.take_back(&self.supposed(key)?).await;
                if errors.is_empty() {
                    return held.set_aside().map_err(journal);
                }
                errors
            }
        };
        if errors.is_empty() {
            return held.remove().map_err(journal);
        }
        let code =
            if errors.iter().all(|e| e.code == ErrorCode::TryAgain) { ErrorCode::TryAgain } else { ErrorCode::Failed };
        Err(CniError::new(code, joined(&errors)))
    }

    /// What an attachment would be by the configuration alone.
    fn supposed(&self, key: &AttachmentKey) -> Result<Record, CniError> {
        let networks = configured(self.conf, self.invocation, &key.ifname)?;
        let path = self.invocation.netns.clone().unwrap_or_default();
        let netns = NetNs::open(&path).map_or_else(|_| self.engine.host().0.id(), |pod| pod.id());
        let intent = Intent {
            key: key.clone(),
            boot: self.records.boot().to_owned(),
            netns_path: path,
            netns,
            fingerprint: String::new(),
            networks,
        };
        Ok(Record { begun: intent.networks.len(), ..Record::of(intent) })
    }

    /// Takes back the networks of a record that were begun, the last first. Goes on over failures, and returns them.
    async fn take_back(&self, record: &Record) -> Vec<CniError> {
        let pod = self.pod_of(record);
        let mut errors = Vec::new();
        // The machine's end may have taken the lines that say how far it came.
        let same_boot = record.intent.boot == self.records.boot();
        if let Some((_, netns)) = &pod {
            let mut names: Vec<_> = record.intent.networks.iter().collect();
            names.sort_by_key(|network| !network.default);
            let names: Vec<_> = names.into_iter().map(|network| network.ifname.clone()).collect();
            let left = match (&record.steering, &record.damage) {
                // The line that tells of them may be the damaged one.
                (None, Some(_)) => self.engine.unsteer_tables(netns, &names).err(),
                (None, None) => None,
                (Some(steering), _) => self.engine.unsteer(netns, steering).err(),
            };
            errors.extend(left.map(|e| CniError::new(ErrorCode::Failed, format!("routing of the pod: {e}"))));
        }
        if let Some(group) = record.running.filter(|_| same_boot) {
            // What goes on working would undo what is taken back here.
            if let Err(error) = Plugins::end_group(group, &record.intent.key.container) {
                let message = format!("ending what a killed call left at work: {error}");
                return vec![CniError::new(ErrorCode::TryAgain, message)];
            }
        }
        let begun = if same_boot { record.begun } else { record.intent.networks.len() };
        for (network, told) in record.intent.networks.iter().zip(&record.told).take(begun).rev() {
            match &network.by {
                By::Own(conf) => {
                    let removed = async {
                        let (invocation, conf) = self.single(network, conf, Some(&record.intent.key))?;
                        let call = Call::new(&invocation, &conf, self.backends)?;
                        call.remove(&call.key()?, pod.as_ref().map(|(_, netns)| netns)).await
                    };
                    errors.extend(removed.await.err().map(|e| network.blame(e)));
                }
                By::Plugins { chain, capabilities, .. } => {
                    let call = self.plugin_call(network, &record.intent, pod.as_ref().map(|(path, _)| path.clone()));
                    let left = chain.del(&self.plugins, &call, capabilities, told.as_ref());
                    errors.extend(left.into_iter().map(|e| network.blame(e)));
                }
            }
        }
        errors
    }

    /// The pod's namespace, if it is still the one that was attached, and its path. Plugins take what they find at a path for
    /// the pod's: another pod's by now, the host's own (containernetworking/plugins issue 714), or a file that some of them
    /// make there.
    fn pod_of(&self, record: &Record) -> Option<(PathBuf, NetNs)> {
        if record.intent.boot != self.records.boot() {
            return None;
        }
        let paths = [self.invocation.netns.as_ref(), Some(&record.intent.netns_path)];
        let mut open = paths.into_iter().flatten().filter_map(|path| Some((path.clone(), NetNs::open(path).ok()?)));
        let (path, pod) = open.find(|(_, netns)| netns.id() == record.intent.netns)?;
        let own = pod.id() == self.engine.host().0.id();
        if own && !self.invocation.netns_override { None } else { Some((path, pod)) }
    }

    pub(in crate::cni) async fn status(&self) -> Result<(), CniError> {
        let unavailable = |error: CniError| CniError { code: ErrorCode::Unavailable, ..error };
        self.records.ready().map_err(|e| unavailable(journal(e)))?;
        for network in self.networks_of_all()? {
            let ready = match &network.by {
                By::Own(conf) => {
                    let (invocation, conf) = self.single(&network, conf, None)?;
                    Call::new(&invocation, &conf, self.backends)?.status().await
                }
                By::Plugins { chain, .. } => {
                    chain.status(&self.plugins, &PluginCall::default()).map_err(|e| match e.code {
                        // 50 and 51 are STATUS's own (CNI 1.1.0, section 5, "Error").
                        ErrorCode::Delegated(50 | 51) => e,
                        _ => unavailable(e),
                    })
                }
            };
            ready.map_err(|e| network.blame(e))?;
        }
        Ok(())
    }

    /// The networks of every pod, where no pod is meant.
    pub(super) fn networks_of_all(&self) -> Result<Vec<Network>, CniError> {
        configured(self.conf, self.invocation, &"eth0".parse()?)
    }

    /// A network of our own as a call of its own.
    pub(super) fn single(
        &self,
        network: &Network,
        conf: &Value,
        key: Option<&AttachmentKey>,
    ) -> Result<(Invocation, NetConf), CniError> {
        let conf = NetConf::parse(conf.to_string().as_bytes())?;
        let mut invocation = self.invocation.clone();
        invocation.container = key.map(|key| key.container.clone());
        invocation.ifname = Some(network.ifname.clone());
        if !network.default {
            // They are meant for the default network.
            invocation.args.mac = None;
            invocation.args.addresses.clear();
            invocation.args.pools.clear();
        }
        Ok((invocation, conf))
    }

    fn plugin_call(&self, network: &Network, intent: &Intent, netns: Option<PathBuf>) -> PluginCall {
        let args = match &network.by {
            By::Plugins { args, .. } => args.clone(),
            By::Own(_) => String::new(),
        };
        PluginCall {
            container: Some(intent.key.container.clone()),
            netns,
            ifname: Some(network.ifname.clone()),
            args,
            netns_override: self.invocation.netns_override,
            trace: self.invocation.trace.clone(),
        }
    }

    /// Refuses the result of plugins that did not give what was asked for: they ignore what they do not know.
    fn honoured(&self, network: &Network, result: Value) -> Result<Value, CniError> {
        let By::Plugins { capabilities, .. } = &network.by else { return Ok(result) };
        let (wanted_ips, wanted_mac) = if network.default {
            let args = &self.invocation.args;
            let asked = &self.conf.runtime;
            let ips = if asked.addresses.values.is_empty() { &args.addresses } else { &asked.addresses.values };
            (ips.clone(), asked.mac.or(args.mac))
        } else {
            let ips = capabilities.get("ips").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
            let mac = capabilities.get("mac").and_then(Value::as_str).map(str::parse::<MacAddr>);
            (ips.filter_map(result::bare).collect(), mac.and_then(Result::ok))
        };
        let refuse = |key: &str, wanted: &dyn Display| {
            let message =
                format!("{key}: {wanted} was asked for, and its plugins gave another; use plugins that honour it");
            Err(CniError::new(ErrorCode::UnsupportedField, message))
        };
        let given = result::addresses(&result);
        if let Some(wanted) = wanted_ips.iter().find(|wanted| !given.contains(wanted)) {
            return refuse("ips", wanted);
        }
        if let Some(wanted) = wanted_mac {
            let own = result::inside(&result).find(|i| i["name"] == network.ifname.as_str());
            let mac = own.and_then(|i| i.get("mac")).and_then(Value::as_str).map(str::parse::<MacAddr>);
            if mac.and_then(Result::ok) != Some(wanted) {
                return refuse("mac", &wanted);
            }
        }
        Ok(result)
    }

    /// What a record says, if it is of this attachment.
    fn readable(&self, held: &Held) -> Result<Option<Record>, CniError> {
        match &held.record {
            Ok(record) => Ok(record.clone()),
            Err(error) => Err(CniError::new(ErrorCode::Io, error.to_string())),
        }
    }

    fn key(&self) -> Result<AttachmentKey, CniError> {
        match (&self.invocation.container, &self.invocation.ifname) {
            (Some(container), Some(ifname)) => Ok(AttachmentKey {
                network: self.conf.name.clone(),
                container: container.clone(),
                ifname: ifname.clone(),
            }),
            _ => Err(CniError::new(ErrorCode::InvalidEnvironment, "CNI_CONTAINERID and CNI_IFNAME are needed")),
        }
    }

    fn netns_path(&self) -> Result<PathBuf, CniError> {
        let path = self.invocation.netns.clone();
        path.ok_or_else(|| CniError::new(ErrorCode::InvalidEnvironment, "CNI_NETNS is needed"))
    }
}

fn has_section(conf: &NetConf, name: &str) -> bool {
    conf.section::<Value>(name).is_ok_and(|section| section.is_some())
}

fn steer(error: SteerError) -> CniError {
    CniError::new(ErrorCode::Failed, format!("routing of the pod: {error}"))
}

/// The names of the links in a pod.
fn links(pod: &NetNs) -> Result<Vec<String>, CniError> {
    let failed =
        |error: &dyn std::fmt::Display| CniError::new(ErrorCode::Failed, format!("looking at the pod: {error}"));
    let mut socket = pod.socket(Family::Route).map_err(|e| failed(&e))?;
    let links = socket.links().map_err(|e| failed(&e))?;
    Ok(links.into_iter().map(|link| link.name).collect())
}

fn in_version(result: &Value, version: SpecVersion) -> String {
    result::in_version(result, version).to_string()
}

fn fingerprint(networks: &[Network]) -> String {
    let digest: [u8; 32] = Sha256::digest(json!(networks).to_string()).into();
    digest[..16].iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn joined(errors: &[CniError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
