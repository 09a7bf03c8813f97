//! Whatever bytes are called a program: they are no instructions, or can be written down, encoded back and run until
//! they end, trap or have used up their budget.
//!
//! The first byte is the length of the packet, which follows the code's slots.

#![no_main]

use dcenet_ebpf::insn::{decode, disassemble, encode, parse};
use dcenet_ebpf::object::{MapSpec, Program, ProgramKind};
use dcenet_ebpf::vm::{Environment, Maps, Skb, TailTarget, Vm, Xdp};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&length, rest)) = input.split_first() else { return };
    let (packet, code) = rest.split_at(usize::from(length).min(rest.len()));
    let Ok(insns) = decode(code) else { return };
    assert_eq!(encode(&insns), code);
    assert_eq!(parse(&disassemble(&insns)).as_ref(), Ok(&insns));
    let specs = vec![
        MapSpec::array("array", 12, 4),
        MapSpec::hash("hash", 4, 8, 2),
        MapSpec::lru_hash("lru", 4, 8, 2),
        MapSpec::ringbuf("ring", 4096),
        MapSpec::percpu_hash("percpu_hash", 4, 8, 2),
        MapSpec::lpm_trie("trie", 4, 8, 2),
        MapSpec::prog_array("programs", 2),
    ];
    for kind in [ProgramKind::Classifier, ProgramKind::Xdp] {
        let program = Program::from_insns("fuzz", kind, insns.clone(), specs.clone());
        let mut vm = Vm::new(&program).expect("a kind that the VM runs");
        vm.set_budget(2000);
        let (mut maps, mut env) = (Maps::new(&specs), Environment::default());
        let programs = maps.get_mut("programs").expect("as specified");
        programs.set_program(0, Some(TailTarget::ENTRY)).expect("within the array");
        let result = match kind {
            ProgramKind::Xdp => {
                let mut frame = Xdp::new(packet);
                let room = frame.headroom + frame.packet.len() + frame.tailroom;
                let result = vm.run_xdp(&mut frame, &mut maps, &mut env);
                assert_eq!(frame.headroom + frame.packet.len() + frame.tailroom, room);
                assert!(frame.meta.len() <= frame.headroom);
                result
            }
            _ => vm.run(&mut Skb::new(packet), &mut maps, &mut env),
        };
        if let Ok(run) = result {
            assert!(run.insns <= 2000);
        }
    }
});
