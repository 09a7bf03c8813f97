//! What the daemon gives the node server: stores that stay open, whose flushes calls share, and allocators over them that
//! know what is free.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use dcenet_core::cni::node::Server;
use dcenet_core::cni::{Backends, CniError, ErrorCode, NetConf, PolicyChoice};
use dcenet_core::provider::{AddressSource, DeviceSource, LeaseError, PolicySink};
use dcenet_ebpf::attach::Scrubber;
use dcenet_ipam::config::{IpamConfig, StoreConfig};
use dcenet_ipam::metrics::Metrics;
use dcenet_ipam::select::Node;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::measured::MeasuredStore;
use dcenet_ipam::{Ipam, OpenError};
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use dcenet_sriov::source::VfSource;

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
    let server = Server::start(&path, section.workers, Arc::new(Shared { metrics, ..Shared::default() }));
    Ok(server.map_err(|e| format!("server.socket: {}: {e}", path.display()))?)
}

/// What calls share.
#[derive(Default)]
struct Shared {
    /// Stores by what configurations say of them; a handful on a node. Each is opened under a lock of its own: one that does
    /// not answer keeps nobody from the others.
    stores: Mutex<BTreeMap<(String, PathBuf), Arc<Cell>>>,
    /// Allocators by the sections that they are of, the one that was asked last at the end.
    allocators: Mutex<VecDeque<(Asked, Option<Arc<Ipam>>)>>,
    metrics: Option<Metrics>,
}

/// A store, once it could be opened.
type Cell = Mutex<Option<Arc<dyn Store>>>;

/// The section, where its store is, and the node that asks.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    config: IpamConfig,
    state_dir: PathBuf,
    node: Option<Node>,
}

/// Networks of a node have a section each; those beyond are of pods that bring their own.
const MOST_ALLOCATORS: usize = 64;

impl Shared {
    fn store(&self, config: &StoreConfig, state_dir: &Path) -> Result<Arc<dyn Store>, OpenError> {
        let key = (serde_json::json!(config).to_string(), state_dir.to_owned());
        let cell = Arc::clone(self.stores.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default());
        let mut opened = cell.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = &*opened {
            return Ok(Arc::clone(store));
        }
        let store: Arc<dyn Store> = Arc::new(GroupStore::new(config.open(state_dir)?));
        *opened = Some(Arc::clone(&store));
        Ok(store)
    }

    /// The allocator of a section. What a section that is asked twice knows of its pools, it keeps in memory: callers at one
    /// time then do not try for the same address. To learn that of one that is asked once would be in vain.
    fn allocator(&self, asked: Asked) -> Result<Arc<Ipam>, OpenError> {
        let known = self.seen(&asked);
        if let Some(Some(ipam)) = known {
            return Ok(ipam);
        }
        let store = self.store(&asked.config.store, &asked.state_dir)?;
        let store: Arc<dyn Store> = match &self.metrics {
            Some(metrics) => Arc::new(MeasuredStore::new(store, metrics)),
            None => store,
        };
        let mut ipam = Ipam::new(&asked.config, store)?;
        if let Some(Node { name, labels }) = asked.node.clone() {
            ipam = ipam.on_node(name, labels);
        }
        if known.is_none() {
            return Ok(Arc::new(ipam));
        }
        let ipam = Arc::new(ipam.with_index());
        let mut allocators = self.allocators.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, kept)) = allocators.iter_mut().find(|(other, _)| *other == asked) else { return Ok(ipam) };
        // Another call may have been sooner.
        Ok(Arc::clone(kept.get_or_insert(ipam)))
    }

    /// What is kept of a section; `None` where it is asked for the first time.
    fn seen(&self, asked: &Asked) -> Option<Option<Arc<Ipam>>> {
        let mut allocators = self.allocators.lock().unwrap_or_else(PoisonError::into_inner);
        let at = allocators.iter().position(|(other, _)| other == asked);
        let (entry, known) = match at.and_then(|at| allocators.remove(at)) {
            Some((asked, ipam)) => ((asked, ipam.clone()), Some(ipam)),
            None => ((asked.clone(), None), None),
        };
        allocators.push_back(entry);
        if allocators.len() > MOST_ALLOCATORS {
            allocators.pop_front();
        }
        known
    }
}

impl Backends for Shared {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        if conf.has_ipam_of_others() {
            let message = "ipam.type: the IPAM plugins of others are not run by the daemon; remove \"daemon\", and the plugin \
                           does it, or say \"dcenet\"";
            return Err(CniError::new(ErrorCode::InvalidConfig, message));
        }
        let Some(config) = conf.section::<IpamConfig>("ipam")? else { return Ok(None) };
        if !config.store.outlives_process() {
            // Pods outlive the daemon: the next one would begin with all addresses free.
            let message = "ipam.store.kind: \"memory\" forgets when the daemon ends; say \"log\"".to_owned();
            return Err(CniError::new(ErrorCode::InvalidConfig, message));
        }
        let node = config.owner();
        let asked = Asked { config, state_dir: conf.state_dir.clone(), node };
        let ipam = self.allocator(asked).map_err(|error| CniError::from(LeaseError::from(error)))?;
        Ok(Some(Box::new(ipam)))
    }

    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        let Some(config) = conf.section::<PolicyConfig>("policy")? else { return Ok(None) };
        let limit = config.limit.get();
        Ok(Some(PolicyChoice {
            sink: Arc::new(PinnedDefault::new(&config, &conf.run_dir)),
            await_enforced: (!limit.is_zero()).then_some(limit),
        }))
    }

    fn former_policy(&self, conf: &NetConf) -> Option<Arc<dyn PolicySink>> {
        Some(Arc::new(PinnedDefault::new(&PolicyConfig::default(), &conf.run_dir)))
    }

    fn devices(&self, conf: &NetConf) -> Result<Option<Arc<dyn DeviceSource>>, CniError> {
        let section = conf.section::<serde_json::Value>("sriov")?;
        Ok(Some(Arc::new(VfSource::of_this_machine(&conf.state_dir, section, Some(Arc::new(Scrubber))))))
    }
}
