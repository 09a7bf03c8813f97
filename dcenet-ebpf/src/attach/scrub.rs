//! Taking everything off a device that changes hands.

use dcenet_core::model::IfIndex;
use dcenet_core::provider::{DeviceScrub, ScrubError};

use super::{AttachError, Attacher, ClsactAttacher, Direction, Hook, Owner, everything};

/// Takes every program off a device, whoever attached it: XDP, tcx, netkit and clsact.
///
/// # Minimum kernel version
/// 5.14, as [`XdpAttacher`](super::XdpAttacher). What a kernel has not is not on the device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scrubber;

impl DeviceScrub for Scrubber {
    fn scrub(&self, device: IfIndex) -> Result<Vec<String>, ScrubError> {
        let mut found = Vec::new();
        for (direction, way) in [(Direction::Ingress, "ingress"), (Direction::Egress, "egress")] {
            let hook = Hook { device, direction };
            let failed = |what: String, error: AttachError| ScrubError { device, what, source: error.into() };
            for attached in everything(hook).map_err(|error| failed(format!("what is on {way}"), error))? {
                let what = format!("{way} {attached}");
                let taken = match attached.owner {
                    // Of the whole host's filters, by their place: whoever comes next has it.
                    Owner::Ours(_) => ClsactAttacher.detach(hook),
                    Owner::Foreign(_) => ClsactAttacher.evict(hook, &attached),
                };
                if taken.map_err(|error| failed(what.clone(), error))? {
                    found.push(what);
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};

    use super::*;
    use crate::attach::conformance::{Pair, constant, constant_of, deny};
    use crate::attach::{TcxAttacher, XdpAttacher, verdict, xdp_verdict};
    use crate::object::ProgramKind;
    use crate::pin::Pins;
    use crate::probe::Features;

    /// The twin is what there was before.
    #[test]
    fn nothing_stays_on_a_device_whoever_attached_it() {
        if !require(Rung::Kernel) {
            return;
        }
        let has_tcx = Features::probe().expect("the kernel tells what it can do").tcx;
        let directory = tempfile::tempdir().expect("a directory");
        let pins = Pins::open(directory.path().join("bpf")).expect("pins");
        let (tcx, xdp) = (TcxAttacher::new(pins.clone()), XdpAttacher::new(pins.clone()));
        let pair = Pair::default();
        let (ingress, egress) = (pair.hook(Direction::Ingress), pair.hook(Direction::Egress));
        let found = pair.on_host(|| {
            xdp.attach(ingress, &constant_of(ProgramKind::Xdp, "pass", xdp_verdict::PASS), "spy").expect("attached");
            if has_tcx {
                tcx.attach(egress, &deny(), "spy").expect("attached");
                tcx.attach(ingress, &constant("one", verdict::UNSPEC), "spy").expect("attached");
            }
            ClsactAttacher.attach(ingress, &constant("two", verdict::UNSPEC), "ours").expect("attached");
            let found = Scrubber.scrub(ingress.device).expect("scrubbed");
            assert!(everything(ingress).expect("the chain").is_empty() && everything(egress).expect("it").is_empty());
            assert_eq!(Scrubber.scrub(ingress.device).expect("once more"), [""; 0]);
            found
        });
        assert_eq!(found.len(), if has_tcx { 4 } else { 2 }, "{found:?}");
        pins.unmount().expect("unmounted");
    }
}
