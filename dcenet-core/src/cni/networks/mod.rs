//! The verbs in the role of a meta plugin: several networks in one pod, some of them made by the plugins of others.
//!
//! ```
//! # use dcenet_core::cni::NetConf;
//! # let conf = serde_json::json!(
//! { "cniVersion": "1.1.0", "name": "pods", "type": "dcenet",
//!   "capabilities": { "io.kubernetes.cri.pod-annotations": true },
//!   "networks": [
//!     { "name": "overlay", "default": true,
//!       "delegate": { "cniVersion": "1.0.0", "type": "ptp", "ipam": { "type": "host-local", "subnet": "10.1.0.0/16" } } },
//!     { "name": "storage", "interface": "stor0", "link": { "kind": "macvlan", "parent": "eth1" } } ],
//!   "selection": { "definitions": "/etc/dcenet/networks", "shared": ["default"] } }
//! # );
//! # NetConf::parse(conf.to_string().as_bytes())?;
//! # Ok::<(), dcenet_core::cni::CniError>(())
//! ```
//!
//! **Networks of every pod** stand in `networks`. Each has a `name`, an `interface` (`net1`, `net2`... by its place among
//! those that are not the default where absent), and either sections `link`, `ipam` and `policy` as a configuration of one
//! network has them, or `delegate`: a CNI configuration or list of other plugins, found in `CNI_PATH`. One is the default
//! network, whose interface is the one that the runtime asks for (`CNI_IFNAME`): the one with `"default": true`, else the
//! first. A configuration with `link` at its top is its own default network, and `networks` lists further ones.
//!
//! **Networks of single pods** are asked for by the annotation `k8s.v1.cni.cncf.io/networks`, in both forms of the
//! Kubernetes Network Custom Resource Definition De-facto Standard ("Network Attachment Selection Annotation"). No API
//! server is asked. The annotation is looked for, in this order,
//!
//! 1. among the pod's annotations, which containerd passes to a plugin that declares the capability
//!    `io.kubernetes.cri.pod-annotations`;
//! 2. in `args.cni`, under the annotation's name;
//! 3. in the file `NAMESPACE_NAME.json` of the directory `selection.pods`: a JSON object of annotations, for whoever starts
//!    pods by other means. `CNI_ARGS` tells namespace and name.
//!
//! What it names are NetworkAttachmentDefinitions in the files (`.json`, `.yaml`, `.yml`) of the directory
//! `selection.definitions`. A pod may use those of its own namespace and of the namespaces that `selection.shared` lists
//! (`["default"]` where absent; `"*"` for all). The annotation is written by whoever writes pods: it chooses among what
//! the definitions offer, and can tell plugins neither labels nor pools.
//!
//! **One transaction**: ADD attaches in order; a failure takes all back in reverse. What is about to be done is on disk, in
//! `networks` of the state directory, before it is done: with the configuration of each network, and each plugin's result.
//! DEL reads nothing else, so that it does the same whatever became of configuration, definitions and pod. A call that
//! was killed is repaired by the next ADD, DEL or GC.
//!
//! **GC** takes back what the runtime does not list, attachment by attachment. By list only the network is collected whose
//! name is the configuration's own: who else uses a network of another name, such as another configuration, another meta
//! plugin or the network's own, no list tells. A configuration of one network, or one that has its addresses from this
//! program, keeps what pods of several networks have of a network of its name. Where a record cannot be read nothing is
//! collected by list.
//!
//! **Routes**: the default routes of a family are of the network with `"defaultRoute": true`, or a list of gateways
//! (`default-route` in the annotation; routers that the interface reaches), else of the first that has any. Each interface
//! has a routing table of its own and a rule for each of its addresses, so that answers leave by the interface that was
//! asked: [`Steering`](crate::engine::Steering).
//!
//! **The result** of ADD has the default network's interfaces, addresses and routes first, then those of the others, each
//! address with its interface (CNI 1.1.0, section 5, "Add Success": a plugin may make further interfaces). Runtimes take the
//! pod's address from the interface that they asked for. The record has the standard's `network-status` too:
//! [`network_status`] reads it.

mod collect;
mod config;
mod record;
mod result;
mod select;
#[cfg(test)]
mod tests;
mod verbs;

pub(super) use self::config::is_meta;
pub use self::record::network_status;
pub(super) use self::record::{alive, is_recorded};
pub(super) use self::verbs::Networks;
