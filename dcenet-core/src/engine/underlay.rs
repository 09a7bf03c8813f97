//! Steps that ask or tell the segment of a link.

use std::io;
use std::net::IpAddr;

use super::apply::{Session, look_up};
use super::error::StepError;
use crate::model::{IfName, MacAddr};
use crate::netlink::{self, LinkChange, LinkView, Message, gated};
use crate::plan::{Announcer, Operation, Step};
use crate::probe::{GatewayProbe, Segment};
use crate::proc_sys;

impl Session<'_> {
    /// Does a step that is a conversation with others on the link.
    pub(super) fn talk(&mut self, step: &Step) -> Result<(), StepError> {
        match &step.operation {
            Operation::ProbeConflicts { link, mac, addresses, timing } => {
                if !self.await_carrier(step, link)? {
                    tracing::warn!(%link, ?addresses, "no carrier: they are entered without being asked for");
                    return Ok(());
                }
                let what = "probe for conflicts";
                let probe = |segment: &Segment| segment.conflicts(addresses, *timing);
                let (what, found) = self.on_segment(step, what, link, *mac, addresses, probe)?;
                let found = found.map_err(|source| match source.raw_os_error() {
                    Some(libc::ENOBUFS) => StepError::Unsent { what, source },
                    _ => StepError::Local { what, source },
                })?;
                if found.is_empty() { Ok(()) } else { Err(StepError::InUse(found)) }
            }
            Operation::Announce { link, mac, addresses, times, by } => {
                let told = match by {
                    Announcer::Kernel => self.have_announced(step, link, *mac, *times)?,
                    Announcer::Socket => {
                        let announce = |segment: &Segment| segment.announce(addresses, *times);
                        self.on_segment(step, "announce addresses", link, *mac, addresses, announce)?.1
                    }
                };
                if let Err(error) = told {
                    // They work without; whoever remembers another holder finds out later.
                    tracing::warn!(%error, %link, ?addresses, "not announced");
                }
                Ok(())
            }
            Operation::ProbeGateways { link, mac, gateways, timing, otherwise } => {
                let own: Vec<IpAddr> = gateways.iter().map(|(own, _)| *own).collect();
                let probe = |segment: &Segment| segment.unreachable(gateways, *timing);
                let (what, silent) = self.on_segment(step, "probe the gateway", link, *mac, &own, probe)?;
                match (silent, otherwise) {
                    (Ok(silent), _) if silent.is_empty() => Ok(()),
                    (Ok(gateways), GatewayProbe::Fail) => {
                        Err(StepError::GatewaySilent { gateways, link: link.clone() })
                    }
                    (Err(source), GatewayProbe::Fail) => Err(StepError::Local { what, source }),
                    (Ok(gateways), GatewayProbe::Warn) => {
                        tracing::warn!(?gateways, %link, "no answer; is it the right segment?");
                        Ok(())
                    }
                    (Err(error), GatewayProbe::Warn) => {
                        tracing::warn!(%error, %link, "the gateways could not be asked");
                        Ok(())
                    }
                }
            }
            _ => Ok(()),
        }
    }

    /// Has the kernel announce the addresses of a link, whose settings are afterwards what they were. The outer error is that of
    /// getting at it.
    fn have_announced(
        &mut self,
        step: &Step,
        link: &IfName,
        mac: MacAddr,
        times: u8,
    ) -> Result<io::Result<()>, StepError> {
        let device = self.find_index(step.target, link)?;
        let change = LinkChange { mac: Some(mac), ..Default::default() };
        let messages: Vec<Message> = (0..times).map(|_| netlink::set_link(link, device, &change)).collect();
        let netns = self.netns(step.target);
        let mut before = Vec::new();
        let wish = || {
            NOTIFIES.iter().try_for_each(|setting| {
                let name = setting.replace("LINK", link.as_str());
                match proc_sys::read(&name) {
                    Ok(value) if value == "1" => Ok(()),
                    Ok(value) => {
                        proc_sys::write(&name, "1")?;
                        before.push((name, value));
                        Ok(())
                    }
                    // A kernel without the family has nothing to announce of it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    Err(error) => Err(error),
                }
            })
        };
        let wished: io::Result<()> = self.engine.run_in(netns, wish)?;
        let told = match wished {
            Ok(()) => {
                let mut outcomes = self.socket(step.target)?.batch(&messages).into_iter();
                outcomes.try_for_each(|outcome| outcome.map(drop)).map_err(io::Error::other)
            }
            failed => failed,
        };
        let restore = || before.iter().try_for_each(|(name, value)| proc_sys::write(name, value));
        let restored: io::Result<()> = self.engine.run_in(netns, restore)?;
        Ok(told.and(restored))
    }

    /// Waits for the carrier of a link that has none yet, as a network card's that was just set up and agrees with its peer
    /// on a speed: what is sent before is lost, and silence would prove nothing. Returns whether it came within the limit
    /// for settling.
    fn await_carrier(&mut self, step: &Step, link: &IfName) -> Result<bool, StepError> {
        // Devices that do not know have it: their operational state is never "up".
        let has_carrier = |found: LinkView| found.flags & libc::IFF_LOWER_UP as u32 != 0;
        if look_up(self.socket(step.target)?, link)?.is_none_or(has_carrier) {
            return Ok(true);
        }
        self.await_settled(step.target, &Operation::SettleCarrier { link: link.clone() })?;
        Ok(look_up(self.socket(step.target)?, link)?.is_none_or(has_carrier))
    }

    /// Talks on a link's segment. The outer error is that of getting at it, the inner one of the talk; with what it is to
    /// be called.
    fn on_segment<R: Send>(
        &mut self,
        step: &Step,
        what: &'static str,
        link: &IfName,
        mac: MacAddr,
        addresses: &[IpAddr],
        f: impl FnOnce(&Segment) -> io::Result<R> + Send,
    ) -> Result<(String, io::Result<R>), StepError> {
        let device = self.find_index(step.target, link)?;
        let netns = self.netns(step.target);
        let mut value = None;
        // The namespace is left as soon as the sockets are there.
        let talk = || {
            let opened = self.engine.run_in(netns, || Segment::open(device, mac, addresses))?;
            Ok(opened.map(|segment| value = Some(f(&segment))))
        };
        let called = format!("{what} on {link}");
        match gated(what, talk)? {
            Ok(()) => Ok((called, value.unwrap_or_else(|| Err(io::Error::other("nothing came of it"))))),
            Err(source) => Err(StepError::Local { what: called, source }),
        }
    }
}

/// Whether the kernel announces a link's addresses when its Ethernet address changes.
const NOTIFIES: [&str; 2] = ["ipv4/conf/LINK/arp_notify", "ipv6/conf/LINK/ndisc_notify"];
