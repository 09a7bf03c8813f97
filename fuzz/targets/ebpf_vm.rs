//! Whatever bytes are called a program: they are no instructions, or can be written down, encoded back and run until
//! they end, trap or have used up their budget.
//!
//! The first byte is the length of the packet, which follows the code's slots.

#![no_main]

use dcenet_ebpf::insn::{decode, disassemble, encode};
use dcenet_ebpf::object::{MapSpec, Program, ProgramKind};
use dcenet_ebpf::vm::{Environment, Maps, Skb, Vm};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&length, rest)) = input.split_first() else { return };
    let (packet, code) = rest.split_at(usize::from(length).min(rest.len()));
    let Ok(insns) = decode(code) else { return };
    assert_eq!(encode(&insns), code);
    if !insns.is_empty() {
        assert!(!disassemble(&insns).is_empty());
    }
    let maps = vec![
        MapSpec::array("array", 12, 4),
        MapSpec::hash("hash", 4, 8, 2),
        MapSpec::lru_hash("lru", 4, 8, 2),
        MapSpec::ringbuf("ring", 4096),
    ];
    let program = Program::from_insns("fuzz", ProgramKind::Classifier, insns, maps.clone());
    let mut vm = Vm::new(&program).expect("a classifier");
    vm.set_budget(2000);
    let mut maps = Maps::new(&maps);
    if let Ok(run) = vm.run(&mut Skb::new(packet), &mut maps, &mut Environment::default()) {
        assert!(run.insns <= 2000);
    }
});
