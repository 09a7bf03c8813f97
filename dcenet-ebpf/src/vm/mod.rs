//! Runs classifiers and XDP programs without a kernel: the same bytecode, no privileges, no clock, the same result every time.
//!
//! [`Vm`] runs a linked [`Program`] on an [`Skb`] or [`Xdp`] frame, with [`Maps`] that outlive the run and an [`Environment`] that says what
//! time it is. It is stricter than the verifier: addresses are kept apart from numbers, so that forging or leaking one,
//! reaching out of bounds, or reading what was never written is a [`Trap`] with the instruction that did it. It remembers
//! which instructions ran ([`Vm::missed`]), so that tests can prove that they reached every leaf.
//!
//! It simulates the helpers for maps (array, hash, LRU hash, the per-CPU ones with one CPU, longest-prefix trie, ring
//! buffer), time, random numbers, packet bytes, checksums, moving the ends of an XDP frame, redirects,
//! route lookups (answered by the [`Environment`]), `bpf_loop` and tail calls; another helper traps. As a sole
//! thread runs, atomics are plain.
//!
//! # Examples
//! ```
//! use dcenet_ebpf::asm::Asm;
//! use dcenet_ebpf::insn::{Reg::*, Size};
//! use dcenet_ebpf::object::{Object, ProgramKind};
//! use dcenet_ebpf::vm::{Environment, Maps, Skb, Vm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut code = Asm::program("length", ProgramKind::Classifier);
//! code.load(Size::W, R0, R1, 0).exit();
//! let mut object = Object::new();
//! object.add(code.finish()?)?;
//!
//! let mut vm = Vm::new(&object.link("length")?)?;
//! let mut maps = Maps::new(object.maps());
//! let run = vm.run(&mut Skb::new([0; 60]), &mut maps, &mut Environment::default())?;
//! assert_eq!(run.value, 60);
//! # Ok(())
//! # }
//! ```

mod alu;
mod checksum;
mod helpers;
mod machine;
mod maps;
mod memory;
mod packet;
mod route;
mod skb;
mod trap;
mod value;
mod xdp;

use crate::insn::Insn;
use crate::object::{MapSpec, Program, ProgramKind};
use machine::{MAX_FRAMES, Machine};
use memory::Stack;
use packet::Packet;
use skb::CONTEXT_BYTES;
use xdp::Buffer;

pub use maps::{Map, MapError, Maps, Update};
pub use route::Route;
pub use skb::{Skb, Vlan};
pub use trap::{Memory, Trap, TrapKind};
pub use xdp::{Xdp, XdpAction};

/// What a program can learn of its surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `bpf_ktime_get_ns`.
    pub ktime_ns: u64,
    /// `bpf_ktime_get_boot_ns`.
    pub boottime_ns: u64,
    /// `bpf_ktime_get_coarse_ns`.
    pub coarse_ns: u64,
    /// `bpf_jiffies64`. A kernel begins to count five minutes below 2^32 (`INITIAL_JIFFIES`, include/linux/jiffies.h), and so
    /// shows no 0, which programs may take for "not known".
    pub jiffies: u64,
    /// `bpf_get_smp_processor_id`.
    pub cpu: u32,
    /// State of the generator behind `bpf_get_prandom_u32`; the same seed gives the same numbers.
    pub random: u64,
    /// The devices that there are, by index: other ones are an error to `bpf_clone_redirect` and `bpf_fib_lookup`.
    pub devices: Vec<u32>,
    /// What `bpf_fib_lookup` finds; without, it answers `BPF_FIB_LKUP_RET_NOT_FWDED`.
    pub route: Option<Route>,
    /// What `bpf_clone_redirect` sent, in order, by all runs.
    pub clones: Vec<SentClone>,
}

impl Default for Environment {
    /// One second after boot, on CPU 0, with device 1 and no route; of a kernel with 250 ticks in a second.
    fn default() -> Self {
        const SECOND: u64 = 1_000_000_000;
        const AT_BOOT: u64 = (1 << 32) - 300 * SECOND / TICK_NS;
        Self {
            ktime_ns: SECOND,
            boottime_ns: SECOND,
            coarse_ns: SECOND,
            jiffies: AT_BOOT + SECOND / TICK_NS,
            cpu: 0,
            random: 1,
            devices: vec![1],
            route: None,
            clones: Vec::new(),
        }
    }
}

impl Environment {
    /// Lets all clocks go on; a tick comes whenever the coarse clock passes a multiple of 4 ms.
    pub fn advance(&mut self, ns: u64) {
        self.jiffies += (self.coarse_ns + ns) / TICK_NS - self.coarse_ns / TICK_NS;
        self.ktime_ns += ns;
        self.boottime_ns += ns;
        self.coarse_ns += ns;
    }

    /// SplitMix64, the upper half.
    fn next_random(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 32) as u32
    }
}

/// Of 250 ticks in a second.
const TICK_NS: u64 = 4_000_000;

/// Where `bpf_redirect` sends the packet, if the program returns `TC_ACT_REDIRECT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirect {
    /// The device's index.
    pub ifindex: u32,
    /// Whether the packet arrives there instead of leaving (`BPF_F_INGRESS`).
    pub ingress: bool,
}

/// A copy of the packet that `bpf_clone_redirect` sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentClone {
    /// Where to.
    pub redirect: Redirect,
    /// The packet as it was then.
    pub packet: Vec<u8>,
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The lower half of `R0` at exit, which is what the kernel takes.
    pub value: u32,
    /// How many instructions ran.
    pub insns: u64,
    /// The last redirection asked for.
    pub redirect: Option<Redirect>,
}

/// The most tail calls of a run; a further one goes on behind itself (`MAX_TAIL_CALL_CNT`, `include/linux/bpf.h`).
pub const MAX_TAIL_CALLS: u32 = 33;

/// A program that [`Vm::add`] took, for [`Map::set_program`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TailTarget(u32);

impl TailTarget {
    /// The program that the VM was made for.
    pub const ENTRY: Self = Self(0);

    const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Why a program cannot run here at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// A kind of program whose context is not simulated.
    #[error("program {program}: the VM runs classifiers and XDP programs, not {kind:?}")]
    Kind {
        /// The program's name.
        program: String,
        /// Its kind.
        kind: ProgramKind,
    },
    /// A program that cannot be a target of tail calls: the kernel wants one kind in an array of programs
    /// (`bpf_prog_map_compatible`, `kernel/bpf/core.c`).
    #[error("program {program}: its kind is {kind:?}, and that of the program that runs first is {entry:?}")]
    OtherKind {
        /// The program's name.
        program: String,
        /// Its kind.
        kind: ProgramKind,
        /// The kind of the first program.
        entry: ProgramKind,
    },
    /// A program of another object.
    #[error("program {program}: its maps are not those of the program that runs first; link both from one object")]
    OtherMaps {
        /// The program's name.
        program: String,
    },
}

/// A deliberate mistake, to prove that a comparison with another judge would find one.
#[cfg(feature = "test-support")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlantedBug {
    /// Signed comparisons are made as unsigned ones.
    UnsignedCompare,
    /// One tail call more than the kernel allows.
    OneTailCallMore,
    /// `bpf_xdp_adjust_tail` gives back bytes that it cut off before.
    GrownTailKept,
    /// Bytes are not swapped.
    Unswapped,
}

#[cfg(feature = "test-support")]
impl PlantedBug {
    fn condition(self, cond: crate::insn::Cond) -> crate::insn::Cond {
        use crate::insn::Cond;
        match (self, cond) {
            (Self::UnsignedCompare, Cond::Sgt) => Cond::Gt,
            (Self::UnsignedCompare, Cond::Sge) => Cond::Ge,
            (Self::UnsignedCompare, Cond::Slt) => Cond::Lt,
            (Self::UnsignedCompare, Cond::Sle) => Cond::Le,
            (_, other) => other,
        }
    }
}

/// The most instructions that a run may take unless told: what the verifier would follow at most.
pub const DEFAULT_BUDGET: u64 = 1_000_000;

/// A program by slot, and what of it has run.
#[derive(Debug, Clone)]
struct Code {
    name: String,
    /// The second slot of a 64-bit load holds none.
    slots: Vec<Option<Insn>>,
    ran: Vec<bool>,
}

impl Code {
    fn new(program: &Program) -> Self {
        let mut slots = Vec::with_capacity(program.insns().len());
        for insn in program.insns() {
            slots.push(Some(*insn));
            slots.extend((1..insn.slots()).map(|_| None));
        }
        Self { name: program.name().to_owned(), ran: vec![false; slots.len()], slots }
    }
}

/// A program ready to run, those that it may tail-call, and which of their instructions have run.
#[derive(Debug, Clone)]
pub struct Vm {
    /// The first is entered.
    programs: Vec<Code>,
    kind: ProgramKind,
    maps: Vec<MapSpec>,
    budget: u64,
    stacks: Box<[Stack; MAX_FRAMES]>,
    scratch: Vec<u8>,
    #[cfg(feature = "test-support")]
    bug: Option<PlantedBug>,
}

impl Vm {
    /// Takes a program.
    ///
    /// # Errors
    /// [`VmError::Kind`] if it is neither a classifier nor an XDP program.
    pub fn new(program: &Program) -> Result<Self, VmError> {
        if !matches!(program.kind(), ProgramKind::Classifier | ProgramKind::Xdp) {
            return Err(VmError::Kind { program: program.name().to_owned(), kind: program.kind() });
        }
        Ok(Self {
            programs: vec![Code::new(program)],
            kind: program.kind(),
            maps: program.maps().to_vec(),
            budget: DEFAULT_BUDGET,
            stacks: Box::new([const { Stack::new() }; MAX_FRAMES]),
            scratch: Vec::new(),
            #[cfg(feature = "test-support")]
            bug: None,
        })
    }

    /// Takes a further program of the same object, to be put into an array of programs ([`Map::set_program`]).
    ///
    /// # Errors
    /// [`VmError::OtherKind`] and [`VmError::OtherMaps`].
    pub fn add(&mut self, program: &Program) -> Result<TailTarget, VmError> {
        let (name, kind, entry) = (program.name().to_owned(), program.kind(), self.kind);
        if kind != entry {
            return Err(VmError::OtherKind { program: name, kind, entry });
        }
        if program.maps() != self.maps {
            return Err(VmError::OtherMaps { program: name });
        }
        let target = TailTarget(self.programs.len() as u32);
        self.programs.push(Code::new(program));
        Ok(target)
    }

    /// Sets the most instructions that a run may take, [`DEFAULT_BUDGET`] unless told.
    pub fn set_budget(&mut self, insns: u64) -> &mut Self {
        self.budget = insns;
        self
    }

    /// Makes the VM err, in tests of tests.
    #[cfg(feature = "test-support")]
    pub fn plant_bug(&mut self, bug: PlantedBug) -> &mut Self {
        self.bug = Some(bug);
        self
    }

    /// Runs a classifier once. `maps` are those of the same object; what the program changed there, in the packet and in
    /// its metadata stays changed, after a trap too.
    ///
    /// # Errors
    /// See [`TrapKind`].
    pub fn run(&mut self, skb: &mut Skb, maps: &mut Maps, env: &mut Environment) -> Result<Run, Trap> {
        let mut context = skb.to_context();
        let result = self.run_on(ProgramKind::Classifier, &mut Packet::Skb(skb), &mut context, maps, env);
        skb.take_context(&context);
        result
    }

    /// Runs an XDP program once, otherwise as [`Vm::run`]. [`XdpAction::from_result`] reads the result.
    ///
    /// # Errors
    /// See [`TrapKind`].
    ///
    /// # Examples
    /// ```
    /// use dcenet_ebpf::asm::Asm;
    /// use dcenet_ebpf::insn::{Cond, Helper, Reg::*};
    /// use dcenet_ebpf::object::{Object, ProgramKind};
    /// use dcenet_ebpf::vm::{Environment, Maps, Vm, Xdp, XdpAction};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut code = Asm::program("strip", ProgramKind::Xdp); // takes 8 bytes off the frame's head
    /// let failed = code.label();
    /// code.mov(R2, 8).call(Helper::XdpAdjustHead).jump_if(Cond::Ne, R0, 0, failed);
    /// code.ret(XdpAction::Tx as i32).bind(failed).ret(XdpAction::Drop as i32);
    /// let mut object = Object::new();
    /// object.add(code.finish()?)?;
    ///
    /// let mut vm = Vm::new(&object.link("strip")?)?;
    /// let (mut frame, mut maps) = (Xdp::new([7; 60]), Maps::new(object.maps()));
    /// let run = vm.run_xdp(&mut frame, &mut maps, &mut Environment::default())?;
    /// assert_eq!(XdpAction::from_result(run.value), XdpAction::Tx);
    /// assert_eq!(frame.packet.len(), 52);
    /// # Ok(())
    /// # }
    /// ```
    pub fn run_xdp(&mut self, xdp: &mut Xdp, maps: &mut Maps, env: &mut Environment) -> Result<Run, Trap> {
        let mut context = [0; CONTEXT_BYTES];
        xdp::to_context(xdp, &mut context);
        let mut packet = Packet::Xdp(Buffer::new(xdp).map_err(|kind| self.refuse(kind))?);
        let result = self.run_on(ProgramKind::Xdp, &mut packet, &mut context, maps, env);
        if let Packet::Xdp(buffer) = packet {
            buffer.give_back(xdp);
        }
        result
    }

    /// The trap of a run that cannot begin.
    fn refuse(&self, kind: TrapKind) -> Trap {
        let program = self.programs.first().map(|code| code.name.clone()).unwrap_or_default();
        Trap { program, slot: 0, insn: Insn::Exit, kind }
    }

    fn run_on(
        &mut self,
        kind: ProgramKind,
        packet: &mut Packet<'_>,
        context: &mut [u8; CONTEXT_BYTES],
        maps: &mut Maps,
        env: &mut Environment,
    ) -> Result<Run, Trap> {
        let wrong = if self.kind != kind {
            Some(TrapKind::WrongContext)
        } else if !maps.iter().map(Map::spec).eq(&self.maps) {
            Some(TrapKind::WrongMaps)
        } else {
            None
        };
        if let Some(kind) = wrong {
            return Err(self.refuse(kind));
        }
        let mut machine = Machine::new(&mut self.stacks, packet, context, maps, env, std::mem::take(&mut self.scratch));
        #[cfg(feature = "test-support")]
        {
            machine.bug = self.bug;
        }
        let result = machine.run(&mut self.programs, self.budget);
        let Machine { redirect, scratch, .. } = machine;
        self.scratch = scratch;
        let (value, insns) = result?;
        Ok(Run { value: value as u32, insns, redirect })
    }

    /// The slots of the first program's instructions that no run has reached yet, ascending.
    pub fn missed(&self) -> impl Iterator<Item = usize> {
        self.missed_in(TailTarget::ENTRY)
    }

    /// As [`Vm::missed`], of a program that was added; nothing for a target of another VM.
    pub fn missed_in(&self, target: TailTarget) -> impl Iterator<Item = usize> {
        let code = self.programs.get(target.index()).into_iter();
        let slots = code.flat_map(|code| code.slots.iter().zip(&code.ran).enumerate());
        slots.filter(|(_, (insn, ran))| insn.is_some() && !**ran).map(|(slot, _)| slot)
    }

    /// Whether the instruction at a slot of the first program has run.
    pub fn has_run(&self, slot: usize) -> bool {
        self.programs.first().and_then(|code| code.ran.get(slot)).copied().unwrap_or(false)
    }

    /// Forgets what has run.
    pub fn reset_coverage(&mut self) {
        for code in &mut self.programs {
            code.ran.fill(false);
        }
    }
}
