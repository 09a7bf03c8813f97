//! The plugin behind another of the list: it adds policy and translation to the interface that the other made, and hands
//! its result on as it got it (CNI 1.1.0, section 3, "ADD").
//!
//! DEL, CHECK and GC go by the own record, as for attachments that we made: a runtime may leave `prevResult` out of DEL.

use ipnet::IpNet;

use super::verbs::{Call, attach, netns};
use super::{CniError, CniResult, ErrorCode};
use crate::engine::AttachError;
use crate::link::{ChainedConfig, LinkConfig};
use crate::model::AttachmentKey;
use crate::netlink::{Family, LinkView};
use crate::netns::{NetNs, Pod};
use crate::plan::End;
use crate::provider::{Dns, Lease, LeasedAddress};

impl Call<'_> {
    /// Returns the result of the plugin before, untouched.
    pub(super) async fn add_to_chain(&self) -> Result<String, CniError> {
        let key = self.key()?;
        let (Some(previous), Some(raw)) = (&self.conf.previous, self.conf.key("prevResult")) else {
            return Err(CniError::new(
                ErrorCode::InvalidConfig,
                "link is missing; give { \"kind\": \"bridge\", \"bridge\": NAME }, or name this plugin behind another in \
                 the list, whose prevResult it then gets",
            ));
        };
        let nat = self.conf.nat()?;
        self.conf.refuse_ranges()?;
        self.conf.refuse_lost()?;
        self.conf.refuse_bandwidth()?;
        let policy = self.policy()?;
        let path = self.netns_path()?;
        let netns_of_pod = NetNs::open(path).map_err(netns)?;
        if netns_of_pod.id() == self.engine.host().0.id() && !self.invocation.netns_override {
            return Err(netns(AttachError::HostNamespace { path: path.to_owned() }));
        }
        if let Some(policy) = policy {
            policy.sink.answers(&key, policy.await_enforced.is_some())?;
        }
        let mut hold = self.hold(&key)?;
        let link = LinkConfig::Chained(self.find(&key, previous, &netns_of_pod)?);
        let lease = lease(&key, previous);
        let pod = Pod { netns: &netns_of_pod, path };
        let attached = self.attach(&mut hold, link, nat, pod, &lease).map_err(attach)?;
        if let Some(policy) = policy
            && let Some(endpoint) = self.endpoint(&attached)
        {
            self.enforce(policy, hold, &attached, &endpoint, &netns_of_pod).await?;
        }
        let mut result = raw.clone();
        if let Some(keys) = result.as_object_mut() {
            keys.entry("cniVersion").or_insert_with(|| self.conf.version.as_str().into());
        }
        Ok(result.to_string())
    }

    /// Finds the pod's device, and the host's end of it.
    fn find(&self, key: &AttachmentKey, previous: &CniResult, pod: &NetNs) -> Result<ChainedConfig, CniError> {
        let failed = |error: &dyn std::fmt::Display| {
            CniError::new(ErrorCode::Failed, format!("looking for the interface of the plugin before: {error}"))
        };
        let invalid = |message: String| CniError::new(ErrorCode::InvalidConfig, message);
        let host = &self.engine.host().0;
        let inside = pod.socket_in_place(host, Family::Route).map_err(|e| failed(&e))?.link(&key.ifname);
        let inside = inside.map_err(|e| failed(&e))?.ok_or_else(|| {
            invalid(format!("prevResult: {} is not in the container, though a plugin before is to make it", key.ifname))
        })?;
        let mac = inside.mac.ok_or_else(|| {
            invalid(format!(
                "prevResult: {} has no Ethernet address; chain this plugin behind one that gives it",
                key.ifname
            ))
        })?;
        let mut chained = ChainedConfig { host: None, pod: End { name: key.ifname.clone(), mac }, bridge: None };
        if inside.kind.as_deref() != Some("veth") {
            return Ok(chained);
        }
        // The two ends name each other: a name in a result may be wrong, or of a device of before. Indices repeat between
        // namespaces, and a pod's device may lead to a third one.
        let mut socket = host.socket(Family::Route).map_err(|e| failed(&e))?;
        let links = socket.links().map_err(|e| failed(&e))?;
        let Some(number) = socket.netns_number(pod).map_err(|e| failed(&e))? else { return Ok(chained) };
        let is_end = |l: &&LinkView| {
            let leads_there = l.peer_netns == Some(number) && l.peer == Some(inside.index);
            leads_there && Some(l.index) == inside.peer && l.kind.as_deref() == Some("veth")
        };
        let Some(end) = links.iter().find(is_end) else { return Ok(chained) };
        let named = |i: &super::Interface| i.sandbox.as_ref().is_none_or(|s| s.as_os_str().is_empty());
        let outside: Vec<&str> = previous.interfaces.iter().filter(|i| named(i)).map(|i| i.name.as_str()).collect();
        if !outside.is_empty() && !outside.contains(&end.name.as_str()) {
            return Err(invalid(format!(
                "prevResult.interfaces: {} is on the other end of {}, and is not among {}",
                end.name,
                key.ifname,
                outside.join(", ")
            )));
        }
        let name = end.name.parse()?;
        let mac = end.mac.ok_or_else(|| failed(&format!("{} has no Ethernet address", end.name)))?;
        chained.host = Some(End { name, mac });
        let master = end.master.and_then(|master| links.iter().find(|l| l.index == master));
        chained.bridge = match master {
            Some(bridge) if bridge.kind.as_deref() == Some("bridge") => Some(bridge.name.parse()?),
            _ => None,
        };
        Ok(chained)
    }
}

/// What the plugin before gave the interface.
fn lease(key: &AttachmentKey, previous: &CniResult) -> Lease {
    let own = previous
        .interfaces
        .iter()
        .position(|i| i.name == key.ifname.as_str() && i.sandbox.as_ref().is_some_and(|s| !s.as_os_str().is_empty()));
    // An address without an interface is the container's (CNI 1.1.0, section 5, "Add Success").
    let ips = previous.ips.iter().filter(|ip| ip.interface.is_none() || own.is_none() || ip.interface == own);
    let address = |address: IpNet| LeasedAddress::new(address, "", 0);
    Lease {
        addresses: ips.map(|ip| LeasedAddress { gateway: ip.gateway, ..address(ip.address) }).collect(),
        routes: Vec::new(),
        dns: Dns::default(),
        mac: None,
    }
}
