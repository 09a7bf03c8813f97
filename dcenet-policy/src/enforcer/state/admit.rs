//! An endpoint that is told of: its default programs learn who it is.

use dcenet_core::provider::Endpoint;
use dcenet_ebpf::attach::{AttachError, Direction};
use dcenet_ebpf::datapath::Slot;
use dcenet_ebpf::program::Program;

use super::{EnforcerError, Shared};
use crate::enforcer::Tools;
use crate::enforcer::cells::{Cells, bare_hooks};
use crate::enforcer::config::DefaultVerdict;
use crate::enforcer::guard::Judge;
use crate::enforcer::inside::{Holds, InsideLink, on_device};
use crate::enforcer::node::{default_pin, load_default};

impl Shared {
    /// Lets the default programs of an endpoint know its addresses, where they are on its hooks. A change that is under way
    /// is not waited for: until then neighbours would believe what an earlier holder of the addresses has told them. One
    /// that is told again may have lost its own programs, and must not be called enforced without them by a change that
    /// took them for granted.
    pub(super) fn admit(&self, endpoint: &Endpoint, again: bool) -> Result<(), EnforcerError> {
        let attacher = &*self.tools.attacher;
        let _change = again.then(|| self.applier.lock());
        // Loaded here, for while the cells are held no other endpoint is admitted.
        let ready = if endpoint.place.is_host() { Ok(None) } else { self.load_denying(endpoint) };
        let state = self.state.lock();
        let known = state.endpoints.get(&endpoint.attachment);
        let Some(known) = known.filter(|known| known.is_on(endpoint.ifindex, &endpoint.place)) else {
            // It went in the meantime.
            return Ok(());
        };
        let guarded = known.guarded;
        let mut cells = self.cells.lock();
        drop(state);
        let (cells_held, mut found) = (&mut *cells, false);
        let admitted = if endpoint.place.is_host() {
            self.host.0.run_here_or_there(|| {
                let bare = bare_hooks(attacher, endpoint)?;
                found = !bare.is_empty();
                if found { cells_held.admit(attacher, endpoint, bare) } else { Ok(()) }
            })
        } else {
            Ok(self.admit_inside(cells_held, endpoint, (guarded, ready), &mut found))
        };
        drop(cells);
        if found {
            self.note(|state| state.lost(&endpoint.attachment));
        }
        admitted?
    }

    /// As [`Shared::admit`], of a device in a pod. Its default programs know no slot: others that do take their place.
    fn admit_inside(
        &self,
        cells: &mut Cells,
        endpoint: &Endpoint,
        (guarded, ready): (bool, Result<Option<Denying>, EnforcerError>),
        found: &mut bool,
    ) -> Result<(), EnforcerError> {
        let links = self.inside.of(endpoint.attachment.id())?;
        let living: Vec<&InsideLink> = links.iter().filter(|link| link.lives()).collect();
        // Also where somebody has taken one away.
        *found = living.len() < 2 || living.iter().any(|link| link.slot().is_none());
        if !*found {
            let slot = cells.slot(endpoint.attachment.id()).filter(|_| guarded);
            return slot.map_or(Ok(()), |slot| self.cover(endpoint, slot, Judge::Present));
        }
        // Of another slot where it went and came again meanwhile.
        let mut deny = ready?.filter(|deny| cells.slot(endpoint.attachment.id()) == Some(deny.slot));
        let (slot, _) = cells.settle(endpoint, true)?;
        let mut verdict = DefaultVerdict::Deny;
        for link in living.into_iter().filter(|link| link.slot().is_none()) {
            let there = Program::by_id(link.link.program).map_err(AttachError::from)?;
            let at_host = on_device(link.link.direction, &endpoint.place);
            if self.is_allowing(&there, at_host)? {
                self.inside.replace(link, &there, Holds::Default(slot))?;
                verdict = DefaultVerdict::Allow;
                continue;
            }
            let deny = match &mut deny {
                Some(deny) => deny,
                none => none.insert(Denying::load(self, slot)?),
            };
            for (direction, program) in deny.programs.iter().filter(|(direction, _)| *direction == at_host) {
                tracing::debug!(attachment = %endpoint.attachment, ?direction, slot, "admitted");
                self.inside.replace(link, program, Holds::Default(slot))?;
            }
        }
        if guarded { self.cover(endpoint, slot, Judge::Default(verdict)) } else { Ok(()) }
    }

    /// The default programs that deny, of the endpoint's slot, where one of its links is to get them.
    fn load_denying(&self, endpoint: &Endpoint) -> Result<Option<Denying>, EnforcerError> {
        let links = self.inside.of(endpoint.attachment.id())?;
        let mut is_wanted = false;
        for link in links.iter().filter(|link| link.lives() && link.slot().is_none()) {
            let there = Program::by_id(link.link.program).map_err(AttachError::from)?;
            is_wanted |= !self.is_allowing(&there, on_device(link.link.direction, &endpoint.place))?;
        }
        if !is_wanted {
            return Ok(None);
        }
        let slot = {
            let state = self.state.lock();
            if !state.has(endpoint) {
                return Ok(None);
            }
            self.cells.lock().reserve(endpoint)?
        };
        Denying::load(self, slot).map(Some)
    }

    /// Whether a program is the default that allows, which knows no slot.
    fn is_allowing(&self, program: &Program, at_host: Direction) -> Result<bool, EnforcerError> {
        let pin = default_pin(DefaultVerdict::Allow, at_host, false);
        let allow = self.pins.get(pin)?.map(Program::from_fd).transpose().map_err(AttachError::from)?;
        Ok(allow.is_some_and(|allow| allow.info().id == program.info().id))
    }
}

/// The default programs that deny, by the hook of the host's end, of a slot that is a constant in them.
struct Denying {
    slot: u16,
    programs: [(Direction, Program); 2],
}

impl Denying {
    fn load(shared: &Shared, slot: u16) -> Result<Self, EnforcerError> {
        let Tools { loader, lowering, .. } = &shared.tools;
        let deny = DefaultVerdict::Deny;
        let programs = load_default(&shared.maps, &**loader, &**lowering, deny, Slot::Constant(slot))?;
        Ok(Self { slot, programs })
    }
}
