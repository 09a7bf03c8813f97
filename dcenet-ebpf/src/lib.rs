//! Write, simulate, load and attach eBPF programs from Rust, without clang.
//!
//! [`insn`] is the instruction set as types, [`asm`] an assembler with labels and names, and [`object`] puts functions
//! and maps together and writes the ELF file that loaders take; [`vm`] runs the same code without a kernel. None of these
//! touches the kernel.
//!
//! # A whole program
//! It counts packets by their length, below and above 128 bytes, and lets them all pass.
//!
//! ```
//! use dcenet_ebpf::asm::Asm;
//! use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Reg::*, Size};
//! use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const SKB_LEN: i16 = 0; // offset of `len` in struct __sk_buff
//! const TC_ACT_UNSPEC: i32 = -1;
//!
//! let mut code = Asm::program("count", ProgramKind::Classifier);
//! let (small, done) = (code.label(), code.label());
//! code.load(Size::W, R6, R1, SKB_LEN)
//!     .store(Size::W, R10, -4, 0) // the key lies on the stack
//!     .jump_if(Cond::Lt, R6, 128, small)
//!     .store(Size::W, R10, -4, 1)
//!     .bind(small)
//!     .load_map(R1, "packets")
//!     .mov(R2, R10)
//!     .add(R2, -4)
//!     .call(Helper::MapLookupElem)
//!     .jump_if(Cond::Eq, R0, 0, done) // the verifier insists
//!     .mov(R1, 1)
//!     .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
//!     .bind(done)
//!     .ret(TC_ACT_UNSPEC);
//!
//! let mut object = Object::new();
//! object.add_map(MapSpec::array("packets", 8, 2))?.add(code.finish()?)?;
//! let elf: Vec<u8> = object.to_elf()?; // for aya, libbpf or `bpftool prog load`
//! assert!(elf.starts_with(b"\x7fELF"));
//! # Ok(())
//! # }
//! ```
//!
//! # The kernel's side
//! [`loader`] takes an ELF file to programs and maps, [`attach`] puts programs on devices, [`maps`]
//! reads and writes maps, [`pin`] keeps both beyond the process, [`program`] runs a program on a packet without a device,
//! and [`probe`] tells what the running kernel can do.
//!
//! # The datapath
//! [`datapath`] writes the programs of a pod's veth, and [`abi`] lays out what they share with user space.

#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]

pub mod abi;
pub mod asm;
pub mod attach;
pub mod datapath;
pub mod insn;
pub mod loader;
pub mod maps;
pub mod object;
pub mod pin;
pub mod probe;
pub mod program;
mod sys;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
pub mod vm;
