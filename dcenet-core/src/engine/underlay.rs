//! Steps that ask or tell the segment of a link.

use std::io;
use std::net::IpAddr;

use super::apply::{Session, gated, look_up};
use super::error::StepError;
use crate::model::{IfName, MacAddr};
use crate::netlink::LinkView;
use crate::plan::{Operation, Step};
use crate::probe::{GatewayProbe, Segment};

impl Session<'_> {
    /// Does a step that is a conversation with others on the link.
    pub(super) fn talk(&mut self, step: &Step) -> Result<(), StepError> {
        match &step.operation {
            Operation::ProbeConflicts { link, mac, addresses, timing } => {
                let what = "probe for conflicts";
                self.await_carrier(step, link)?;
                let probe = |segment: Segment| segment.conflicts(addresses, *timing);
                let found = self.on_segment(step, what, link, *mac, addresses, probe)?;
                if found.is_empty() { Ok(()) } else { Err(StepError::InUse(found)) }
            }
            Operation::Announce { link, mac, addresses, times } => {
                let announce = |segment: Segment| segment.announce(addresses, *times);
                self.on_segment(step, "announce addresses", link, *mac, addresses, announce)
            }
            Operation::ProbeGateways { link, mac, gateways, timing, otherwise } => {
                let own: Vec<IpAddr> = gateways.iter().map(|(own, _)| *own).collect();
                let probe = |segment: Segment| segment.unreachable(gateways, *timing);
                let silent = self.on_segment(step, "probe the gateway", link, *mac, &own, probe)?;
                match otherwise {
                    _ if silent.is_empty() => Ok(()),
                    GatewayProbe::Fail => Err(StepError::GatewaySilent { gateways: silent, link: link.clone() }),
                    GatewayProbe::Warn => {
                        tracing::warn!(gateways = ?silent, %link, "no answer; is it the right segment?");
                        Ok(())
                    }
                }
            }
            _ => Ok(()),
        }
    }

    /// Waits for the carrier of a link that has none yet, as a network card's that was just set up and agrees with its peer
    /// on a speed: what is sent before is lost, and silence would prove nothing. After the limit for settling there is
    /// nobody to be in conflict with.
    fn await_carrier(&mut self, step: &Step, link: &IfName) -> Result<(), StepError> {
        // Devices that do not know have it: their operational state is never "up".
        let has_carrier = |found: LinkView| found.flags & libc::IFF_LOWER_UP as u32 != 0;
        if look_up(self.socket(step.target)?, link)?.is_none_or(has_carrier) {
            return Ok(());
        }
        self.await_settled(step.target, &Operation::SettleCarrier { link: link.clone() })
    }

    fn on_segment<R: Send>(
        &mut self,
        step: &Step,
        what: &'static str,
        link: &IfName,
        mac: MacAddr,
        addresses: &[IpAddr],
        f: impl FnOnce(Segment) -> io::Result<R> + Send,
    ) -> Result<R, StepError> {
        let device = self.find_index(step.target, link)?;
        let netns = self.netns(step.target);
        let mut value = None;
        // The namespace is left as soon as the sockets are there.
        let talk = || {
            let opened = self.engine.run_in(netns, || Segment::open(device, mac, addresses))?;
            Ok(opened.and_then(f).map(|v| value = Some(v)))
        };
        let failed = |source| StepError::Local { what: format!("{what} on {link}"), source };
        gated(what, talk)?.map_err(failed)?;
        value.ok_or_else(|| failed(io::Error::other("nothing came of it")))
    }
}
