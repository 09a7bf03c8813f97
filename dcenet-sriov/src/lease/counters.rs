//! What was counted of functions while somebody has them.

use std::collections::BTreeMap;

use dcenet_core::model::AttachmentKey;

use super::record::{VfAccount, away, is_committed};
use super::{LeaseError, Leases};
use crate::address::{PciAddress, VfIndex};
use crate::kernel::{ErrorClass, KernelError, LinkCounters, Namespace};

/// What was counted of a function that somebody has, since it was made: earlier leases are in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// The function.
    pub vf: PciAddress,
    /// Who has it.
    pub owner: AttachmentKey,
    /// By its network device, which sees what the pod's stack sends and takes. `None` where it is not where it was moved to.
    pub by_device: Option<LinkCounters>,
    /// By its port, which also sees what goes past the pod's stack. `None` where the port's driver counts nothing of any
    /// of its functions, or could not be asked.
    pub by_port: Option<LinkCounters>,
}

impl Leases {
    /// What was counted of each function that somebody has, in the order of their addresses. Each port is asked once, and each
    /// namespace. Nothing is locked; what cannot be asked is left out, for the log at level debug.
    ///
    /// # Errors
    /// Where the ledger cannot be read.
    ///
    /// Bed: igb, for the devices' counters; modelled, for the ports', which neither igb nor netdevsim has.
    pub fn counters(&self) -> Result<Vec<Counted>, LeaseError> {
        let mut ports: BTreeMap<PciAddress, BTreeMap<VfIndex, LinkCounters>> = BTreeMap::new();
        let mut all = Vec::new();
        for (vf, VfAccount { standing, open, .. }) in self.accounts()? {
            let open = open.filter(|open| open.boot == self.ledger.boot() && is_committed(&open.steps));
            let (Some(open), Some(id)) = (open, standing.and_then(|standing| standing.vf)) else { continue };
            let work = self.work(id, None);
            let of_port = ports.entry(id.port).or_insert_with(|| {
                let asked = work.port().and_then(|port| Ok(self.kernel.vf_counters(port)?));
                let counted = asked.unwrap_or_else(|error| {
                    tracing::debug!(port = %id.port, %error, "its counters cannot be read");
                    Vec::new()
                });
                // The kernel does not tell a driver that does not count.
                let counts = counted.iter().any(|(_, counters)| *counters != LinkCounters::default());
                counted.into_iter().filter(|_| counts).collect()
            });
            let by_port = of_port.get(&id.index).copied();
            let by_device = away(&open.steps).map(|away| self.device_counters(vf, away)).transpose();
            let by_device = by_device.unwrap_or_else(|error| {
                tracing::debug!(%vf, %error, "its device's counters cannot be read");
                None
            });
            all.push(Counted { vf, owner: open.intent.owner, by_device: by_device.flatten(), by_port });
        }
        Ok(all)
    }

    fn device_counters(&self, vf: PciAddress, away: &super::record::Away) -> Result<Option<LinkCounters>, KernelError> {
        let there = Namespace::Path(away.path.clone());
        if self.kernel.namespace_id(&there)? != Some(away.netns) {
            return Ok(None);
        }
        match self.kernel.netdev_counters(&there, vf) {
            Err(error) if error.class == ErrorClass::NamespaceGone => Ok(None),
            counted => counted,
        }
    }
}
