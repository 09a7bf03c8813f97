//! The judgement without the datapath around it: what a benchmark takes for the cost of a verdict.
//!
//! Each run of the program takes the next question out of an array, so that a test run with many repeats asks many. The
//! packet holds the number of the next question, and a mask that it is kept below, 4 bytes each.

use std::net::IpAddr;

use super::emitter::{Emitter, SKB_DATA, SKB_DATA_END};
use super::{DatapathError, EmitClassifier, Exits, Judgement, Slot, check, frame};
use crate::abi::{self, Direction, Sizes};
use crate::insn::{Cond, IsaLevel, Reg::*, Size, SwapWidth};
use crate::maps::Plain;
use crate::object::{MapSpec, Object};

/// Name of the program.
pub const NAME: &str = "alone";

/// The array of [`Question`]s.
pub const QUESTIONS: &str = "questions";

/// What the program returns beside the rule's id where the verdict is to allow.
pub const ALLOW: u32 = 1 << 31;

/// What is asked about a flow that is opened to the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Who opens it.
    pub peer: IpAddr,
    /// The protocol: one that has ports.
    pub protocol: u8,
    /// The pod's port.
    pub port: u16,
}

// Offsets in a question.
const PEER: i16 = 0;
const PORT: i16 = 16;
const PROTOCOL: i16 = 18;
const VERSION: i16 = 19;
const DIRECTION: i16 = 20;

impl Plain for Question {
    const SIZE: usize = 24;

    fn write(&self, bytes: &mut [u8]) {
        let (version, octets) = match self.peer {
            IpAddr::V4(peer) => (4, peer.to_ipv6_mapped().octets()),
            IpAddr::V6(peer) => (6, peer.octets()),
        };
        bytes[..16].copy_from_slice(&octets);
        bytes[PORT as usize..][..2].copy_from_slice(&self.port.to_be_bytes());
        bytes[PROTOCOL as usize] = self.protocol;
        bytes[VERSION as usize] = version;
        bytes[DIRECTION as usize..][..4].copy_from_slice(&(Direction::Ingress as u32).to_ne_bytes());
    }

    fn read(bytes: &[u8]) -> Self {
        let peer: [u8; 16] = Plain::read(&bytes[..16]);
        let peer = IpAddr::from(peer);
        let peer = if bytes[VERSION as usize] == 4 { peer.to_canonical() } else { peer };
        let port = u16::from_be_bytes([bytes[PORT as usize], bytes[PORT as usize + 1]]);
        Self { peer, protocol: bytes[PROTOCOL as usize], port }
    }
}

/// Who answers.
#[derive(Clone, Copy)]
pub enum Judge<'a> {
    /// Nobody: what asking costs.
    Nobody,
    /// The datapath's classes, local ids and this classifier.
    Classes(&'a dyn EmitClassifier),
    /// Code that is asked about IPv4 peers by their addresses, in host order, in the place of local ids.
    Address(&'a dyn EmitClassifier),
}

/// Writes the program, with the maps of classes, local ids and so many questions, a power of two.
///
/// # Errors
/// See [`DatapathError`].
pub fn program(sizes: &Sizes, questions: u32, judge: Judge<'_>, isa: IsaLevel) -> Result<Object, DatapathError> {
    check(sizes)?;
    let mut object = Object::new();
    let tables = [abi::CLASS_V4, abi::MEMBERS_V6, abi::CLASS_V6, abi::NODES_V6];
    let classes = sizes.shared_maps().into_iter().filter(|map| tables.contains(&map.name.as_str()));
    for map in classes.chain(Direction::ALL.map(|direction| sizes.local_ids(direction))) {
        object.add_map(map)?;
    }
    object.add_map(MapSpec::array(QUESTIONS, Question::SIZE as u32, questions))?;
    let mut emitter = Emitter::new(NAME, Direction::Ingress, Slot::Class, Judgement::Unknown);
    emitter.asm.isa(isa);
    let nothing = emitter.asm.label();
    emitter
        .asm
        .mov(R6, R1)
        .load(Size::W, R7, R6, SKB_DATA)
        .load(Size::W, R8, R6, SKB_DATA_END)
        .mov(R2, R7)
        .add(R2, 8)
        .jump_if(Cond::Gt, R2, R8, nothing)
        .load(Size::W, R1, R7, 0)
        .load(Size::W, R3, R7, 4)
        .mov(R2, R1)
        .add(R2, 1)
        .and(R2, R3)
        .store(Size::W, R7, 0, R2);
    emitter.lookup_index(QUESTIONS, R1);
    emitter.asm.jump_if(Cond::Eq, R0, 0, nothing);
    for (size, from, to) in [
        (Size::Dw, PEER, frame::PEER),
        (Size::Dw, PEER + 8, frame::PEER + 8),
        (Size::H, PORT, frame::POD_PORT),
        (Size::H, PORT, frame::PEER_PORT),
        (Size::B, PROTOCOL, frame::PROTOCOL),
        (Size::B, VERSION, frame::VERSION),
        (Size::W, DIRECTION, frame::JUDGE),
    ] {
        emitter.asm.load(size, R1, R0, from).store(size, R10, to, R1);
    }
    emitter.asm.mov(R1, 0).store(Size::W, R10, frame::FLAGS, R1).store(Size::W, R10, frame::ICMP, R1);
    let exits = Exits::new(&mut emitter.asm);
    let classifier = match judge {
        Judge::Nobody => {
            emitter.asm.ret(0);
            None
        }
        Judge::Classes(classifier) => {
            emitter.classify(sizes.members_v6.trailing_zeros());
            Some(classifier)
        }
        Judge::Address(classifier) => {
            emitter
                .asm
                .load(Size::W, Exits::LOCAL_ID, R10, frame::PEER_V4)
                .be(SwapWidth::W32, Exits::LOCAL_ID)
                .load(Size::B, Exits::PROTOCOL, R10, frame::PROTOCOL)
                .load(Size::H, Exits::VALUE, R10, frame::POD_PORT)
                .be(SwapWidth::W16, Exits::VALUE);
            Some(classifier)
        }
    };
    if let Some(classifier) = classifier {
        classifier.emit(&mut emitter.asm, &exits);
        for map in classifier.maps() {
            object.add_map(map)?;
        }
    }
    if exits.allow_used() {
        emitter.asm.bind(exits.allow()).or32(Exits::RULE, ALLOW.cast_signed()).exit();
    }
    if exits.deny_used() {
        emitter.asm.bind(exits.deny()).exit();
    }
    emitter.asm.bind(nothing).ret(-1);
    object.add(emitter.asm.finish()?)?;
    for function in classifier.map(EmitClassifier::functions).unwrap_or_default() {
        object.add(function)?;
    }
    Ok(object)
}
