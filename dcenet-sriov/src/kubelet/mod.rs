//! The functions of a pool as a resource of Kubernetes: the kubelet's device plugin API, v1beta1
//! (`k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1`).
//!
//! ```text
//!   kubelet.sock     <- Register        DevicePlugin tells the kubelet of its own socket
//!   RESOURCE.sock    <- ListAndWatch    the kubelet hears which functions there are, each with its NUMA node
//!                    <- GetPreferredAllocation   which of those that are left go best together
//!                    <- Allocate        what a container finds: PCIDEVICE_RESOURCE, character devices
//! ```
//!
//! What the kubelet allots it keeps account of itself; nothing is leased here. The plugin that the runtime calls leases the
//! function, when it finds its address as `deviceID`.
//!
//! Who runs several pools runs one [`DevicePlugin`] for each.
//!
//! # When the kubelet goes
//! A kubelet that starts removes all sockets of the directory and knows no plugin any more (`CleanupPluginDirectory` of
//! `pkg/kubelet/cm/devicemanager/manager.go`). Therefore both sockets are looked at every second: where the own one is gone it
//! is made anew, and where either is another one, or nobody follows the list any more, the plugin registers again. Without a
//! kubelet it waits.
//!
//! # What else lends from the pool
//! The kubelet knows what it allotted, and nobody else's: a pool that is a resource here is not to be named by `link.pool`
//! too, or it allots functions that pods without the resource have.
//!
//! Bed: fixture, with a kubelet that tests play over the real sockets.

mod api;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use crate::address::PciAddress;
use crate::allocate::{CandidatePort, Candidates, Near, Request, Shape};
use crate::inventory::{Inventory, VfDriverKind};
use crate::pool::Pools;
use crate::source::Machine;

/// Where a kubelet has its sockets unless it was told otherwise.
pub const DIRECTORY: &str = "/var/lib/kubelet/device-plugins";

/// Which functions a resource has now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resource {
    /// What is known of functions and their ports.
    pub inventory: Inventory,
    /// The functions, such as those of a pool.
    pub members: Vec<PciAddress>,
    /// Those of them that nobody can have now, such as those in quarantine.
    pub ailing: BTreeSet<PciAddress>,
}

/// Looks which functions there are; what it says is told to the log, and the kubelet keeps what it knew.
pub type Look = dyn Fn() -> Result<Resource, Box<dyn std::error::Error + Send + Sync>> + Send + Sync;

/// Tells a kubelet of functions.
#[derive(Clone)]
pub struct DevicePlugin {
    name: String,
    look: Arc<Look>,
    shape: Shape,
    near: Vec<Near>,
    interval: Duration,
}

/// Why functions cannot be told of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubeletError {
    /// The kubelet would not take the name.
    #[error("resource: {name:?}: {reason}; give a name such as example.com/vf")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Another process serves the resource.
    #[error("{}: another process answers there; stop it, or give the resource another name", .0.display())]
    Served(PathBuf),
    /// The socket cannot be made.
    #[error("{}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kubelet knows the plugin and does not want it: another version, or options that it has not.
    #[error("the kubelet refuses resource {name}: {reason}")]
    Refused {
        /// The resource.
        name: String,
        /// What the kubelet says.
        reason: String,
    },
    /// The functions cannot be looked at the first time.
    #[error("the functions cannot be listed: {0}")]
    Look(Box<dyn std::error::Error + Send + Sync>),
}

impl DevicePlugin {
    /// Tells of what `look` finds, as the resource `name`, such as `example.com/vf`.
    ///
    /// # Errors
    /// As of [`check_name`](Self::check_name).
    ///
    /// Bed: fixture.
    pub fn new(name: &str, look: Arc<Look>) -> Result<Self, KubeletError> {
        Self::check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            look,
            shape: Shape::Lowest,
            near: Vec::new(),
            interval: Duration::from_secs(5),
        })
    }

    /// Whether the kubelet would take the name for a resource.
    ///
    /// # Errors
    /// [`KubeletError::Name`], by the kubelet's rules for extended resources
    /// (`IsExtendedResourceName` of `pkg/apis/core/v1/helper/helpers.go`).
    ///
    /// Bed: pure.
    pub fn check_name(name: &str) -> Result<(), KubeletError> {
        let wrong = |reason| Err(KubeletError::Name { name: name.to_owned(), reason });
        let Some((domain, resource)) = name.split_once('/') else { return wrong("without a domain") };
        let inner = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        let outer = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        };
        if domain.is_empty()
            || domain.len() > 253 - "requests.".len()
            || !domain.split('.').all(|label| outer(label) && is_label(label))
        {
            return wrong("its domain is none of DNS, in lower case");
        }
        // The kubelet makes "requests." and the name a key of a quota.
        if resource.len() > 63 || !outer(resource) || !resource.chars().all(inner) {
            return wrong("what follows the domain is not up to 63 letters, digits, '-', '_' and '.'");
        }
        if domain.ends_with("kubernetes.io") || domain.starts_with("requests.") {
            return wrong("its domain is Kubernetes' own");
        }
        Ok(())
    }

    /// How functions of one container spread over ports; [`Shape::Lowest`] unless told.
    pub fn with_shape(mut self, shape: Shape) -> Self {
        self.shape = shape;
        self
    }

    /// Devices that functions are to be near to, such as the GPUs of the node.
    pub fn near(mut self, near: Vec<Near>) -> Self {
        self.near = near;
        self
    }

    /// How often functions are looked at; 5 s unless told.
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// The name of the own socket in the kubelet's directory; at most 62 characters, for a path of a socket has 107 at most
    /// (`sun_path` of unix(7)).
    pub fn socket(&self) -> String {
        Self::socket_of(&self.name)
    }

    /// As [`DevicePlugin::socket`], of a resource of this name.
    pub fn socket_of(resource: &str) -> String {
        let mut name = resource.replace('/', "_");
        if name.len() > 57 {
            let mut hasher = DefaultHasher::new();
            hasher.write(name.as_bytes());
            // It is ASCII.
            name.truncate(40);
            name = format!("{name}-{:016x}", hasher.finish());
        }
        format!("{name}.sock")
    }

    /// Serves until `stop` ends, then removes its socket: to the kubelet the functions are unhealthy then, and after five
    /// minutes gone; who has one keeps it. `directory` is [`DIRECTORY`] but in tests. Needs a runtime of tokio with I/O and time.
    ///
    /// # Errors
    /// What must be mended by somebody: where the kubelet is not there, or goes, it is waited for.
    ///
    /// Bed: fixture.
    pub async fn serve(&self, directory: &Path, stop: impl Future<Output = ()>) -> Result<(), KubeletError> {
        server::serve(self, directory, stop).await
    }

    /// The variable that tells a container of its functions of the resource `name`, as other device plugins for SR-IOV name
    /// it. Several names may have one variable: a container would find the functions of one of them.
    ///
    /// Bed: pure.
    pub fn variable(name: &str) -> String {
        let name = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
        format!("PCIDEVICE_{}", name.collect::<String>())
    }
}

fn is_label(label: &str) -> bool {
    label.len() <= 63 && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

impl Resource {
    /// A pool as it is now, for a [`Look`]. Functions in quarantine are looked at again, for nobody else would: what the kubelet
    /// is not offered it allots to nobody. Ailing is what stays there, and what has no driver.
    ///
    /// # Errors
    /// Where the machine cannot be read, pools overlap, or none has the name.
    ///
    /// Bed: fixture, with the modelled kernel's ledger.
    pub fn of_pool(
        machine: &Machine,
        pools: &Pools,
        pool: &str,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let inventory = Inventory::scan(&*machine.sysfs)?;
        let members = pools.resolve(&inventory, &(machine.host)()?)?;
        let Some(members) = members.into_iter().find(|members| members.pool == pool) else {
            let known: Vec<&str> = pools.configs().iter().map(|pool| pool.name.as_str()).collect();
            return Err(format!("{pool:?} is none of the pools, which are {known:?}").into());
        };
        let quarantined: Vec<PciAddress> = machine.leases.quarantined()?.into_iter().collect();
        let mut ailing = BTreeSet::new();
        if !quarantined.is_empty() {
            machine.leases.recover_quarantined(&quarantined)?;
            ailing = machine.leases.quarantined()?;
        }
        let bare = inventory.vfs().filter(|(_, vf)| vf.driver == VfDriverKind::None).map(|(_, vf)| vf.address);
        ailing.extend(bare);
        Ok(Self { inventory, members: members.functions, ailing })
    }

    /// The devices as the kubelet is told of them, in the order of their addresses.
    fn devices(&self) -> Vec<api::Device> {
        let mut devices: BTreeMap<PciAddress, api::Device> = BTreeMap::new();
        for address in &self.members {
            // Whose port has lost it is no device any more.
            let Some((pf, _)) = self.inventory.vf(*address) else { continue };
            let numa = pf.location.numa.map(|node| api::NumaNode { id: i64::from(node) });
            let health = if self.ailing.contains(address) { "Unhealthy" } else { "Healthy" };
            let topology = numa.map(|node| api::TopologyInfo { nodes: vec![node] });
            devices.insert(*address, api::Device { id: address.to_string(), health: health.to_owned(), topology });
        }
        devices.into_values().collect()
    }

    /// The function that the kubelet calls so.
    fn function(&self, id: &str) -> Option<PciAddress> {
        id.parse().ok().filter(|address| self.members.contains(address))
    }

    /// Those that go best together with what must be among them, as far as there are so many: it is a hint, by an error the
    /// kubelet would refuse the pod.
    fn prefer(&self, plugin: &DevicePlugin, request: &api::ContainerPreferredAllocationRequest) -> Vec<PciAddress> {
        let known = |ids: &[String]| ids.iter().filter_map(|id| self.function(id)).collect::<Vec<_>>();
        let (mut chosen, available) = (known(&request.must_include), known(&request.available));
        let left = |a: &PciAddress| available.contains(a) && !chosen.contains(a);
        let ports = self.inventory.functions.iter().map(|pf| {
            let vfs = pf.vfs.iter().map(|vf| vf.address);
            let (free, taken): (Vec<_>, Vec<_>) = vfs.partition(left);
            let begun = taken.iter().any(|a| chosen.contains(a));
            let port =
                CandidatePort { address: pf.address, location: pf.location.clone(), in_use: taken.len() as u32, free };
            (port, begun)
        });
        let ports = ports.filter(|(port, _)| !port.free.is_empty());
        let (begun, others): (Vec<_>, Vec<_>) = ports.partition(|(_, begun)| *begun);
        // As few ports as can be, and each function from another port, are meant together with what must be among them. What
        // is missing then comes from anywhere.
        let rounds = match plugin.shape {
            Shape::Pack => vec![(begun.clone(), Shape::Pack), (others.clone(), Shape::Pack)],
            Shape::Distinct => vec![(others.clone(), Shape::Distinct), ([begun, others].concat(), Shape::Spread)],
            shape => vec![([begun, others].concat(), shape)],
        };
        let wanted = usize::try_from(request.size).unwrap_or(0);
        for (ports, shape) in rounds {
            let mut ports: Vec<CandidatePort> = ports.into_iter().map(|(port, _)| port).collect();
            ports.iter_mut().for_each(|port| port.free.retain(|a| !chosen.contains(a)));
            ports.retain(|port| !port.free.is_empty());
            let there = match shape {
                Shape::Distinct => ports.len(),
                _ => ports.iter().map(|port| port.free.len()).sum(),
            };
            let count = wanted.saturating_sub(chosen.len()).min(there);
            let request = Request { near: plugin.near.clone(), shape, ..Request::of(count) };
            match (Candidates { ports }).choose(&request) {
                Ok(choice) => chosen.extend(choice.functions),
                Err(refusal) => tracing::debug!(%refusal, "no preference"),
            }
        }
        chosen.sort_unstable();
        chosen
    }

    /// What a container finds of its functions.
    fn hand_over(&self, plugin: &DevicePlugin, ids: &[String]) -> Result<api::ContainerAllocateResponse, Status> {
        let known = |id: &String| {
            self.function(id).ok_or_else(|| Status::not_found(format!("{id}: no function of this resource")))
        };
        let functions = ids.iter().map(known).collect::<Result<Vec<_>, Status>>()?;
        let mut files: BTreeSet<String> = BTreeSet::new();
        for address in &functions {
            let ailing = self.ailing.contains(address);
            let Some((_, vf)) = self.inventory.vf(*address).filter(|_| !ailing) else {
                return Err(Status::failed_precondition(format!("{address}: nobody can have this function now")));
            };
            if let VfDriverKind::UserSpace(driver) = &vf.driver {
                let Some(group) = vf.iommu_group else {
                    let said = format!("{address}: {driver} drives it, and it has no IOMMU group; turn the IOMMU on");
                    return Err(Status::failed_precondition(said));
                };
                files.extend(["/dev/vfio/vfio".to_owned(), format!("/dev/vfio/{group}")]);
            }
            let rdma = vf.rdma.iter().flat_map(|device| &device.character_devices);
            files.extend(rdma.map(|name| format!("/dev/infiniband/{name}")));
            if !vf.rdma.is_empty() {
                files.insert("/dev/infiniband/rdma_cm".to_owned());
            }
        }
        let list: Vec<String> = functions.iter().map(PciAddress::to_string).collect();
        let device = |path: String| api::DeviceSpec {
            container_path: path.clone(),
            host_path: path,
            permissions: "rw".to_owned(),
        };
        Ok(api::ContainerAllocateResponse {
            envs: [(DevicePlugin::variable(&plugin.name), list.join(","))].into(),
            devices: files.into_iter().map(device).collect(),
        })
    }
}
