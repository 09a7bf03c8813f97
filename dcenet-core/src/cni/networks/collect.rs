//! GC of several networks.

use serde_json::{Value, json};

use super::config::{By, Network};
use super::record::{All, Record};
use super::verbs::{Networks, joined};
use crate::cni::verbs::{Call, journal};
use crate::cni::{CniError, ErrorCode, PluginCall};
use crate::link::LinkConfig;
use crate::model::{AttachmentKey, ContainerId, IfName, NetworkName};

impl Networks<'_> {
    /// Frees what the runtime does not list.
    ///
    /// Attachments of several networks are taken back one by one, by their records. By list only the network is collected
    /// that has the configuration's own name: whoever else attaches to networks of other names, by this program or not, is
    /// known to no list that is here.
    pub(in crate::cni) async fn gc(&self) -> Result<(), CniError> {
        // Without a list nothing is known to be stale; an empty list says that all is.
        let Some(runtimes) = &self.conf.valid_attachments else { return Ok(()) };
        let mut errors = Vec::new();
        let stale = |key: &AttachmentKey| {
            key.network == self.conf.name && !runtimes.iter().any(|(c, i)| *c == key.container && *i == key.ifname)
        };
        let mut known = self.networks_of_all().unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        });
        for record in self.records.all().map_err(journal)?.records {
            let key = &record.intent.key;
            if key.network == self.conf.name {
                known.extend(record.intent.networks.iter().cloned().map(|mut network| {
                    if let By::Plugins { chain, .. } = &mut network.by {
                        *chain = chain.without_args();
                    }
                    network
                }));
            }
            if !stale(key) {
                continue;
            }
            let removed = match self.records.find(key).map_err(journal) {
                Ok(Some(held)) => self.remove(key, held).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            errors.extend(removed.err().map(|e| CniError { message: format!("{key}: {}", e.message), ..e }));
        }
        let All { records, unreadable } = self.records.all().map_err(journal)?;
        if unreadable.is_empty() {
            self.collect(&known, &records, runtimes, &mut errors).await?;
        }
        // What it holds is alive for all that is known.
        errors.extend(unreadable.into_iter().map(|error| {
            let message = format!("{error}; nothing is collected by list until it is repaired, or deleted by hand");
            CniError::new(ErrorCode::Io, message)
        }));
        if errors.is_empty() { Ok(()) } else { Err(CniError::new(ErrorCode::TryAgain, joined(&errors))) }
    }

    /// Has the networks that bear the configuration's name free what is neither in the runtime's list nor in a record, and
    /// removes devices that networks shared of which nothing is left.
    async fn collect(
        &self,
        known: &[Network],
        records: &[Record],
        runtimes: &[(ContainerId, IfName)],
        errors: &mut Vec<CniError>,
    ) -> Result<(), CniError> {
        let mut alive: Vec<(NetworkName, ContainerId, IfName)> = Vec::new();
        for record in records {
            for network in &record.intent.networks {
                alive.push((network.name()?, record.intent.key.container.clone(), network.ifname.clone()));
            }
        }
        // The runtime's are of this network too where they were attached before it had company.
        alive.extend(runtimes.iter().map(|(c, i)| (self.conf.name.clone(), c.clone(), i.clone())));
        let bears_the_name = |network: &Network| {
            matches!(network.by, By::Own(_)) && network.name().is_ok_and(|name| name == self.conf.name)
        };
        if !known.iter().any(bears_the_name) {
            // Attached by the sections of one network, before these were moved into `networks`.
            for record in self.engine.attachments(&self.conf.name).map_err(journal)? {
                let key = &record.key;
                let lives = |(n, c, i): &(NetworkName, ContainerId, IfName)| {
                    *n == key.network && *c == key.container && *i == key.ifname
                };
                if !alive.iter().any(lives) {
                    errors.extend(self.remove_single(key).await.err());
                }
            }
        }
        let mut seen = Vec::new();
        for network in known {
            let name = network.name()?;
            let mut valid: Vec<Value> = Vec::new();
            for (_, container, ifname) in alive.iter().filter(|(network, ..)| *network == name) {
                let one = json!({ "containerID": container, "ifname": ifname });
                if !valid.contains(&one) {
                    valid.push(one);
                }
            }
            let what = match &network.by {
                By::Own(_) => (name.clone(), None),
                By::Plugins { chain, .. } => (name.clone(), Some(chain.without_args())),
            };
            if seen.contains(&what) {
                continue;
            }
            seen.push(what);
            match &network.by {
                By::Own(conf) if name == self.conf.name => {
                    let mut conf = conf.clone();
                    conf["cni.dev/valid-attachments"] = Value::Array(valid);
                    let collected = async {
                        let (invocation, conf) = self.single(network, &conf, None)?;
                        Call::new(&invocation, &conf, self.backends)?.gc().await
                    };
                    errors.extend(collected.await.err().map(|e| network.blame(e)));
                }
                By::Plugins { chain, .. } if name == self.conf.name => {
                    let left = chain.gc(&self.plugins, &PluginCall::default(), &Value::Array(valid));
                    errors.extend(left.into_iter().map(|e| network.blame(e)));
                }
                By::Own(conf)
                    if valid.is_empty()
                        && runtimes.is_empty()
                        && self.engine.attachments(&name).map_err(journal)?.is_empty() =>
                {
                    let link = conf.get("link").map(LinkConfig::read).transpose()?;
                    let shared = link.iter().flat_map(|link| link.driver().shared());
                    let removed = shared.filter_map(|shared| self.engine.remove_idle(&shared).err());
                    errors.extend(removed.map(|e| network.blame(CniError::new(ErrorCode::Failed, e.to_string()))));
                }
                By::Own(_) | By::Plugins { .. } => {}
            }
        }
        Ok(())
    }
}
