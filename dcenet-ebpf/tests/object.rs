//! The ELF file: read back, loaded by aya and by libbpf.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use dcenet_core::test_support::{Rung, kernel_is_before, require, require_with};
use dcenet_ebpf::asm::{Asm, Symbol};
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Imm64, Insn, IsaLevel, Reg::*, Size, decode};
use dcenet_ebpf::object::{MapFlags, MapSpec, Object, ObjectError, ProgramKind};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget};

/// Counts in `hits[0]` the bytes that `double` makes of the packet's length, in every kind of map.
fn sample() -> Object {
    let mut main = Asm::program("count_bytes", ProgramKind::Classifier);
    let done = main.label();
    main.load(Size::W, R6, R1, 0)
        .mov(R1, R6)
        .call_function("double")
        .mov(R7, R0)
        .store(Size::W, R10, -4, 0)
        .load_map(R1, "hits")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, done)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R7);
    for map in ["by_key", "recent"] {
        main.store(Size::Dw, R10, -16, 1)
            .load_map(R1, map)
            .mov(R2, R10)
            .add(R2, -4)
            .mov(R3, R10)
            .add(R3, -16)
            .mov(R4, 0)
            .call(Helper::MapUpdateElem);
    }
    main.load_map(R1, "events").mov(R2, R10).add(R2, -16).mov(R3, 8).mov(R4, 0).call(Helper::RingbufOutput);
    main.store(Size::W, R10, -4, 0).load_map(R1, "per_cpu").mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
    main.bind(done).mov(R0, R7).exit();

    let mut double = Asm::subprogram("double");
    double.mov(R0, R1).call_function("add_one").lsh(R0, 1).exit();
    let mut add_one = Asm::global("add_one", 1);
    add_one.mov(R0, R1).add(R0, 1).exit();

    let mut second = Asm::program("second", ProgramKind::Classifier);
    second.mov(R1, 20).call_function("add_one").exit();

    let mut object = Object::new();
    object.add_map(MapSpec::array("hits", 8, 4).with_flags(MapFlags::MMAPABLE)).unwrap();
    object.add_map(MapSpec::hash("by_key", 4, 8, 16)).unwrap();
    object.add_map(MapSpec::lru_hash("recent", 4, 8, 16)).unwrap();
    object.add_map(MapSpec::percpu_array("per_cpu", 8, 1)).unwrap();
    object.add_map(MapSpec::ringbuf("events", 4096)).unwrap();
    for function in [main, double, add_one, second] {
        object.add(function.finish().unwrap()).unwrap();
    }
    object
}

#[test]
fn the_file_is_bpf_elf_with_all_parts() {
    let elf = sample().to_elf().unwrap();
    let file = object::File::parse(&*elf).unwrap();
    assert_eq!(file.architecture(), object::Architecture::Bpf);
    assert!(file.is_little_endian());
    assert_eq!(file.section_by_name("license").unwrap().data().unwrap(), b"Dual MIT/GPL\0");
    for name in [".maps", ".BTF", ".BTF.ext", ".text", "classifier"] {
        assert!(file.section_by_name(name).is_some(), "{name}");
    }
    let code = file.section_by_name("classifier").unwrap();
    let main = file.symbol_by_name("count_bytes").unwrap();
    assert!(main.is_global() && main.is_definition() && main.kind() == object::SymbolKind::Text);
    assert!(file.symbol_by_name("double").unwrap().is_local());
    let insns = decode(code.data().unwrap()).unwrap();
    let targets: Vec<_> = code
        .relocations()
        .map(|(offset, relocation)| {
            let RelocationTarget::Symbol(symbol) = relocation.target() else { panic!("no symbol") };
            (offset, file.symbol_by_index(symbol).unwrap().name().unwrap().to_owned())
        })
        .collect();
    let names: Vec<_> = targets.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["double", "hits", "by_key", "recent", "events", "per_cpu", "add_one"]);
    let mut slot = 0;
    for insn in &insns {
        let named = matches!(insn, Insn::CallLocal { .. } | Insn::LoadImm64 { value: Imm64::MapFd(_), .. });
        assert_eq!(named, targets.iter().any(|(offset, _)| *offset == slot * 8), "slot {slot}: {insn}");
        slot += insn.slots() as u64;
    }
}

#[test]
fn the_same_object_gives_the_same_bytes() {
    assert_eq!(sample().to_elf().unwrap(), sample().to_elf().unwrap());
}

#[test]
fn linking_resolves_every_name() {
    let program = sample().link("count_bytes").unwrap();
    let names: Vec<_> = program.functions().iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["count_bytes", "double", "add_one"]);
    let maps: Vec<_> = program
        .insns()
        .iter()
        .filter_map(|i| match i {
            Insn::LoadImm64 { value: Imm64::MapFd(map), .. } => Some(*map),
            _ => None,
        })
        .collect();
    assert_eq!(maps, [0, 1, 2, 4, 3]);
    let double = program.functions()[1].0;
    assert!(matches!(program.insns()[2], Insn::CallLocal { off } if off as usize == double - 3));
}

#[test]
fn mistakes_are_named() {
    let refused = |map| matches!(Object::new().add_map(map).unwrap_err(), ObjectError::Map { .. });
    assert!(refused(MapSpec::array("a", 0, 1)));
    assert!(refused(MapSpec::array("a", 4, 0)));
    assert!(refused(MapSpec::ringbuf("a", 5000)));
    assert!(refused(MapSpec::hash("a", 0, 1, 1)));
    assert!(refused(MapSpec::hash("a", 4, 1, 1).with_flags(MapFlags::MMAPABLE)));
    assert!(refused(MapSpec::lpm_trie("a", 0, 1, 1)));
    assert!(refused(MapSpec::lpm_trie("a", 257, 1, 1)));
    assert!(refused(MapSpec { flags: MapFlags::NONE, ..MapSpec::lpm_trie("a", 4, 1, 1) }));
    assert!(refused(MapSpec::percpu_hash("a", 4, (32 << 10) + 1, 1)));
    assert!(refused(MapSpec { value_size: 8, ..MapSpec::prog_array("a", 1) }));
    assert!(refused(MapSpec::prog_array("a", 1).with_flags(MapFlags::RDONLY_PROG)));
    for name in ["", "9a", "a-b", "a_name_of_16_byte"] {
        let error = Object::new().add_map(MapSpec::array(name, 4, 1)).unwrap_err();
        assert!(matches!(error, ObjectError::Name { .. }), "{name}");
    }
    let mut object = sample();
    let error = object.add_map(MapSpec::array("double", 4, 1)).unwrap_err();
    assert_eq!(error.to_string(), "name \"double\" is used twice in one object");

    let mut lost = Asm::program("lost", ProgramKind::Xdp);
    lost.load_map(R1, "nowhere").ret(0);
    object.add(lost.finish().unwrap()).unwrap();
    let error = object.to_elf().unwrap_err();
    assert!(matches!(error, ObjectError::Unresolved { symbol: Symbol::Map(name), .. } if name == "nowhere"));
    assert!(matches!(sample().link("double"), Err(ObjectError::NoProgram { .. })));
}

/// What [`MapSpec`] refuses the kernel refuses, and what it takes the kernel makes.
#[test]
fn the_limits_of_maps_are_the_kernels() {
    use dcenet_ebpf::maps::Map;

    if !require(Rung::Kernel) {
        return;
    }
    let specs = [
        MapSpec::lpm_trie("a", 1, 1, 1),
        MapSpec::lpm_trie("a", 0, 1, 1),
        MapSpec::lpm_trie("a", 256, 1, 1),
        MapSpec::lpm_trie("a", 257, 1, 1),
        MapSpec { flags: MapFlags::NONE, ..MapSpec::lpm_trie("a", 4, 1, 1) },
        MapSpec::lpm_trie("a", 4, 0, 1),
        MapSpec::percpu_hash("a", 4, 32 << 10, 1),
        MapSpec::percpu_hash("a", 4, (32 << 10) + 1, 1),
        MapSpec::percpu_hash("a", 4, 8, 1).with_flags(MapFlags::NO_PREALLOC),
        MapSpec::prog_array("a", 1),
        MapSpec { value_size: 8, ..MapSpec::prog_array("a", 1) },
        MapSpec { key_size: 8, ..MapSpec::prog_array("a", 1) },
        MapSpec::prog_array("a", 1).with_flags(MapFlags::NO_PREALLOC),
        MapSpec::prog_array("a", 1).with_flags(MapFlags::RDONLY_PROG),
    ];
    let mut refusals = 0;
    for spec in specs {
        let (made, taken) = (Map::create(&spec), Object::new().add_map(spec.clone()).is_ok());
        assert_eq!(made.is_ok(), taken, "{spec:?}: {made:?}");
        refusals += usize::from(!taken);
    }
    assert_eq!(refusals, 9);
}

#[cfg(feature = "aya")]
#[test]
fn aya_loads_it_and_the_kernel_runs_it() {
    use aya::maps::{Array, HashMap, MapData, RingBuf};
    use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

    if !require(Rung::Kernel) {
        return;
    }
    let mut loaded = aya::EbpfLoader::new().load(&sample().to_elf().unwrap()).unwrap();
    let program: &mut SchedClassifier = loaded.program_mut("count_bytes").unwrap().try_into().unwrap();
    program.load().unwrap();
    let packet = [0u8; 60];
    let run = program.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() }).unwrap();
    assert_eq!(run.return_value, 61 * 2);
    let info = program.info().unwrap();
    assert_eq!(info.name_as_str(), Some("count_bytes"));

    let hits: Array<&MapData, u64> = loaded.map("hits").unwrap().try_into().unwrap();
    assert_eq!(hits.get(&0, 0).unwrap(), 122);
    for map in ["by_key", "recent"] {
        let map: HashMap<&MapData, u32, u64> = loaded.map(map).unwrap().try_into().unwrap();
        assert_eq!(map.get(&0, 0).unwrap(), 1);
    }
    let mut events: RingBuf<&mut MapData> = loaded.map_mut("events").unwrap().try_into().unwrap();
    assert_eq!(&*events.next().unwrap(), 1u64.to_le_bytes());

    let second: &mut SchedClassifier = loaded.program_mut("second").unwrap().try_into().unwrap();
    second.load().unwrap();
    let run = second.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() }).unwrap();
    assert_eq!(run.return_value, 21);
}

/// Islands and long jumps pass the verifier, which lengthens the jumps over the lookups that it writes out.
#[cfg(feature = "aya")]
#[test]
fn far_jumps_load_at_both_levels() {
    use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};

    if !require(Rung::Kernel) {
        return;
    }
    let mut object = Object::new();
    object.add_map(MapSpec::array("hits", 8, 4)).unwrap();
    for (name, isa) in [("islands", IsaLevel::V3), ("gotol", IsaLevel::V4)] {
        let mut asm = Asm::program(name, ProgramKind::Classifier);
        let end = asm.label();
        asm.isa(isa).load(Size::W, R6, R1, 0).mov(R7, 0).store(Size::W, R10, -4, 0);
        asm.jump_if(Cond::Gt, R6, 100, end);
        for _ in 0..2_500 {
            let miss = asm.label();
            asm.load_map(R1, "hits").mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
            asm.jump_if(Cond::Eq, R0, 0, miss).load(Size::B, R1, R0, 0).add(R7, 1).bind(miss);
        }
        asm.mov(R0, R7).exit().bind(end).ret(7);
        let function = asm.finish().unwrap();
        assert_eq!(function.lint().isa == IsaLevel::V4, isa == IsaLevel::V4);
        object.add(function).unwrap();
    }
    let mut loaded = aya::EbpfLoader::new().load(&object.to_elf().unwrap()).unwrap();
    for name in ["islands", "gotol"] {
        let program: &mut SchedClassifier = loaded.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        for (length, expected) in [(60, 2_500), (200, 7)] {
            let packet = vec![0u8; length];
            let run = program.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() }).unwrap();
            assert_eq!(run.return_value, expected, "{name}");
        }
    }
}

/// A program of three parts that calls a function with one of its own and one without.
fn marked(isa: IsaLevel) -> Object {
    let mut main = Asm::program("parts", ProgramKind::Classifier);
    let far = main.label();
    main.isa(isa).short_span(40).load(Size::W, R6, R1, 0).jump_if(Cond::Gt, R6, 1000, far);
    main.mark("call\nthe subprograms").mov(R1, R6).call_function("named").mov(R1, R0).call_function("unnamed");
    main.mark("an empty part").mark("fill").load_imm64(R2, 7);
    for _ in 0..50 {
        main.add(R2, 1);
    }
    main.bind(far).mark("return").ret(3).mark("behind the end");
    let mut named = Asm::subprogram("named");
    named.mark("double it").mov(R0, R1).lsh(R0, 1).exit();
    let mut unnamed = Asm::subprogram("unnamed");
    unnamed.mov(R0, R1).exit();
    let mut object = Object::new();
    for asm in [main, named, unnamed] {
        object.add(asm.finish().unwrap()).unwrap();
    }
    object
}

#[test]
fn every_instruction_is_of_a_part() {
    for isa in [IsaLevel::V3, IsaLevel::V4] {
        let object = marked(isa);
        let names: Vec<_> = object.functions()[0].marks().iter().map(|mark| mark.text.as_str()).collect();
        assert_eq!(names, ["call the subprograms", "fill", "return"]);
        let program = object.link("parts").unwrap();
        let starts: Vec<_> = program.functions().iter().map(|(slot, _)| *slot).collect();
        assert_eq!(program.part_of(0), Some("parts"));
        let part_of = |wanted: Insn| {
            let slots = program
                .insns()
                .iter()
                .scan(0, |slot, insn| Some((std::mem::replace(slot, *slot + insn.slots()), insn)));
            slots
                .filter(|(_, insn)| **insn == wanted)
                .map(|(slot, _)| program.part_of(slot).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(part_of(Insn::LoadImm64 { dst: R2, value: Imm64::Value(7) }), ["fill"]);
        assert_eq!(part_of(Insn::Exit), ["return", "double it", "unnamed"]);
        assert_eq!(program.part_of(starts[1]), Some("double it"));
        assert_eq!(program.part_of(starts[2] + 2), None);
        assert!(!program.parts().iter().any(|(_, part)| part == "an empty part" || part == "behind the end"));
    }
}

/// The verifier's log of a refused program repeats the name of the part at fault.
#[cfg(feature = "aya")]
#[test]
fn the_verifiers_log_names_the_part() {
    use dcenet_ebpf::loader::{AyaLoader, LoadErrorClass, LoadRequest, Loader};

    if !require(Rung::Kernel) {
        return;
    }
    for (marks, expected) in [(true, 1), (false, 0)] {
        let mut asm = Asm::program("broken", ProgramKind::Classifier);
        let mark = |asm: &mut Asm, text: &str| {
            if marks {
                asm.mark(text);
            }
        };
        mark(&mut asm, "read the length");
        asm.load(Size::W, R6, R1, 0);
        mark(&mut asm, "read beyond the packet");
        asm.load(Size::W, R2, R1, 76).load(Size::W, R3, R2, 0);
        mark(&mut asm, "return");
        asm.ret(0);
        let mut object = Object::new();
        object.add(asm.finish().unwrap()).unwrap();
        let error = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap_err();
        assert_eq!(error.class(), LoadErrorClass::Verifier);
        let lines: Vec<_> = error.log().lines().filter(|line| line.starts_with("; read beyond the packet")).collect();
        assert_eq!(lines.len(), expected, "{}", error.log());
        assert!(!error.log().contains("; return"), "the verifier did not come to that: {}", error.log());
    }
}

fn bpftool_is_missing() -> Option<String> {
    let answers = Command::new("bpftool").arg("version").output().is_ok();
    (!answers).then(|| "bpftool is not installed (apt install bpftool)".to_owned())
}

/// Loads programs by libbpf, in a mount namespace of their own, and gives what `then`, in which `$PROGS` is where they are
/// pinned, prints.
fn by_bpftool(object: &Object, then: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("object.o");
    std::fs::write(&file, object.to_elf().unwrap()).unwrap();
    let bpffs = dir.path().join("bpf");
    // unshare(1) gives the mount a namespace of its own, which ends with the command and takes the pins along.
    let script = format!(
        "PROGS={fs}/progs && mkdir {fs} && mount -t bpf bpf {fs} && \
         bpftool prog loadall {object} $PROGS type classifier && {then}",
        fs = bpffs.display(),
        object = file.display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn bpftool_names_the_part_of_each_instruction() {
    if !require_with(Rung::Kernel, bpftool_is_missing) {
        return;
    }
    // Level 4 has long jumps, which Linux takes since 6.6.
    let isas = [IsaLevel::V3, IsaLevel::V4].into_iter().take(if kernel_is_before(6, 6) { 1 } else { 2 });
    for isa in isas {
        let object = marked(isa);
        let text = by_bpftool(&object, "bpftool prog dump xlated pinned $PROGS/parts linum");
        for (part, function, number) in [
            ("parts", "parts", 0),
            ("call the subprograms", "parts", 1),
            ("fill", "parts", 2),
            ("return", "parts", 3),
            ("double it", "named", 1),
            ("unnamed", "unnamed", 0),
        ] {
            let line = format!("; {part} [file:{function} line_num:{number} line_col:0]");
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        // Above the instruction that begins the part.
        let (_, fill) = text.split_once("; fill ").unwrap();
        assert!(fill.lines().nth(1).unwrap().ends_with("(18) r2 = 0x7"), "{text}");
    }
}

#[test]
fn libbpf_loads_it() {
    if !require_with(Rung::Kernel, bpftool_is_missing) {
        return;
    }
    let text = by_bpftool(
        &sample(),
        "bpftool -j prog show pinned $PROGS/count_bytes && bpftool prog dump xlated pinned $PROGS/count_bytes",
    );
    assert!(text.contains("\"name\":\"count_bytes\""), "{text}");
    // Names of functions come from BTF: the dump has a headline for each.
    for name in ["count_bytes", "double", "add_one"] {
        assert!(text.contains(&format!("{name}(")), "{name} in\n{text}");
    }
}
