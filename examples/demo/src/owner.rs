//! The owner of the policy state: this process, as a daemon or a user's own agent would be.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::netns::{Host, NetNs};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::ClsactAttacher;
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::probe::Features;
use dcenet_policy::enforcer::flows::{Flow, FlowReader, LastFlows, RuleCounter};
use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, Report, Tools};
use dcenet_policy::sources::networkpolicy::from_yaml;
use dcenet_policy::target::Tc;

use crate::stage::Stage;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Decides for the pods of the stage's host.
pub struct Owner {
    enforcer: Enforcer,
    reader: FlowReader,
    last: LastFlows,
}

impl Owner {
    /// Prepares the host: maps, and the default programs that the plugin attaches. No verdict changes yet.
    pub fn open(stage: &Stage, node_addresses: BTreeSet<IpAddr>) -> Outcome<Self> {
        let sizes = Sizes::default();
        let tools = Tools {
            loader: Arc::new(AyaLoader),
            attacher: Arc::new(ClsactAttacher),
            lowering: Arc::new(Tc::for_kernel(sizes, &Features::probe()?)),
        };
        let config = EnforcerConfig {
            node: "host".to_owned(),
            node_addresses,
            run_dir: stage.directory("run"),
            pins: pins(stage),
        };
        let host = Host(NetNs::open(stage.host_path())?);
        let enforcer = Enforcer::open(host, config, tools)?;
        let reader = enforcer.flows()?;
        Ok(Self { enforcer, reader, last: LastFlows::new(1000) })
    }

    /// Tells what the cluster's namespaces are, and begins to decide.
    pub fn start(&self, policies: &str) -> Outcome<Report> {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.enforcer.set_namespace("shop", &labels(&[]))?;
        self.enforcer.set_namespace("ops", &labels(&[("team", "operators")]))?;
        self.enforcer.set_policies(from_yaml(policies)?)?;
        Ok(self.enforcer.start()?)
    }

    /// Puts other policies in the place of those before.
    pub fn change(&self, policies: &str) -> Outcome<Report> {
        Ok(self.enforcer.set_policies(from_yaml(policies)?)?)
    }

    /// What the kernel can do, and at which level of the instruction set the programs are written.
    pub fn kernel(&self) -> String {
        format!("programs at {:?}; the kernel has {}", self.enforcer.isa(), self.enforcer.features())
    }

    /// What was seen so far, oldest first.
    pub fn flows(&mut self) -> Outcome<Vec<Flow>> {
        self.reader.wait(Duration::from_millis(200))?;
        self.reader.drain(&mut &self.last)?;
        Ok(self.last.flows())
    }

    /// How many flows each rule admitted and how many packets it dropped.
    pub fn rule_counters(&self) -> Outcome<Vec<RuleCounter>> {
        Ok(self.enforcer.rule_counters()?)
    }

    /// Removes all that it made from the host.
    pub fn close(self) -> Outcome {
        drop(self.reader);
        Ok(self.enforcer.uninstall()?)
    }
}

/// Where the programs and maps are pinned.
pub fn pins(stage: &Stage) -> PathBuf {
    stage.directory("bpf")
}
