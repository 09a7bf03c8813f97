//! What the enforcer asks of a target: objects for the loader.

use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::verdict;
use dcenet_ebpf::datapath::{self, Slot};
use dcenet_ebpf::insn::IsaLevel;
use dcenet_ebpf::object::{Object, ObjectError, ProgramKind};

use super::config::DefaultVerdict;
use crate::compiler::EndpointPlan;
use crate::target::{MapContent, Policies, Target, Tc};

/// Any error of a target.
pub type LoweringError = Box<dyn std::error::Error + Send + Sync>;

/// Turns policy into objects for a [`Loader`](dcenet_ebpf::loader::Loader). Pure: the same input gives the same bytes.
///
/// Every object has the programs of [`Slot::program_names`], and names its maps as [`dcenet_ebpf::abi`] does.
pub trait Lowering: Send + Sync {
    /// Sizes of the maps that the objects are made for.
    fn sizes(&self) -> Sizes;

    /// The level of the instruction set that its programs are written at, which the kernel must have.
    fn isa(&self) -> IsaLevel {
        IsaLevel::V3
    }

    /// Programs that know no policy, for every endpoint whose own are not in place yet. Deny lets nothing through but
    /// address resolution.
    ///
    /// # Errors
    /// Where the datapath cannot be made of these sizes.
    fn default_object(&self, verdict: DefaultVerdict, slot: Slot) -> Result<LoweredObject, LoweringError> {
        let object = match verdict {
            DefaultVerdict::Deny => datapath::default_program_of(&self.sizes(), slot)?,
            DefaultVerdict::Allow => pass_all(slot)?,
        };
        Ok(LoweredObject::new(&object)?)
    }

    /// Programs that judge by an endpoint's policies. By [`Slot::Class`] they hold nothing of the endpoint itself, so that
    /// endpoints with equal policies share them; by [`Slot::Constant`] its slot alone ([`LoweredObject::of_slot`]).
    ///
    /// # Errors
    /// Where the policies are too large for this target.
    fn endpoint_object(&self, plan: &EndpointPlan, slot: Slot) -> Result<LoweredObject, LoweringError>;
}

fn pass_all(slot: Slot) -> Result<Object, LoweringError> {
    let mut object = Object::new();
    for name in slot.program_names() {
        let mut code = Asm::program(name, ProgramKind::Classifier);
        code.ret(verdict::UNSPEC);
        object.add(code.finish()?)?;
    }
    Ok(object)
}

/// An object, and what a loader has to be given with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoweredObject {
    /// The ELF file.
    pub elf: Vec<u8>,
    /// The names of its maps.
    pub maps: Vec<String>,
    /// What has to stand in maps that the loader makes, before the programs are attached.
    pub contents: Vec<MapContent>,
    /// Where the slot stands in the file, if it is a constant ([`datapath::slot_places`]).
    pub slot_places: Option<[usize; 2]>,
}

impl LoweredObject {
    /// Writes an object.
    ///
    /// # Errors
    /// As [`Object::to_elf`].
    pub fn new(object: &Object) -> Result<Self, ObjectError> {
        let elf = object.to_elf()?;
        Ok(Self {
            slot_places: datapath::slot_places(object, &elf),
            elf,
            maps: object.maps().iter().map(|map| map.name.clone()).collect(),
            contents: Vec::new(),
        })
    }

    /// The file for another endpoint with the same policies; `None` where the slot is no constant of it.
    pub fn of_slot(&self, slot: u16) -> Option<Vec<u8>> {
        let mut elf = self.elf.clone();
        for place in self.slot_places? {
            elf.get_mut(place..place + size_of::<i32>())?.copy_from_slice(&i32::from(slot).to_le_bytes());
        }
        Some(elf)
    }
}

impl Lowering for Tc {
    fn sizes(&self) -> Sizes {
        self.sizes.clone()
    }

    fn isa(&self) -> IsaLevel {
        self.isa
    }

    fn endpoint_object(&self, plan: &EndpointPlan, slot: Slot) -> Result<LoweredObject, LoweringError> {
        let policies = Policies { ingress: &plan.ingress.program, egress: &plan.egress.program };
        let artefact = self.clone().slot(slot).lower(policies)?;
        Ok(LoweredObject { contents: artefact.contents, ..LoweredObject::new(&artefact.object)? })
    }
}
