//! What the daemon gives the node server: stores that stay open, and whose flushes calls share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use dcenet_core::cni::node::Server;
use dcenet_core::cni::{Backends, CniError, ErrorCode, NetConf, PolicyChoice};
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::config::{IpamConfig, StoreConfig};
use dcenet_ipam::metrics::Metrics;
use dcenet_ipam::select::Node;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::measured::MeasuredStore;
use dcenet_ipam::{Ipam, OpenError};
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};

use crate::config::ServerConfig;

/// Serves calls until it is dropped. What their stores do is counted where there are metrics to count it.
///
/// # Errors
/// Where the socket cannot be made.
pub fn start(
    section: &ServerConfig,
    run_dir: &Path,
    metrics: Option<Metrics>,
) -> Result<Server, Box<dyn std::error::Error>> {
    let path = section.socket.clone().unwrap_or_else(|| run_dir.join("dcenetd.sock"));
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let server = Server::start(&path, section.workers, Arc::new(Shared(Mutex::default(), metrics)));
    Ok(server.map_err(|e| format!("server.socket: {}: {e}", path.display()))?)
}

/// Stores by what configurations say of them; a handful on a node. Each is opened under a lock of its own: one that does not
/// answer keeps nobody from the others.
struct Shared(Mutex<BTreeMap<(String, PathBuf), Arc<Cell>>>, Option<Metrics>);

/// A store, once it could be opened.
type Cell = Mutex<Option<Arc<dyn Store>>>;

impl Shared {
    fn store(&self, config: &StoreConfig, state_dir: &Path) -> Result<Arc<dyn Store>, OpenError> {
        let key = (serde_json::json!(config).to_string(), state_dir.to_owned());
        let cell = Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default());
        let mut opened = cell.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = &*opened {
            return Ok(Arc::clone(store));
        }
        let store: Arc<dyn Store> = Arc::new(GroupStore::new(config.open(state_dir)?));
        *opened = Some(Arc::clone(&store));
        Ok(store)
    }
}

impl Backends for Shared {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        let Some(config) = conf.section::<IpamConfig>("ipam")? else { return Ok(None) };
        if let Some(other) = config.plugin.as_deref().filter(|p| *p != "dcenet") {
            let message = format!("ipam.type: {other:?} cannot be run from here; say \"dcenet\"");
            return Err(CniError::new(ErrorCode::InvalidConfig, message));
        }
        if matches!(config.store, StoreConfig::Memory {}) {
            // Pods outlive the daemon: the next one would begin with all addresses free.
            let message = "ipam.store.kind: \"memory\" forgets when the daemon ends; say \"log\"".to_owned();
            return Err(CniError::new(ErrorCode::InvalidConfig, message));
        }
        let store = self.store(&config.store, &conf.state_dir).map(|store| match &self.1 {
            Some(metrics) => Arc::new(MeasuredStore::new(store, metrics)),
            None => store,
        });
        let ipam = store.and_then(|store| Ipam::new(&config, store));
        let ipam = ipam.map_err(|error| CniError::from(LeaseError::from(error)))?;
        Ok(Some(Box::new(match Node::of_this_machine().filter(|_| config.node.is_none()) {
            Some(node) => ipam.on_node(node.name, node.labels),
            None => ipam,
        })))
    }

    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        let Some(config) = conf.section::<PolicyConfig>("policy")? else { return Ok(None) };
        let limit = config.limit.get();
        Ok(Some(PolicyChoice {
            sink: Arc::new(PinnedDefault::new(&config, &conf.run_dir)),
            await_enforced: (!limit.is_zero()).then_some(limit),
        }))
    }
}
