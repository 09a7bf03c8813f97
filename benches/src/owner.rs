//! The owner of a host's policy state, as a node's agent would be.

use std::path::Path;
use std::sync::Arc;

use dcenet_core::netns::Host;
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::ClsactAttacher;
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::probe::Features;
use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, Tools};
use dcenet_policy::sources::networkpolicy::from_yaml;
use dcenet_policy::target::Tc;

use crate::Mounted;

/// Decides by policies. Dropped without [`Owner::close`], as where a benchmark fails, it unmounts its pins.
#[derive(Debug)]
pub struct Owner {
    enforcer: Enforcer,
    // Dropped after the one that uses it.
    _pins: Mounted,
}

impl Owner {
    /// Begins to decide for the host with one policy that admits TCP to one port from everywhere.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn open(host: Host, run_dir: &Path, pins: &Path) -> Self {
        Self::with(host, run_dir, pins, POLICY)
    }

    /// Begins to decide for the host with NetworkPolicies in YAML.
    ///
    /// # Panics
    /// If the kernel refuses, or the policies are not right.
    pub fn with(host: Host, run_dir: &Path, pins: &Path, policies: &str) -> Self {
        let features = Features::probe().expect("the kernel tells what it can do");
        let lowering = Arc::new(Tc::for_kernel(Sizes::default(), &features));
        let tools = Tools { loader: Arc::new(AyaLoader), attacher: Arc::new(ClsactAttacher), lowering };
        let config = EnforcerConfig {
            node: "bench".to_owned(),
            node_addresses: ["10.88.0.1"].map(|a| a.parse().expect("an address")).into(),
            run_dir: run_dir.to_owned(),
            pins: pins.to_owned(),
        };
        let mounted = Mounted::open(pins).expect("a bpffs can be mounted");
        let enforcer = Enforcer::open(host, config, tools).expect("the owner opens");
        enforcer.set_policies(from_yaml(policies).expect("the policy is right")).expect("the policy is noted");
        let report = enforcer.start().expect("the owner starts");
        assert!(report.is_complete(), "{report:?}");
        Self { enforcer, _pins: mounted }
    }

    /// The owner itself.
    pub fn enforcer(&self) -> &Enforcer {
        &self.enforcer
    }

    /// Removes what it made.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn close(self) {
        self.enforcer.uninstall().expect("the owner removes what it made");
    }
}

const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: bench, namespace: bench }
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress:
    - ports: [{ protocol: TCP, port: 8080 }]
  egress:
    - {}
";
