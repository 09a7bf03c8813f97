//! The verbs that act: ADD, CHECK, DEL, GC and STATUS.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::device::DEVICE_ID;
use super::error::causes;
use super::serve::{Backends, PolicyChoice};
use super::{Asked, CniError, CniResult, ErrorCode, Interface, Invocation, NetConf, Role, Verb, networks};
use crate::engine::{
    AttachError, AttachRequest, Attached, DetachErrors, Engine, Hold, InUse, NamespaceEntry, StepError,
};
use crate::journal::JournalError;
use crate::link::{LinkConfig, PlanError, Policy};
use crate::model::{AttachmentKey, ContainerId, IfName, MacAddr, NetworkName};
use crate::nat::Nat;
use crate::netlink::CreateLinkError;
use crate::netns::{Host, NetNs, NetNsError, Pod};
use crate::probe::Conflict;
use crate::provider::{
    AddressSource, DeviceError, DeviceSource, Dns, Endpoint, Lease, LeaseError, LeaseRequest, LeasedAddress,
    PolicyError, PolicySink,
};
use crate::sysctl::{ALLOW_LIST, AllowList};

/// A call whose configuration is read and whose backends are there.
pub(super) struct Call<'a> {
    pub(super) invocation: &'a Invocation,
    pub(super) conf: &'a NetConf,
    /// An error here and in `policy` is the verb's own where it needs them; DEL and GC remove devices first.
    pub(super) addresses: Result<Option<Box<dyn AddressSource>>, CniError>,
    pub(super) policy: Result<Option<PolicyChoice>, CniError>,
    /// Nobody where the binary has nobody.
    pub(super) devices: Option<Arc<dyn DeviceSource>>,
    pub(super) backends: &'a dyn Backends,
    pub(super) engine: Engine,
}

/// Stands for policy whose configuration cannot be used: devices that were under it can still be removed, and the record
/// of what is left stays for a call with a better configuration.
struct Unusable(CniError);

impl Unusable {
    fn refuse<T>(&self, doing: &str) -> Result<T, PolicyError> {
        Err(PolicyError::Failed { doing: doing.to_owned(), source: Box::new(self.0.clone()) })
    }
}

impl PolicySink for Unusable {
    fn attach(&self, _: &Endpoint) -> Result<(), PolicyError> {
        self.refuse("putting the device under policy")
    }

    fn await_enforced(&self, _: &Endpoint, _: Duration) -> Result<(), PolicyError> {
        self.refuse("waiting for verdicts")
    }

    fn missing(&self, _: &Endpoint) -> Result<Option<String>, PolicyError> {
        self.refuse("looking at policy")
    }

    fn ready(&self) -> Result<(), PolicyError> {
        self.refuse("asking whether policy is ready")
    }

    fn answers(&self, _: &AttachmentKey, _: bool) -> Result<(), PolicyError> {
        self.refuse("asking the policy owner")
    }

    fn detach(&self, _: &AttachmentKey) -> Result<(), PolicyError> {
        self.refuse("removing policy")
    }

    /// What has neither record nor device was never under policy, or lost it with its device.
    fn forget(&self, _: &AttachmentKey) -> Result<(), PolicyError> {
        Ok(())
    }
}

impl<'a> Call<'a> {
    pub(super) fn new(
        invocation: &'a Invocation,
        conf: &'a NetConf,
        backends: &'a dyn Backends,
    ) -> Result<Self, CniError> {
        let addresses = backends.addresses(conf);
        let policy = backends.policy(conf);
        // No device is ours then, and so none is put under policy.
        if conf.role == Role::Ipam {
            let engine = engine(conf, None)?;
            return Ok(Self { invocation, conf, addresses, policy, devices: None, backends, engine });
        }
        let sink: Option<Arc<dyn PolicySink>> = match &policy {
            Ok(choice) => choice.as_ref().map(|c| c.sink.clone()),
            Err(error) => Some(Arc::new(Unusable(error.clone()))),
        };
        let mut engine = engine(conf, sink)?;
        let devices = backends.devices(conf)?;
        if let Some(devices) = &devices {
            engine = engine.lending_from(Arc::clone(devices));
        }
        if conf.role == Role::Chained
            && matches!(policy, Ok(None))
            && let Some(former) = backends.former_policy(conf)
        {
            engine = engine.lifting_by(former);
        }
        if let Some(removals) = backends.removals() {
            engine = engine.removing_with(removals);
        }
        Ok(Self { invocation, conf, addresses, policy, devices, backends, engine })
    }

    pub(super) async fn add(&self) -> Result<CniResult, CniError> {
        let key = self.key()?;
        self.conf.refuse_ranges()?;
        let mut link = self.conf.with_device(self.link()?)?;
        if matches!(link, LinkConfig::Sriov(_)) {
            self.conf.refuse_lost_but(DEVICE_ID)?;
        } else {
            self.conf.refuse_lost()?;
            self.conf.refuse_device()?;
        }
        if let Some(bandwidth) = self.conf.bandwidth()? {
            link = link.limited(bandwidth).map_err(|error| attach(error.into()))?;
        }
        allowed(&link, &key)?;
        let nat = self.conf.nat()?;
        let dns = self.conf.dns()?;
        let policy = self.policy()?;
        let path = self.netns_path()?;
        let pod = NetNs::open(path).map_err(netns)?;
        if pod.id() == self.engine.host().0.id() && !self.invocation.netns_override {
            return Err(netns(AttachError::HostNamespace { path: path.to_owned() }));
        }
        if let Some(policy) = policy {
            policy.sink.answers(&key, policy.await_enforced.is_some())?;
        }
        let mut hold = self.hold(&key)?;
        let lease = self.lease(&key).await?;
        let attached = self.attach_unused(&mut hold, &link, &nat, Pod { netns: &pod, path }, lease).await?;
        if let Some(policy) = policy
            && let Some(endpoint) = self.endpoint(&attached)
        {
            self.enforce(policy, hold, &attached, &endpoint, &pod).await?;
        }
        let mut result = result(&attached);
        if let Some(Dns { nameservers, domain: _, search, options }) = dns {
            let of_pools = &mut result.dns;
            for (asked, list) in [
                (nameservers, &mut of_pools.nameservers),
                (search, &mut of_pools.search),
                (options, &mut of_pools.options),
            ] {
                if !asked.is_empty() {
                    *list = asked;
                }
            }
        }
        Ok(result)
    }

    /// Waits for verdicts as far as the configuration asks for it.
    pub(super) async fn enforce(
        &self,
        policy: &PolicyChoice,
        mut hold: Hold<'_>,
        attached: &Attached,
        endpoint: &Endpoint,
        pod: &NetNs,
    ) -> Result<(), CniError> {
        if attached.repeated {
            // Whoever owns the policy state now may not know of it, and somebody may have taken the programs away.
            self.engine.run_at(endpoint, pod, || policy.sink.attach(endpoint)).map_err(netns)??;
        }
        let Some(limit) = policy.await_enforced else { return Ok(()) };
        let Err(error) = policy.sink.await_enforced(endpoint, limit) else { return Ok(()) };
        let error = CniError::from(error);
        // What stood before this call goes on standing, under the verdicts that it has.
        if attached.repeated {
            return Err(error);
        }
        match hold.detach(Some(pod)) {
            Ok(()) => Err(self.give_back(&hold, attached.lease.sequence(), error).await),
            Err(left) => Err(error.with_details(format!("and not taken back: {left}"))),
        }
    }

    pub(super) async fn check(&self) -> Result<(), CniError> {
        let key = self.key()?;
        let path = self.netns_path()?;
        let pod = NetNs::open(path).map_err(netns)?;
        let mut drift: Vec<String> =
            self.engine.check(&key, &pod).map_err(attach)?.iter().map(ToString::to_string).collect();
        let attached = self.engine.attached(&key).map_err(journal)?;
        if let Some(addresses) = self.addresses()? {
            let held: Vec<_> = addresses.held(&key).await?.map(|l| l.addresses).unwrap_or_default();
            let recorded = attached.iter().flat_map(|a| &a.lease.addresses);
            for address in recorded.filter(|r| !held.contains(r)) {
                drift.push(format!("address {} of the container is not leased to {key} any more", address.address));
            }
            drift.extend(self.not_held(&key, &held));
        }
        if let Some(policy) = self.policy()?
            && let Some(endpoint) = attached.as_ref().and_then(|a| self.endpoint(a))
        {
            drift.extend(self.engine.run_at(&endpoint, &pod, || policy.sink.missing(&endpoint)).map_err(netns)??);
        }
        if drift.is_empty() { Ok(()) } else { Err(CniError::new(ErrorCode::Drift, drift.join("; "))) }
    }

    /// Addresses of the result that the attachment does not hold.
    pub(super) fn not_held(&self, key: &AttachmentKey, held: &[LeasedAddress]) -> Vec<String> {
        let results = self.conf.previous.iter().flat_map(|p| &p.ips).map(|ip| ip.address);
        let missing = results.filter(|a| held.iter().all(|h| h.address != *a));
        // A later plugin of the chain may have added addresses: only those of our pools can be ours.
        let ours = missing.filter(|a| held.is_empty() || held.iter().any(|h| h.address.trunc() == a.trunc()));
        ours.map(|a| format!("address {a} of the result is not held by {key}")).collect()
    }

    pub(super) async fn del(&self) -> Result<(), CniError> {
        let key = self.key()?;
        self.remove(&key, self.pod_if_there().as_ref()).await
    }

    pub(super) async fn gc(&self) -> Result<(), CniError> {
        // Without a list nothing is known to be stale; an empty list says that all is.
        let Some(valid) = &self.conf.valid_attachments else { return Ok(()) };
        let network = &self.conf.name;
        let mut errors = Vec::new();
        let records = self.engine.attachments(network).map_err(journal)?;
        let stale = |key: &AttachmentKey| !valid.iter().any(|(c, i)| *c == key.container && *i == key.ifname);
        let lives = |key: &AttachmentKey| {
            let alive = networks::alive(&self.conf.state_dir, network)?;
            Ok::<_, JournalError>(alive.iter().any(|(c, i)| *c == key.container && *i == key.ifname))
        };
        // Held until their addresses are released: an ADD of the same container would get them meanwhile.
        let (mut kept, mut holds) = (Vec::new(), Vec::new());
        for record in records.iter().filter(|r| stale(&r.key)) {
            let detached = self.engine.hold_remains(&record.key, None).and_then(|hold| match hold {
                // Attached since as one of several networks, which are in no list of the runtime's.
                Some(_) if lives(&record.key)? => Ok(None),
                Some(mut hold) => hold.detach(None).map(|()| Some(hold)),
                None => Ok(None),
            });
            match detached {
                Ok(hold) => holds.extend(hold),
                Err(error) => {
                    // What is still there keeps its addresses.
                    kept.push((record.key.container.clone(), record.key.ifname.clone()));
                    errors.push(format!("{}: {error}", record.key));
                }
            }
        }
        kept.extend(valid.iter().cloned());
        kept.extend(networks::alive(&self.conf.state_dir, network).map_err(journal)?);
        let released = match self.addresses() {
            Ok(None) => Ok(()),
            Ok(Some(addresses)) => self.retain(addresses, network, &kept).await,
            Err(error) => Err(error),
        };
        match released {
            Ok(()) => {
                errors.extend(holds.into_iter().filter_map(|hold| hold.close().err()).map(|error| error.to_string()));
            }
            Err(error) => {
                errors.push(error.to_string());
                holds.into_iter().for_each(Hold::keep);
            }
        }
        errors.extend(self.engine.remove_empty_records().err().map(|error| error.to_string()));
        let alive = |key: &AttachmentKey| kept.iter().any(|(c, i)| *c == key.container && *i == key.ifname);
        if let Some(devices) = &self.devices {
            // Of calls that died before they had written a record.
            match devices.lent(network) {
                Ok(lent) => {
                    for key in lent.iter().filter(|key| !alive(key)) {
                        errors.extend(self.collect_device(key).err().map(|error| format!("{key}: {error}")));
                    }
                }
                Err(error) => errors.push(error.to_string()),
            }
        }
        errors.extend(self.engine.collect_translations(network, &alive).err().map(|error| error.to_string()));
        if valid.is_empty() {
            errors.extend(self.engine.remove_idle_translation().err().map(|error| error.to_string()));
        }
        // Nothing of the network is left: what its attachments shared goes too, unless another network uses it.
        if let (true, Ok(link)) = (valid.is_empty(), self.link()) {
            let removed = link.driver().shared().into_iter().map(|shared| self.engine.remove_idle(&shared));
            errors.extend(removed.filter_map(Result::err).map(|error| error.to_string()));
        }
        if errors.is_empty() { Ok(()) } else { Err(CniError::new(ErrorCode::TryAgain, errors.join("; "))) }
    }

    /// Has the device of an attachment that has no record taken back.
    fn collect_device(&self, key: &AttachmentKey) -> Result<(), DetachErrors> {
        match self.engine.hold_remains(key, None)? {
            // Attached since it was listed.
            Some(hold) if hold.record().is_some() => Ok(()),
            Some(mut hold) => {
                hold.detach(None)?;
                tracing::info!(attachment = %key, "device collected");
                hold.close().map_err(|error| DetachErrors(vec![error.into()]))
            }
            None => Ok(()),
        }
    }

    pub(super) async fn status(&self) -> Result<(), CniError> {
        let mut wish = None;
        // Read for their errors: an ADD would fail by them.
        if self.conf.role == Role::Main
            && let LinkConfig::Sriov(link) = self.link()?
        {
            wish = Some(link.wish().map_err(|error| attach(error.into()))?);
        }
        self.conf.nat()?;
        let unavailable = |error: CniError| CniError { code: ErrorCode::Unavailable, ..error };
        self.engine.ready().map_err(|e| unavailable(journal(e)))?;
        if let Some(addresses) = self.addresses().map_err(unavailable)? {
            addresses.ready().await.map_err(|e| CniError { code: ErrorCode::Unavailable, ..e.into() })?;
        }
        if let (Some(devices), Some(wish)) = (&self.devices, &wish) {
            // Where the runtime names the function, which it is is not known yet.
            let wish = Some(wish).filter(|wish| wish.pool.is_some() || wish.device.is_some());
            devices.ready(wish).map_err(|error| unavailable(attach(error.into())))?;
        }
        if let Some(policy) = self.policy().map_err(unavailable)? {
            policy.sink.ready().map_err(|e| unavailable(e.into()))?;
        }
        Ok(())
    }

    fn link(&self) -> Result<LinkConfig, CniError> {
        let section = self.conf.section::<serde_json::Value>("link")?.ok_or_else(|| {
            CniError::new(ErrorCode::InvalidConfig, "link is missing; give { \"kind\": \"bridge\", \"bridge\": NAME }")
        })?;
        Ok(LinkConfig::read(&section)?)
    }

    pub(super) fn addresses(&self) -> Result<Option<&dyn AddressSource>, CniError> {
        self.addresses.as_ref().map(Option::as_deref).map_err(Clone::clone)
    }

    pub(super) fn policy(&self) -> Result<Option<&PolicyChoice>, CniError> {
        self.policy.as_ref().map(Option::as_ref).map_err(Clone::clone)
    }

    pub(super) fn hold(&self, key: &AttachmentKey) -> Result<Hold<'_>, CniError> {
        let hold = self.engine.hold(key).map_err(|error| attach(error.into()))?;
        if self.invocation.verb == Verb::Add {
            still_awaited(self.backends)?;
        }
        Ok(hold)
    }

    pub(super) async fn lease(&self, key: &AttachmentKey) -> Result<Lease, CniError> {
        let args = &self.invocation.args;
        let ips = self.asked_addresses();
        let pools = self.conf.runtime.pools.clone().or(Asked { field: "CNI_ARGS POOLS", values: args.pools.clone() });
        let Some(addresses) = self.addresses()? else {
            for (field, asked) in
                [(ips.field, format!("{:?}", ips.values)), (pools.field, format!("{:?}", pools.values))]
            {
                if asked != "[]" {
                    let message =
                        format!("{field}: {asked} cannot be had without a section ipam; add one, or drop the request");
                    return Err(CniError::new(ErrorCode::InvalidConfig, message));
                }
            }
            return Ok(Lease { addresses: Vec::new(), routes: Vec::new(), dns: Dns::default(), mac: None });
        };
        let (ips_field, pools_field) = (ips.field, pools.field);
        let request = LeaseRequest {
            attachment: key.clone(),
            workload: args.workload.clone(),
            labels: self.conf.labels.clone(),
            addresses: ips.values,
            pools: pools.values,
        };
        let leased = addresses.lease(&request).await;
        Ok(leased.map_err(|error| match error {
            // The source knows the request, and not who wrote it where.
            LeaseError::Invalid { field, reason } if field == "addresses" => {
                LeaseError::Invalid { field: ips_field.to_owned(), reason }
            }
            LeaseError::Invalid { field, reason } if field.starts_with("pools[") => {
                LeaseError::Invalid { field: field.replacen("pools", pools_field, 1), reason }
            }
            error => error,
        })?)
    }

    /// Attaches, with other addresses in the place of those that somebody else on the segment turns out to have.
    async fn attach_unused(
        &self,
        hold: &mut Hold<'_>,
        link: &LinkConfig,
        nat: &Nat,
        pod: Pod<'_>,
        mut lease: Lease,
    ) -> Result<Attached, CniError> {
        let limit = usize::from(link.underlay().map_or(0, |underlay| underlay.replacements.get()));
        let mut met: Vec<Conflict> = Vec::new();
        let mut replaced = 0;
        loop {
            let error = match self.attach(hold, link.clone(), nat.clone(), pod, &lease) {
                Ok(attached) => return Ok(attached),
                Err(error) => error,
            };
            let Some(conflicts) = error.conflicts() else {
                return Err(self.give_back(hold, lease.sequence(), attach(error)).await);
            };
            for conflict in conflicts {
                tracing::info!(key = %hold.key(), %conflict, "an address is in use");
            }
            met.extend(conflicts);
            let done = self.replace(hold.key(), &mut lease, conflicts, limit - replaced).await;
            match done {
                Ok(count) => replaced += count,
                Err(why) => {
                    let failed = CniError { message: format!("{}; {}", InUse(&met), why.message), ..why };
                    return Err(self.give_back(hold, lease.sequence(), failed).await);
                }
            }
        }
    }

    /// Replaces addresses of the lease, at most `left`, and none if somebody insists on one of them. Returns how many.
    async fn replace(
        &self,
        key: &AttachmentKey,
        lease: &mut Lease,
        conflicts: &[Conflict],
        left: usize,
    ) -> Result<usize, CniError> {
        let held = |why: String| CniError::new(ErrorCode::AddressHeld, why);
        let fixed = |conflict: &Conflict| held(format!("{} is fixed, and not replaced", conflict.address));
        let Ok(Some(addresses)) = self.addresses() else {
            return Err(held("addresses that nobody handed out are not replaced".to_owned()));
        };
        let asked = self.asked_addresses();
        let insisted = |c: &&Conflict| asked.values.contains(&c.address) || addresses.is_fixed(c.address);
        if let Some(conflict) = conflicts.iter().find(insisted) {
            return Err(fixed(conflict));
        }
        if conflicts.len() > left {
            return Err(held("no more are replaced (link.underlay.replacements)".to_owned()));
        }
        let mut count = 0;
        for conflict in conflicts {
            // Another may have been given for it together with that for one before.
            if lease.addresses.iter().all(|of_lease| of_lease.address.addr() != conflict.address) {
                continue;
            }
            match addresses.replace(key, lease.sequence(), conflict).await? {
                Some(other) => *lease = other,
                None => return Err(fixed(conflict)),
            }
            count += 1;
        }
        if count == 0 {
            return Err(held("none of them is of the lease".to_owned()));
        }
        Ok(count)
    }

    /// The addresses that the runtime insists on.
    fn asked_addresses(&self) -> Asked<IpAddr> {
        let args = Asked { field: "CNI_ARGS IP", values: self.invocation.args.addresses.clone() };
        self.conf.runtime.addresses.clone().or(args)
    }

    pub(super) fn attach(
        &self,
        hold: &mut Hold<'_>,
        link: LinkConfig,
        nat: Nat,
        pod: Pod<'_>,
        lease: &Lease,
    ) -> Result<Attached, AttachError> {
        let wanted_mac = self.conf.runtime.mac.or(self.invocation.args.mac).or(lease.mac);
        let mac = match (wanted_mac, lease.addresses.first()) {
            (None, Some(first)) => Some(mac_of(&self.conf.name, first.address.addr())),
            (mac, _) => mac,
        };
        // One that cannot be used has ended the call before.
        let policy = if matches!(self.policy, Ok(None)) { Policy::None } else { Policy::Wanted };
        let fingerprint = fingerprint(&link, &nat, policy);
        let request = AttachRequest {
            key: hold.key().clone(),
            pod,
            link,
            lease: lease.clone(),
            mac,
            workload: self.invocation.args.workload.clone(),
            labels: self.conf.labels.clone(),
            policy,
            nat,
            fingerprint,
        };
        hold.attach(&request)
    }

    /// Releases the lease after a failed ADD, unless devices that bear its addresses are still there, or stood before.
    pub(super) async fn give_back(&self, hold: &Hold<'_>, sequence: u64, error: CniError) -> CniError {
        match self.addresses() {
            Ok(Some(addresses)) if !hold.is_recorded() => match addresses.release(hold.key(), sequence).await {
                Ok(()) => error,
                Err(second) => {
                    let details = format!("{}; and the lease was not released: {second}", error.details);
                    error.with_details(details)
                }
            },
            _ => error,
        }
    }

    /// Removes devices first, then addresses: an address that a device still bears is never free. Nobody attaches the
    /// container again in between.
    pub(super) async fn remove(&self, key: &AttachmentKey, pod: Option<&NetNs>) -> Result<(), CniError> {
        let mut hold = match self.engine.hold_remains(key, pod).map_err(detach)? {
            Some(hold) => hold,
            // An ADD that was killed before it began, or one that only leased.
            // Also what a failed ADD takes back, whether or not somebody waits for it.
            None if self.held(key).await?.is_some() => self.engine.hold(key).map_err(|error| attach(error.into()))?,
            None => return Ok(()),
        };
        let held = self.held(key).await;
        hold.detach(pod).map_err(detach)?;
        if let Err(error) = self.release(key, held).await {
            hold.keep();
            return Err(error);
        }
        hold.close().map_err(|error| detach(error.into()))
    }

    async fn release(&self, key: &AttachmentKey, held: Result<Option<Lease>, CniError>) -> Result<(), CniError> {
        let sequence = held?.map_or(0, |lease| lease.sequence());
        match self.addresses()? {
            Some(addresses) => Ok(addresses.release(key, sequence).await?),
            None => Ok(()),
        }
    }

    /// What the attachment holds; nothing where the configuration hands out no addresses.
    pub(super) async fn held(&self, key: &AttachmentKey) -> Result<Option<Lease>, CniError> {
        match self.addresses()? {
            Some(addresses) => Ok(addresses.held(key).await?),
            None => Ok(None),
        }
    }

    pub(super) async fn retain(
        &self,
        addresses: &dyn AddressSource,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<(), CniError> {
        for released in addresses.retain(network, valid).await? {
            tracing::info!(attachment = %released, "addresses collected");
        }
        Ok(())
    }

    pub(super) fn endpoint(&self, attached: &Attached) -> Option<Endpoint> {
        Some(Endpoint {
            workload: self.invocation.args.workload.clone(),
            labels: self.conf.labels.clone(),
            ..attached.endpoint.clone()?
        })
    }

    pub(super) fn key(&self) -> Result<AttachmentKey, CniError> {
        match (&self.invocation.container, &self.invocation.ifname) {
            (Some(container), Some(ifname)) => Ok(AttachmentKey {
                network: self.conf.name.clone(),
                container: container.clone(),
                ifname: ifname.clone(),
            }),
            _ => Err(CniError::new(ErrorCode::InvalidEnvironment, "CNI_CONTAINERID and CNI_IFNAME are needed")),
        }
    }

    pub(super) fn netns_path(&self) -> Result<&Path, CniError> {
        self.invocation
            .netns
            .as_deref()
            .ok_or_else(|| CniError::new(ErrorCode::InvalidEnvironment, "CNI_NETNS is needed"))
    }

    /// The pod's namespace for DEL: `None` where it is gone, is something else, or is the host's own by now, as a
    /// process's path becomes when its id is used again (containernetworking/plugins issue 714).
    fn pod_if_there(&self) -> Option<NetNs> {
        let pod = match NetNs::open(self.invocation.netns.as_deref()?) {
            Ok(pod) => pod,
            Err(error) => {
                tracing::debug!(%error, "going on without the container's namespace");
                return None;
            }
        };
        let own = pod.id() == self.engine.host().0.id();
        if own && !self.invocation.netns_override { None } else { Some(pod) }
    }
}

/// The engine of a call, which is a program of one thread in the host's namespace.
pub(super) fn engine(conf: &NetConf, policy: Option<Arc<dyn PolicySink>>) -> Result<Engine, CniError> {
    let host = Host(NetNs::of_this_thread().map_err(netns)?);
    Ok(Engine::new(host, &conf.run_dir, policy).map_err(journal)?.entering(NamespaceEntry::InPlace))
}

/// Fails where nobody waits for an ADD any more.
pub(super) fn still_awaited(backends: &dyn Backends) -> Result<(), CniError> {
    if backends.is_awaited() {
        return Ok(());
    }
    let message = "nobody waits for this ADD any more; given up before anything was changed";
    Err(CniError::new(ErrorCode::TryAgain, message))
}

/// Refuses settings that this node does not allow.
fn allowed(link: &LinkConfig, key: &AttachmentKey) -> Result<(), CniError> {
    let sysctls = link.sysctl();
    if sysctls.is_empty() {
        return Ok(());
    }
    let list = AllowList::read(Path::new(ALLOW_LIST))
        .map_err(|error| CniError::new(ErrorCode::Io, format!("link.sysctl: {error}")))?;
    list.check(sysctls, &key.ifname).map_err(|error| attach(error.into()))
}

fn result(attached: &Attached) -> CniResult {
    let interfaces = attached
        .interfaces
        .iter()
        .map(|i| Interface { name: i.name.clone(), mac: Some(i.mac), mtu: i.mtu, sandbox: i.sandbox.clone() })
        .collect();
    CniResult::new(interfaces, attached.pod_interface, &attached.lease)
}

/// The hardware address that belongs to an address of a network: whoever gets the address later gets this too, so that
/// no neighbour's cache is wrong when an address is used again.
fn mac_of(network: &NetworkName, address: IpAddr) -> MacAddr {
    let digest: [u8; 32] = Sha256::digest(format!("{network}/{address}")).into();
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&digest[..6]);
    MacAddr::local(bytes)
}

fn fingerprint(link: &LinkConfig, nat: &Nat, policy: Policy) -> String {
    let mut text = serde_json::json!({ "link": link, "policy": policy });
    // Attachments of before there was any stay the same.
    if !nat.is_none() {
        text["nat"] = serde_json::json!(nat);
    }
    let digest: [u8; 32] = Sha256::digest(text.to_string()).into();
    digest[..16].iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn netns(error: impl std::error::Error) -> CniError {
    CniError::new(ErrorCode::InvalidNetns, format!("CNI_NETNS: {error}"))
}

pub(super) fn journal(error: JournalError) -> CniError {
    let code = if matches!(error, JournalError::Busy { .. }) { ErrorCode::TryAgain } else { ErrorCode::Io };
    CniError::new(code, error.to_string()).with_details(causes(&error))
}

pub(super) fn attach(error: AttachError) -> CniError {
    let code = match &error {
        _ if error.is_retryable() => ErrorCode::TryAgain,
        AttachError::Plan(PlanError::Invalid { .. } | PlanError::Conflict { .. })
        | AttachError::NoPolicyBackend { .. }
        | AttachError::Device(DeviceError::Invalid { .. })
        | AttachError::NoDeviceSource { .. }
        | AttachError::AlreadyAttached { .. } => ErrorCode::InvalidConfig,
        AttachError::InterfaceExists { .. } | AttachError::HostNameTaken { .. } => ErrorCode::LinkExists,
        AttachError::HostNamespace { .. } | AttachError::NetNs(NetNsError::NotANamespace { .. }) => {
            ErrorCode::InvalidNetns
        }
        // The kernel's word on a value of the configuration's.
        AttachError::Step { cause: StepError::Setting { source, .. }, rollback }
            if rollback.is_empty() && matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ERANGE)) =>
        {
            ErrorCode::InvalidConfig
        }
        AttachError::Journal(_) => ErrorCode::Io,
        AttachError::Step { rollback, .. } if !rollback.is_empty() => ErrorCode::RollbackIncomplete,
        AttachError::Step {
            cause:
                StepError::Create(CreateLinkError::UnknownKind { .. })
                | StepError::Policy(PolicyError::Unsupported(_))
                | StepError::NoTranslation { .. }
                | StepError::NoVlanFiltering { .. },
            ..
        } => ErrorCode::KernelFeature,
        AttachError::Leftover { .. } => ErrorCode::RollbackIncomplete,
        AttachError::Step { cause: StepError::InUse(_), .. } => ErrorCode::AddressHeld,
        AttachError::Step { cause: StepError::PortHeld { .. }, .. } => ErrorCode::PortHeld,
        AttachError::Step { cause: StepError::GatewaySilent { .. }, .. } => ErrorCode::GatewaySilent,
        _ => ErrorCode::Failed,
    };
    CniError::new(code, error.to_string()).with_details(causes(&error))
}

pub(super) fn detach(error: DetachErrors) -> CniError {
    let code = if error.is_retryable() { ErrorCode::TryAgain } else { ErrorCode::Failed };
    CniError::new(code, error.to_string())
}
