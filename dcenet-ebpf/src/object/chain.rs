//! How deep the calls of a program go.

use std::collections::{HashMap, HashSet};

use super::{Object, ObjectError};
use crate::asm::{Function, STACK_BYTES, Symbol};
use crate::insn::{Helper, Insn};

/// The calls within one another that take the most stack, from the program down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallChain {
    /// The functions, the program first.
    pub functions: Vec<String>,
    /// The stack of all together in bytes, each function's rounded up to 32 as the verifier does for the interpreter
    /// (`check_max_stack_depth_subprog`, `kernel/bpf/verifier.c`; 16 where the program is compiled).
    pub stack_bytes: u32,
    /// How many functions are in one another at most, in this chain or another; the verifier takes
    /// [`MAX_CALL_FRAMES`].
    pub frames: usize,
    /// The stack in bytes, rounded likewise, of the functions above one that makes a tail call, at most, in this chain or
    /// another; 0 where the program alone makes any.
    pub above_tail_calls: u32,
}

/// What functions above one that makes a tail call may not reach, in bytes of stack (`check_max_stack_depth_subprog`,
/// `kernel/bpf/verifier.c`): each tail call may begin as deep a chain anew.
pub const MAX_ABOVE_TAIL_CALLS: u32 = 256;

/// How many functions may be in one another, the program counted (`include/linux/bpf_verifier.h`).
pub const MAX_CALL_FRAMES: usize = 8;

impl CallChain {
    /// Whether the verifier of every kernel takes it: [`STACK_BYTES`] and [`MAX_CALL_FRAMES`] for all together, and less
    /// than [`MAX_ABOVE_TAIL_CALLS`] above tail calls. Where not, a kernel that compiles programs may still take it since
    /// Linux 6.9, as it rounds each function to 16.
    pub const fn fits(&self) -> bool {
        self.stack_bytes <= STACK_BYTES as u32
            && self.frames <= MAX_CALL_FRAMES
            && self.above_tail_calls < MAX_ABOVE_TAIL_CALLS
    }
}

/// What a function and all that it calls need.
#[derive(Clone, Copy)]
struct Depth<'a> {
    stack: u32,
    frames: usize,
    /// Above a function that makes a tail call, where there is one.
    above_tail_calls: Option<u32>,
    /// The callee on the deepest chain.
    next: Option<&'a str>,
}

pub(super) fn deepest(object: &Object, program: &str) -> Result<CallChain, ObjectError> {
    let by_name: HashMap<&str, &Function> = object.functions().iter().map(|f| (f.name(), f)).collect();
    let mut depths: HashMap<&str, Depth<'_>> = HashMap::new();
    let mut under_way: HashSet<&str> = HashSet::new();
    // Functions to look at; again, when all that they call is known.
    let mut work: Vec<(&str, bool)> = vec![(program, false)];
    while let Some((name, callees_known)) = work.pop() {
        let Some(function) = by_name.get(name).copied() else {
            return Err(ObjectError::NoProgram { name: name.to_owned() });
        };
        let callees = || {
            function.references().iter().filter_map(|reference| match &reference.symbol {
                Symbol::Function(callee) => Some(callee.as_str()),
                Symbol::Map(_) => None,
            })
        };
        if callees_known {
            under_way.remove(name);
            let mut deepest = Depth { stack: 0, frames: 0, above_tail_calls: None, next: None };
            for callee in callees() {
                let Some(depth) = depths.get(callee) else { continue };
                if deepest.next.is_none() || depth.stack > deepest.stack {
                    deepest = Depth { stack: depth.stack, next: Some(callee), ..deepest };
                }
                deepest.frames = deepest.frames.max(depth.frames);
                deepest.above_tail_calls = deepest.above_tail_calls.max(depth.above_tail_calls);
            }
            let own = u32::from(function.lint().stack_bytes).max(1).next_multiple_of(32);
            let tail_calls = function.insns().contains(&Insn::Call { helper: Helper::TailCall }).then_some(0);
            let depth = Depth {
                stack: own + deepest.stack,
                frames: 1 + deepest.frames,
                above_tail_calls: deepest.above_tail_calls.map(|above| own + above).max(tail_calls),
                next: deepest.next,
            };
            depths.insert(function.name(), depth);
        } else if !depths.contains_key(name) {
            if !under_way.insert(function.name()) {
                return Err(ObjectError::Recursion { function: name.to_owned() });
            }
            work.push((function.name(), true));
            for callee in callees() {
                if under_way.contains(callee) {
                    return Err(ObjectError::Recursion { function: callee.to_owned() });
                }
                work.push((callee, false));
            }
        }
    }
    let whole = depths.get(program).copied();
    let (stack_bytes, frames) = whole.map_or((0, 0), |depth| (depth.stack, depth.frames));
    let above_tail_calls = whole.and_then(|depth| depth.above_tail_calls).unwrap_or(0);
    let mut functions = Vec::new();
    let mut next = Some(program);
    while let Some(name) = next {
        functions.push(name.to_owned());
        next = depths.get(name).and_then(|depth| depth.next);
    }
    Ok(CallChain { functions, stack_bytes, frames, above_tail_calls })
}
