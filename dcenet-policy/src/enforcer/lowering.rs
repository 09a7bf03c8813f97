//! What the enforcer asks of a target: objects for the loader.

use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::verdict;
use dcenet_ebpf::datapath;
use dcenet_ebpf::object::{Object, ObjectError, ProgramKind};

use super::config::DefaultVerdict;
use crate::compiler::EndpointPlan;
use crate::target::{MapContent, Policies, Target, Tc};

/// Any error of a target.
pub type LoweringError = Box<dyn std::error::Error + Send + Sync>;

/// Turns policy into objects for a [`Loader`](dcenet_ebpf::loader::Loader). Pure: the same input gives the same bytes.
///
/// Every object has the programs [`FROM_POD`](dcenet_ebpf::datapath::FROM_POD) and
/// [`TO_POD`](dcenet_ebpf::datapath::TO_POD), and names its maps as [`dcenet_ebpf::abi`] does.
pub trait Lowering: Send + Sync {
    /// Sizes of the maps that the objects are made for.
    fn sizes(&self) -> Sizes;

    /// Programs that know no policy, for every endpoint whose own are not in place yet. Deny lets nothing through but
    /// address resolution.
    ///
    /// # Errors
    /// Where the datapath cannot be made of these sizes.
    fn default_object(&self, verdict: DefaultVerdict) -> Result<LoweredObject, LoweringError> {
        let object = match verdict {
            DefaultVerdict::Deny => datapath::default_program(&self.sizes())?,
            DefaultVerdict::Allow => pass_all()?,
        };
        Ok(LoweredObject::new(&object)?)
    }

    /// Programs that judge by an endpoint's policies. They hold nothing of the endpoint itself, so that endpoints with
    /// equal policies share them.
    ///
    /// # Errors
    /// Where the policies are too large for this target.
    fn endpoint_object(&self, plan: &EndpointPlan) -> Result<LoweredObject, LoweringError>;
}

fn pass_all() -> Result<Object, LoweringError> {
    let mut object = Object::new();
    for name in [datapath::FROM_POD, datapath::TO_POD] {
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
}

impl LoweredObject {
    /// Writes an object.
    ///
    /// # Errors
    /// As [`Object::to_elf`].
    pub fn new(object: &Object) -> Result<Self, ObjectError> {
        Ok(Self {
            elf: object.to_elf()?,
            maps: object.maps().iter().map(|map| map.name.clone()).collect(),
            contents: Vec::new(),
        })
    }
}

impl Lowering for Tc {
    fn sizes(&self) -> Sizes {
        self.sizes.clone()
    }

    fn endpoint_object(&self, plan: &EndpointPlan) -> Result<LoweredObject, LoweringError> {
        let policies = Policies { ingress: &plan.ingress.program, egress: &plan.egress.program };
        let artefact = self.lower(policies)?;
        Ok(LoweredObject { contents: artefact.contents, ..LoweredObject::new(&artefact.object)? })
    }
}
