//! The classifier hook of traffic control, on the host's end of a pod's veth.

use std::num::NonZeroU32;

use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::asm::{Asm, AsmError, Function, Label};
use dcenet_ebpf::datapath::{self, DatapathError, EmitClassifier, Exits, Slot, Spec, Timeouts};
use dcenet_ebpf::insn::{Cond, IsaLevel, Reg::R4};
use dcenet_ebpf::object::{MapSpec, ProgramKind};
use dcenet_ebpf::probe::Features;

use super::code::{CodeWriter, Frame, MAX_CODE_ARMS};
use super::{Artefact, Codes, FirstHeader, Form, MapContent, Policies, Target, TargetError, table};
use crate::compiler::Program;
use crate::diagram::Diagram;
use crate::model::{Direction, Verdict};

/// Lowers to the programs of [`dcenet_ebpf::datapath`]: classifiers (`BPF_PROG_TYPE_SCHED_CLS`) on both hooks of a
/// device that carries Ethernet.
///
/// # Minimum kernel version
/// That of [`dcenet_ebpf::datapath`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Tc {
    /// Sizes of the datapath's maps.
    pub sizes: Sizes,
    /// How long flows are remembered.
    pub timeouts: Timeouts,
    /// Events about dropped packets for each endpoint; see [`Spec::denied_events`].
    pub denied_events: u32,
    /// Events about flows for each endpoint; see [`Spec::flow_events`].
    pub flow_events: u32,
    /// Packets that rules reject and that are answered; see [`Spec::answers`].
    pub answers: u32,
    /// Tells of one in so many packets of known flows; see [`Spec::sample`]. None unless told.
    pub sample: Option<NonZeroU32>,
    /// The level of the instruction set; at v4 far jumps are cheaper. [`Tc::for_kernel`] takes what the kernel has.
    pub isa: IsaLevel,
    /// Where the programs learn their endpoint's slot.
    pub slot: Slot,
    /// The most arms of a diagram that becomes code, [`MAX_CODE_ARMS`] unless told; others become tables.
    pub code_arms: usize,
}

impl Tc {
    /// With the datapath's defaults, at ISA v3, for attachments with a class.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            timeouts: Timeouts::default(),
            denied_events: 100,
            flow_events: 1000,
            answers: 100,
            sample: None,
            isa: IsaLevel::V3,
            slot: Slot::Class,
            code_arms: MAX_CODE_ARMS,
        }
    }

    /// As [`Tc::new`], at the highest level of the instruction set that a kernel takes ([`Features::isa`]), and v3 where it
    /// takes less, so that what it lacks is named when programs are to be loaded. Where it takes no tail calls of such programs
    /// nothing is answered.
    pub fn for_kernel(sizes: Sizes, features: &Features) -> Self {
        let new = Self::new(sizes).isa(features.isa().max(IsaLevel::V3));
        let answers = if features.tail_calls_beside_functions { new.answers } else { 0 };
        Self { answers, ..new }
    }

    /// With the slot from elsewhere.
    #[must_use]
    pub fn slot(mut self, slot: Slot) -> Self {
        self.slot = slot;
        self
    }

    /// At a level of the instruction set.
    #[must_use]
    pub fn isa(mut self, isa: IsaLevel) -> Self {
        self.isa = isa;
        self
    }

    /// With code for diagrams of so many arms at most; 0 makes every diagram with a switch a table.
    #[must_use]
    pub fn code_arms(mut self, arms: usize) -> Self {
        self.code_arms = arms;
        self
    }

    fn form(&self, program: &Program) -> Form {
        if program.diagram.stats().arms <= self.code_arms { Form::Code } else { Form::Table }
    }

    fn object(&self, policies: Policies<'_>, forms: [Form; 2]) -> Result<Artefact, TargetError> {
        let [ingress, egress] = forms;
        let compile = |program, form| -> Result<Compiled<'_>, TargetError> {
            let classifier = Classifier::new(program, form)?;
            let function = classifier.function(self.isa).map_err(DatapathError::from)?;
            Ok(Compiled { classifier, function })
        };
        let (ingress, egress) = (compile(policies.ingress, ingress)?, compile(policies.egress, egress)?);
        let spec = Spec {
            timeouts: self.timeouts,
            denied_events: self.denied_events,
            flow_events: self.flow_events,
            answers: self.answers,
            sample: self.sample,
            isa: self.isa,
            slot: self.slot,
            ..Spec::new(&self.sizes, &egress, &ingress)
        };
        let object = datapath::program(&spec)?;
        let (ingress_form, egress_form) = (ingress.classifier.form(), egress.classifier.form());
        let contents = [ingress.classifier.content, egress.classifier.content].into_iter().flatten().collect();
        Ok(Artefact { object, contents, ingress: ingress_form, egress: egress_form })
    }
}

impl Target for Tc {
    fn kind(&self) -> ProgramKind {
        ProgramKind::Classifier
    }

    fn first_header(&self) -> FirstHeader {
        FirstHeader::Ethernet
    }

    fn codes(&self) -> Codes {
        // TC_ACT_UNSPEC and TC_ACT_SHOT (include/uapi/linux/pkt_cls.h).
        Codes { pass: -1, drop: 2 }
    }

    fn lower(&self, policies: Policies<'_>) -> Result<Artefact, TargetError> {
        let forms = [policies.ingress, policies.egress].map(|program| self.form(program));
        match self.object(policies, forms) {
            // Much sharing over much code is more than islands carry below ISA v4.
            Err(TargetError::Datapath(DatapathError::Assemble(AsmError::JumpTooFar { .. }))) => {
                self.object(policies, [Form::Table; 2])
            }
            done => done,
        }
    }
}

/// The classifier of one direction, for [`Spec`].
///
/// In the datapath it is a function of its own, which the verifier follows once: inline it would be followed for every
/// way through parser and conntrack that leads there, several times as long at thousands of rules.
#[derive(Debug, Clone)]
pub struct Classifier<'a> {
    diagram: &'a Diagram,
    names: Names,
    content: Option<MapContent>,
    /// Of a table, the last local id that has a node of its own.
    last_local: u16,
    #[cfg(feature = "test-support")]
    bug: Option<super::LoweringBug>,
}

#[derive(Debug, Clone, Copy)]
struct Names {
    function: &'static str,
    map: &'static str,
}

/// Set in the function's result where the verdict is to allow; the rest is the rule's id.
const ALLOW: i32 = i32::MIN;

impl<'a> Classifier<'a> {
    /// Of a program, in a form.
    ///
    /// # Errors
    /// [`TargetError::ImplLimitExceeded`] where a table would have more than [`super::MAX_TABLE_NODES`] nodes, or a
    /// rule's id does not fit. Code has no limit here; [`Tc`] has one.
    pub fn new(program: &'a Program, form: Form) -> Result<Self, TargetError> {
        let names = match program.list.direction {
            Direction::Ingress => Names { function: "classify_in", map: "policy_in" },
            Direction::Egress => Names { function: "classify_out", map: "policy_out" },
        };
        let highest = program.diagram.leaves().iter().map(|leaf| leaf.rule.0).max().unwrap_or(0);
        if highest > MAX_RULE {
            let (found, limit) = (highest as usize, MAX_RULE as usize);
            return Err(TargetError::ImplLimitExceeded { what: "rule id", found, limit });
        }
        let (content, last_local) = match form {
            Form::Code => (None, 0),
            Form::Table => {
                let (bytes, last) = table::nodes(&program.diagram)?;
                (Some(MapContent { map: names.map.to_owned(), bytes, stride: table::NODE_BYTES }), last)
            }
        };
        Ok(Self {
            diagram: &program.diagram,
            names,
            content,
            last_local,
            #[cfg(feature = "test-support")]
            bug: None,
        })
    }

    /// Makes the code wrong in one way, to prove that a comparison notices. Tables stay right.
    #[cfg(feature = "test-support")]
    #[must_use]
    pub fn with_planted_bug(mut self, bug: super::LoweringBug) -> Self {
        self.bug = Some(bug);
        self
    }

    /// Its form.
    pub fn form(&self) -> Form {
        if self.content.is_some() { Form::Table } else { Form::Code }
    }

    /// The content of its map.
    pub fn content(&self) -> Option<&MapContent> {
        self.content.as_ref()
    }

    /// Writes it where the assembler stands: control enters at its start and leaves by the labels that `exit` gives. It
    /// leaves `R6` and `R9` alone. A label that `exit` is not asked for is not used.
    pub fn write(&self, frame: Frame, asm: &mut Asm, exit: &mut dyn FnMut(Verdict) -> Label) {
        if self.content.is_some() {
            table::walk(self.names.map, self.last_local, frame, asm, exit);
            return;
        }
        #[cfg_attr(not(feature = "test-support"), expect(unused_mut, reason = "only a planted bug changes it"))]
        let mut writer = CodeWriter::new(self.diagram, frame, asm, exit);
        #[cfg(feature = "test-support")]
        {
            writer.bug = self.bug;
        }
        writer.write();
    }

    /// Writes it as a function of local id, protocol and port.
    ///
    /// # Errors
    /// [`AsmError::JumpTooFar`] below ISA v4.
    pub fn function(&self, isa: IsaLevel) -> Result<Function, AsmError> {
        let mut asm = Asm::global(self.names.function, 3);
        asm.isa(isa);
        let (allow, deny) = (asm.label(), asm.label());
        let (mut allows, mut denies) = (false, false);
        self.write(Frame::DATAPATH, &mut asm, &mut |verdict| match verdict {
            Verdict::Allow => {
                allows = true;
                allow
            }
            Verdict::Deny => {
                denies = true;
                deny
            }
        });
        if allows {
            asm.bind(allow).or32(Frame::DATAPATH.rule, ALLOW).exit();
        }
        if denies {
            asm.bind(deny).exit();
        }
        asm.finish()
    }

    /// The map of its table.
    pub fn map(&self) -> Option<MapSpec> {
        let content = self.content.as_ref()?;
        let entries = (content.bytes.len() / content.stride) as u32;
        Some(MapSpec::array(self.names.map, table::NODE_BYTES as u32, entries))
    }
}

/// The highest rule id that fits into a function's result and a table's leaf.
const MAX_RULE: u32 = (1 << 30) - 1;

impl Frame {
    /// The registers that the datapath uses.
    pub const DATAPATH: Self =
        Self { local: Exits::LOCAL_ID, protocol: Exits::PROTOCOL, port: Exits::VALUE, rule: Exits::RULE };
}

/// A classifier with its code.
struct Compiled<'a> {
    classifier: Classifier<'a>,
    function: Function,
}

impl EmitClassifier for Compiled<'_> {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        asm.call_function(self.function.name())
            .mov(R4, Exits::RULE)
            .and32(Exits::RULE, !ALLOW)
            .jump_if32(Cond::Slt, R4, 0, exits.allow())
            .jump(exits.deny());
    }

    fn maps(&self) -> Vec<MapSpec> {
        self.classifier.map().into_iter().collect()
    }

    fn functions(&self) -> Vec<Function> {
        vec![self.function.clone()]
    }
}
