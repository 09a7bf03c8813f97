//! The verbs in the role of an IPAM plugin: another plugin, whose configuration names us in `ipam.type`, makes the devices
//! (CNI 1.1.0, section 4, "Plugin Delegation").
//!
//! What a pool says about the link beside the address has to agree with the other plugin's own configuration, for the
//! result of an IPAM plugin cannot carry it.

use serde_json::Value;

use super::verbs::{Call, journal};
use super::{CniError, CniResult, ErrorCode, networks};
use crate::engine::Hold;
use crate::model::AttachmentKey;
use crate::provider::Lease;

impl Call<'_> {
    /// ADD.
    pub(super) async fn lease_for_another(&self) -> Result<CniResult, CniError> {
        self.refuse_policy()?;
        self.conf.refuse_ranges()?;
        let key = self.key()?;
        let hold = self.hold_foreign(&key)?;
        let before = self.held(&key).await?;
        let lease = self.lease(&key).await?;
        match self.refuse_misfit(&lease) {
            Ok(()) => Ok(CniResult::of_lease(&lease)),
            // It is on a device since an earlier call.
            Err(error) if before.is_some() => Err(error),
            Err(error) => Err(self.give_back(&hold, lease.sequence(), error).await),
        }
    }

    /// CHECK.
    pub(super) async fn check_for_another(&self) -> Result<(), CniError> {
        let key = self.key()?;
        let held = self.held(&key).await?.map(|lease| lease.addresses).unwrap_or_default();
        let mut drift = self.not_held(&key, &held);
        if held.is_empty() && drift.is_empty() {
            drift.push(format!("{key} holds no address"));
        }
        if let Some(previous) = &self.conf.previous {
            let shown = |h: &ipnet::IpNet| previous.ips.iter().any(|ip| ip.address == *h);
            let hidden = held.iter().filter(|h| !shown(&h.address));
            drift.extend(hidden.map(|h| format!("address {} of {key} is not in the result", h.address)));
        }
        if drift.is_empty() { Ok(()) } else { Err(CniError::new(ErrorCode::Drift, drift.join("; "))) }
    }

    /// DEL. The other plugin has removed its devices before, or does it next: nobody but it can tell.
    pub(super) async fn release_for_another(&self) -> Result<(), CniError> {
        let key = self.key()?;
        let hold = self.hold_foreign(&key)?;
        if let (Some(addresses), Some(lease)) = (self.addresses()?, self.held(&key).await?) {
            addresses.release(&key, lease.sequence()).await?;
        }
        hold.close().map_err(journal)
    }

    /// GC.
    pub(super) async fn collect_for_another(&self) -> Result<(), CniError> {
        let (Some(valid), Some(addresses)) = (&self.conf.valid_attachments, self.addresses()?) else { return Ok(()) };
        // What this program attached itself under the name, alone or as one of several networks, is in no list of the runtime's.
        let mut kept = valid.clone();
        kept.extend(networks::alive(&self.conf.state_dir, &self.conf.name).map_err(journal)?);
        let records = self.engine.attachments(&self.conf.name).map_err(journal)?;
        kept.extend(records.into_iter().map(|record| (record.key.container, record.key.ifname)));
        let retained = self.retain(addresses, &self.conf.name, &kept).await;
        // Of calls that were killed before they had gone on.
        self.engine.remove_empty_records().map_err(journal).and(retained)
    }

    /// STATUS.
    pub(super) async fn status_for_another(&self) -> Result<(), CniError> {
        let unavailable = |error: CniError| CniError { code: ErrorCode::Unavailable, ..error };
        self.refuse_policy().map_err(unavailable)?;
        self.engine.ready().map_err(|e| unavailable(journal(e)))?;
        if let Some(addresses) = self.addresses().map_err(unavailable)? {
            addresses.ready().await.map_err(|e| unavailable(e.into()))?;
        }
        Ok(())
    }

    /// Holds an attachment whose devices are another plugin's.
    fn hold_foreign(&self, key: &AttachmentKey) -> Result<Hold<'_>, CniError> {
        let hold = self.hold(key)?;
        if hold.is_recorded() {
            let message =
                format!("name: \"{}\" has {key} attached by dcenet itself; name this network otherwise", key.network);
            return Err(CniError::new(ErrorCode::InvalidConfig, message));
        }
        Ok(hold)
    }

    fn refuse_policy(&self) -> Result<(), CniError> {
        if self.policy.as_ref().is_ok_and(Option::is_none) {
            return Ok(());
        }
        let message = format!(
            "policy: cannot be put on devices of plugin {}, which asks only for addresses; drop the section",
            self.their_key("type")
        );
        Err(CniError::new(ErrorCode::UnsupportedField, message))
    }

    /// Refuses a lease whose VLAN, MTU or Ethernet address the other plugin would not give to its device.
    fn refuse_misfit(&self, lease: &Lease) -> Result<(), CniError> {
        let theirs = |key: &str| self.conf.key(key).and_then(Value::as_u64);
        let plugin = self.their_key("type");
        let told = |key: &str| format!("plugin {plugin} is told {key} {}", self.their_key(key));
        let refuse = |message: String| Err(CniError::new(ErrorCode::InvalidConfig, message));
        if let Some(vlan) = lease.vlan()
            && theirs("vlan").or(theirs("vlanId")) != Some(vlan.get().into())
        {
            return refuse(format!(
                "ipam.pools[].vlan: {vlan} of pool {} is not applied, for {}; say so there too, or drop it from the pool",
                pool_of(lease, |a| a.vlan == Some(vlan)),
                told("vlan")
            ));
        }
        if let Some(mtu) = lease.mtu()
            && theirs("mtu").is_none_or(|n| n == 0 || n > mtu.get().into())
        {
            return refuse(format!(
                "ipam.pools[].mtu: {mtu} of pool {} is not applied, for {}; say at most {mtu} there, or drop it from the \
                 pool",
                pool_of(lease, |a| a.mtu == Some(mtu)),
                told("mtu")
            ));
        }
        let asked = self.conf.runtime.mac.or(self.invocation.args.mac);
        if let Some(mac) = lease.mac
            && asked != Some(mac)
            && self.conf.key("mac").and_then(Value::as_str).is_none_or(|text| text.parse() != Ok(mac))
        {
            return refuse(format!(
                "ipam.pools[].claims: {mac} is kept with the address and not applied, for {}; have the runtime ask for it \
                 (capability mac), or drop it from the claim",
                told("mac")
            ));
        }
        Ok(())
    }

    /// What their configuration says, for people.
    fn their_key(&self, key: &str) -> String {
        self.conf.key(key).map_or_else(|| "nothing".to_owned(), Value::to_string)
    }
}

fn pool_of(lease: &Lease, which: impl Fn(&crate::provider::LeasedAddress) -> bool) -> &str {
    lease.addresses.iter().find(|a| which(a)).map_or("", |a| a.pool.as_str())
}
