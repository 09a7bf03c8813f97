//! Limits on what the host's end of a pair sends and takes.
//!
//! ```text
//!  to the pod:   dc<id> (tbf) ---- eth0
//!  from it:      eth0 ---- dc<id>: policy, then db<id> (ifb, tbf), then in by dc<id>
//! ```

use crate::bandwidth::Bandwidth;
use crate::model::{AttachmentKey, MacAddr};
use crate::plan::{Device, End, Operation, Step, Target, Undo, mark};

use super::pod_end::no_link_local;

/// Limits the host's end, which is still down.
pub(super) fn limit(end: &End, key: &AttachmentKey, bandwidth: Bandwidth, steps: &mut Vec<Step>) {
    let on_host = |operation| Step::new(Target::Host, operation);
    let Bandwidth { ingress, egress } = bandwidth;
    if let Some(rate) = ingress {
        steps.push(on_host(Operation::Shape { link: end.name.clone(), rate }));
    }
    let Some(rate) = egress else { return };
    let mut bytes = key.mac().bytes();
    bytes[4] ^= 0xff;
    bytes[5] ^= 0xff;
    let ifb = End { name: key.id().shaper_ifname(), mac: MacAddr::new(bytes) };
    let create =
        Operation::CreateLink { link: ifb.clone(), transit: None, device: Device::Ifb, mtu: None, home: Target::Host };
    let name = || ifb.name.clone();
    steps.extend([
        on_host(create).undone_by(Undo::DeleteLink { target: Target::Host, end: ifb.clone() }),
        on_host(Operation::Mark { link: name(), alias: mark(key) }),
        no_link_local(Target::Host, &ifb.name),
        on_host(Operation::Shape { link: name(), rate }),
        on_host(Operation::Up { link: name(), master: None }),
        // Policy may have made it.
        on_host(Operation::AddClsact { link: end.name.clone() }).content_with(&[libc::EEXIST]),
        on_host(Operation::Divert { link: end.name.clone(), through: name() }),
    ]);
}
