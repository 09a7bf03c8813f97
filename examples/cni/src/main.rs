//! The CNI plugin `dcenet`: core's engine, with addresses from ipam's store on this machine, and devices under policy from
//! their first packet on. It is also the IPAM plugin of others, whose configuration says `"ipam": { "type": "dcenet" }`.

use std::io::{stdin, stdout};
use std::process::ExitCode;
use std::sync::Arc;

use dcenet_core::cni::{Backends, CniError, ErrorCode, NetConf, PluginAddresses, PolicyChoice, serve};
use dcenet_core::provider::{AddressSource, DeviceSource, LeaseError, PolicySink};
use dcenet_ebpf::attach::Scrubber;
use dcenet_ipam::config::IpamConfig;
use dcenet_ipam::{Ipam, OpenError};
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use dcenet_sriov::source::VfSource;

struct Dcenet;

impl Backends for Dcenet {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        if conf.has_ipam_of_others() {
            return Ok(Some(Box::new(PluginAddresses::new(conf, |name| std::env::var_os(name))?)));
        }
        let Some(config) = conf.section::<IpamConfig>("ipam")? else { return Ok(None) };
        let invalid = |message: String| CniError::new(ErrorCode::InvalidConfig, message);
        if !config.store.outlives_process() {
            // Every call is a process of its own: each would begin with all addresses free.
            return Err(invalid("ipam.store.kind: \"memory\" forgets between two calls; say \"log\"".to_owned()));
        }
        let open = |error: OpenError| CniError::from(LeaseError::from(error));
        let ipam = Ipam::open(&config, &conf.state_dir).map_err(open)?;
        Ok(Some(Box::new(match config.owner() {
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

    fn former_policy(&self, conf: &NetConf) -> Option<Arc<dyn PolicySink>> {
        Some(Arc::new(PinnedDefault::new(&PolicyConfig::default(), &conf.run_dir)))
    }

    fn devices(&self, conf: &NetConf) -> Result<Option<Arc<dyn DeviceSource>>, CniError> {
        let section = conf.section::<serde_json::Value>("sriov")?;
        Ok(Some(Arc::new(VfSource::of_this_machine(&conf.state_dir, section, Some(Arc::new(Scrubber))))))
    }
}

fn main() -> ExitCode {
    pollster::block_on(serve(|name| std::env::var_os(name), &mut stdin().lock(), &mut stdout().lock(), &Dcenet))
}
