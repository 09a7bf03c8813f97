//! Lowered classifiers judged on their own: in the VM and in the kernel, without the datapath around them.
//!
//! The question stands in the packet, the answer is the program's return value: bit 31 for "allow", and the rule's id.
//! So a verdict costs one run and no map, and a million of them a few seconds.

use std::error::Error;
use std::os::fd::{AsFd, AsRawFd};

use dcenet_ebpf::asm::{Asm, Label};
use dcenet_ebpf::insn::{Cond, Imm64, Insn, IsaLevel, Reg::*, Size, encode};
use dcenet_ebpf::maps::{Array, Map, Plain};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::program::{Program as Loaded, TestRun};
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Skb, Update, Vm};

use crate::diagram::{Diagram, Field};
use crate::ir::{Leaf, RuleId};
use crate::model::Verdict;
use crate::target::{Classifier, Frame, MapContent};

/// What is asked of a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Question {
    /// The peer's local id.
    pub local: u16,
    /// The protocol.
    pub protocol: u8,
    /// The port or ICMP type and code.
    pub port: u16,
}

/// The name of the program.
pub const NAME: &str = "classify";

const ALLOW: u32 = 1 << 31;
const PACKET_BYTES: usize = 32;

// Offsets in struct __sk_buff (include/uapi/linux/bpf.h).
const SKB_DATA: i16 = 76;
const SKB_DATA_END: i16 = 80;

/// A program that answers with the verdict of a classifier.
///
/// # Errors
/// The code cannot be assembled.
pub fn program(classifier: &Classifier<'_>, isa: IsaLevel) -> Result<Object, Box<dyn Error>> {
    let mut asm = Asm::program(NAME, ProgramKind::Classifier);
    asm.isa(isa);
    let short = asm.label();
    asm.load(Size::W, R6, R1, SKB_DATA)
        .load(Size::W, R7, R1, SKB_DATA_END)
        .mov(R8, R6)
        .add(R8, PACKET_BYTES as i32)
        .jump_if(Cond::Gt, R8, R7, short)
        .load(Size::H, R1, R6, 0)
        .load(Size::B, R2, R6, 2)
        .load(Size::H, R3, R6, 4);
    let (mut allow, mut deny): (Option<Label>, Option<Label>) = (None, None);
    // Labels are made beforehand, as the classifier has the assembler to itself.
    let labels = [asm.label(), asm.label()];
    classifier.write(Frame::DATAPATH, &mut asm, &mut |verdict| match verdict {
        Verdict::Allow => *allow.insert(labels[0]),
        Verdict::Deny => *deny.insert(labels[1]),
    });
    if let Some(allow) = allow {
        asm.bind(allow).or32(R0, ALLOW.cast_signed()).exit();
    }
    if let Some(deny) = deny {
        asm.bind(deny).exit();
    }
    asm.bind(short).ret(-1);
    let mut object = Object::new();
    if let Some(map) = classifier.map() {
        object.add_map(map)?;
    }
    object.add(asm.finish()?)?;
    Ok(object)
}

/// A classifier in the VM.
#[derive(Debug, Clone)]
pub struct InVm {
    vm: Vm,
    maps: Maps,
    skb: Skb,
    environment: Environment,
}

impl InVm {
    /// Makes it ready.
    ///
    /// # Errors
    /// The object lacks the program or the content's map.
    pub fn new(object: &Object, content: Option<&MapContent>) -> Result<Self, Box<dyn Error>> {
        let vm = Vm::new(&object.link(NAME)?)?;
        let mut maps = Maps::new(object.maps());
        if let Some(content) = content {
            let map = maps.get_mut(&content.map).ok_or("no such map")?;
            for (index, value) in content.values() {
                map.update(&index.to_ne_bytes(), value, Update::Any)?;
            }
        }
        Ok(Self { vm, maps, skb: Skb::new([0; PACKET_BYTES]), environment: Environment::default() })
    }

    /// Makes the VM err.
    pub fn plant_bug(&mut self, bug: PlantedBug) {
        self.vm.plant_bug(bug);
    }

    /// The verdict.
    ///
    /// # Errors
    /// A trap.
    pub fn decide(&mut self, question: Question) -> Result<Leaf, Box<dyn Error>> {
        self.skb.packet.copy_from_slice(&packet(question));
        Ok(answer(self.vm.run(&mut self.skb, &mut self.maps, &mut self.environment)?.value))
    }

    /// How many instructions no question has reached, those aside that a packet of this module cannot reach.
    pub fn missed(&self) -> usize {
        // A packet is never short.
        self.vm.missed().count().saturating_sub(2)
    }
}

/// A classifier in the kernel.
#[derive(Debug)]
pub struct InKernel {
    program: Loaded,
    /// Held open for the program's user; the program itself keeps its maps.
    _maps: Vec<Map>,
}

impl InKernel {
    /// Loads it, without an object file.
    ///
    /// # Errors
    /// What the kernel refuses, with the verifier's log.
    pub fn new(object: &Object, content: Option<&MapContent>) -> Result<Self, Box<dyn Error>> {
        let linked = object.link(NAME)?;
        let maps = linked.maps().iter().map(Map::create).collect::<Result<Vec<_>, _>>()?;
        if let Some(content) = content {
            let place = linked.maps().iter().position(|map| map.name == content.map).ok_or("no such map")?;
            write(&maps[place], content)?;
        }
        let mut code = linked.insns().to_vec();
        for insn in &mut code {
            if let Insn::LoadImm64 { value: Imm64::MapFd(map), .. } = insn {
                *map = maps[*map as usize].as_fd().as_raw_fd();
            }
        }
        let program = Loaded::load(ProgramKind::Classifier, NAME, &encode(&code))
            .map_err(|error| format!("{error}\n{}", error.log()))?;
        Ok(Self { program, _maps: maps })
    }

    /// The verdict.
    ///
    /// # Errors
    /// The run failed.
    pub fn decide(&self, question: Question) -> Result<Leaf, Box<dyn Error>> {
        let run = TestRun { packet: &packet(question), context: &[], repeat: 1 };
        Ok(answer(self.program.test_run(&run)?.retval))
    }

    /// The program.
    pub fn program(&self) -> &Loaded {
        &self.program
    }
}

/// Writes a map's content.
///
/// # Errors
/// What the kernel refuses.
pub fn write(map: &Map, content: &MapContent) -> Result<(), Box<dyn Error>> {
    let array = Array::<[u32; 4]>::new(map.try_clone()?)?;
    let values: Vec<[u32; 4]> = content.values().map(|(_, value)| Plain::read(value)).collect();
    array.store_all(0, &values)?;
    Ok(())
}

fn packet(question: Question) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    packet[..2].copy_from_slice(&question.local.to_ne_bytes());
    packet[2] = question.protocol;
    packet[4..6].copy_from_slice(&question.port.to_ne_bytes());
    packet
}

fn answer(value: u32) -> Leaf {
    let verdict = if value & ALLOW != 0 { Verdict::Allow } else { Verdict::Deny };
    Leaf { verdict, rule: RuleId(value & !ALLOW) }
}

/// Both ends of every interval of every switch that a diagram has, on every path: each leaf, and each comparison from
/// both sides.
pub fn edges(diagram: &Diagram) -> Vec<Question> {
    let mut found = Vec::new();
    for (first, last, to) in super::intervals(diagram, diagram.root(), Field::Local, u16::MAX) {
        for (low, high, to) in super::intervals(diagram, to, Field::Protocol, u16::from(u8::MAX)) {
            for (from, until, _) in super::intervals(diagram, to, Field::Port, u16::MAX) {
                for local in [first, last] {
                    for protocol in [low, high] {
                        for port in [from, until] {
                            found.push(Question { local, protocol: protocol as u8, port });
                        }
                    }
                }
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}
