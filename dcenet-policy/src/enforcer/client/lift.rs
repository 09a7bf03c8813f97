//! Taking policy off a device that lives on.

use dcenet_core::provider::{Endpoint, PolicyError, PolicySink};
use dcenet_ebpf::attach::{AttachError, Attacher, Hook, Owner, Tag};
use dcenet_ebpf::program::Program;

use super::{BOTH, PinnedDefault, failed, refused, remove};
use crate::enforcer::inside::is_of;
use crate::enforcer::protocol::Request;

impl<A: Attacher> PinnedDefault<A> {
    pub(super) fn lift_from(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        if !endpoint.place.is_host() {
            let what = format!("lift the policy of {}, a device in its pod: remove the pod instead", endpoint.ifname);
            return Err(PolicyError::Unsupported(what));
        }
        // One that does not hear leaves everything as it is.
        self.answers(&endpoint.attachment, false)?;
        let doing = || format!("lift the policy of {}", endpoint.attachment);
        let hooks = BOTH.map(|direction| Hook { device: endpoint.ifindex, direction });
        let there = self.programs_on(&hooks, endpoint).map_err(failed(doing()))?;
        let take_off = || remove(&self.attacher, &hooks, &endpoint.attachment).map_err(failed(doing()));
        // Before the owner forgets the endpoint: the slot that its programs have is another's then. And after, for an owner that
        // knows it may have put them back meanwhile.
        let gone = Request::Gone { attachment: endpoint.attachment.clone() };
        let lifted = take_off()
            .and_then(|()| self.tell(&gone, false).map_err(|e| refused(doing(), e)))
            .and_then(|()| take_off());
        if lifted.is_err() {
            self.put_back(&there, endpoint);
        }
        lifted
    }

    /// The programs of the endpoint on these hooks.
    fn programs_on(&self, hooks: &[Hook], endpoint: &Endpoint) -> Result<Vec<(Hook, Program)>, AttachError> {
        let mut programs = Vec::new();
        for hook in hooks {
            let attached = self.attacher.attached(*hook)?.filter(|a| is_its(&a.owner, endpoint));
            if let Some(id) = attached.and_then(|attached| attached.program) {
                programs.push((*hook, Program::by_id(id)?));
            }
        }
        Ok(programs)
    }

    /// Has a device be under policy again. The programs have no slot, for that may be another's by now: one that has none lets
    /// nothing pass, unless it is the default that does, until the owner gives it one. An owner that stalls is told for when it goes
    /// on.
    fn put_back(&self, programs: &[(Hook, Program)], endpoint: &Endpoint) {
        let label = endpoint.attachment.id().to_string();
        let attach = |hook: Hook, program: &Program| match self.attacher.attached(hook)? {
            Some(attached) if is_its(&attached.owner, endpoint) => Ok(()),
            _ => self.attacher.attach_tagged(hook, program, Tag { label: &label, class: 0 }).map(drop),
        };
        for (hook, program) in programs {
            if let Err(error) = attach(*hook, program) {
                tracing::warn!(device = %endpoint.ifname, %error, "a program of its policy cannot be put back");
            }
        }
        // The default on a hook that has nothing still.
        if let Err(error) = self.attach(endpoint) {
            tracing::warn!(attachment = %endpoint.attachment, %error, "put under policy again, and its owner may not know");
        }
    }
}

fn is_its(owner: &Owner, endpoint: &Endpoint) -> bool {
    matches!(owner, Owner::Ours(label) if is_of(label, endpoint.attachment.id()))
}
