//! `load`: from the bytes of an object to programs that the verifier has taken, for a policy whose two programs together
//! have 20,000 instructions or more, by each loader, by turns. The maps that all endpoints of a node share are there already, as
//! they are when a node's policy changes. With the feature `libbpf`
//! aya is compared with libbpf; without it with 40 ms. What a process pays once, aya for parsing the kernel's type
//! information and libbpf for trying what the kernel can do, is told apart: the first load, of a program of two
//! instructions. Needs root.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::probe::Features;
use dcenet_policy::compiler::{Limits, Program};
use dcenet_policy::diagram::Diagram;
use dcenet_policy::ir::RuleList;
use dcenet_policy::target::{Policies, Target, Tc};

const ID: &str = "load";
/// Instructions after the verifier, of both programs together.
const INSTRUCTIONS: u32 = 20_000;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let loaders: Vec<(&str, Box<dyn Loader>)> = vec![
        ("aya", Box::new(AyaLoader)),
        #[cfg(feature = "libbpf")]
        ("libbpf", Box::new(dcenet_ebpf::loader::LibbpfLoader)),
    ];
    let smallest = smallest()?;
    for (name, loader) in &loaders {
        let time = milliseconds(&**loader, &smallest, &[])?;
        say(format_args!("{ID}: the first load of the process by {name} took {time:.1} ms"));
    }
    let (elf, rules, instructions) = object()?;
    say(format_args!("{ID}: {rules} rules a direction, {instructions} instructions, {} bytes of ELF", elf.len()));
    let shared = AyaLoader.load(&elf, &LoadRequest::default())?;
    let maps: Vec<_> = shared.maps.iter().map(|(name, map)| (name.as_str(), map.as_fd())).collect();
    let verified: u32 = {
        let loaded = AyaLoader.load(&elf, &LoadRequest { maps: &maps })?;
        loaded.programs.iter().map(|(_, program)| program.info().verified_instructions).sum()
    };
    say(format_args!("{ID}: the verifier looks at {verified} instructions"));
    let runs = rounds(40, 5);
    let mut times = vec![Vec::new(); loaders.len()];
    // The first round warms.
    for round in 0..=runs {
        for ((_, loader), times) in loaders.iter().zip(&mut times) {
            let time = milliseconds(&**loader, &elf, &maps)?;
            if round > 0 {
                times.push(time);
            }
        }
    }
    let mut summary = Summary::default();
    match &times[..] {
        [aya, libbpf] => {
            say(format_args!("{ID}: libbpf {:.2} ms", Sample::new(libbpf.clone()).median()));
            summary.add(Row::compare(ID, "aya", 1.1, aya, ("libbpf", libbpf)));
        }
        [aya] => summary.add(Row::compare(ID, "aya", 1.0, aya, ("40 ms", &vec![40.0; runs]))),
        _ => return Err("one loader or two".into()),
    }
    summary.write();
    Ok(())
}

/// How long a load takes. The freeing of what was loaded does not count.
fn milliseconds(loader: &dyn Loader, elf: &[u8], maps: &[(&str, BorrowedFd<'_>)]) -> Result<f64, Failure> {
    let begin = Instant::now();
    let loaded = loader.load(elf, &LoadRequest { maps })?;
    let time = begin.elapsed().as_secs_f64() * 1e3;
    drop(loaded);
    Ok(time)
}

/// An object with one program, of two instructions.
fn smallest() -> Result<Vec<u8>, Failure> {
    let mut code = Asm::program("smallest", ProgramKind::Classifier);
    code.ret(-1);
    let mut object = Object::new();
    object.add(code.finish()?)?;
    Ok(object.to_elf()?)
}

/// An object with as many rules as it takes, their number, and the instructions that came of it.
fn object() -> Result<(Vec<u8>, u32, u32), Failure> {
    // As small as they may be.
    let sizes = Sizes {
        conntrack: 1024,
        conntrack_new: 1024,
        members_v6: 64,
        blocks_v4: 64,
        blocks_v6: 64,
        endpoints: 8,
        ..Sizes::default()
    };
    let target = Tc::for_kernel(sizes, &Features::probe()?);
    for rules in (500..20_000).step_by(250) {
        let [ingress, egress] = [policy("ingress", rules)?, policy("egress", rules)?];
        let elf = target.lower(Policies { ingress: &ingress, egress: &egress })?.object.to_elf()?;
        let loaded = AyaLoader.load(&elf, &LoadRequest::default())?;
        let instructions = instructions(&loaded);
        if instructions >= INSTRUCTIONS {
            return Ok((elf, rules, instructions));
        }
    }
    Err("no number of rules makes a program of the size".into())
}

fn instructions(loaded: &Loaded) -> u32 {
    loaded.programs.iter().map(|(_, program)| program.info().translated_bytes / 8).sum()
}

/// Rule `r` allows a port of its own from peer `r % 64`.
fn policy(direction: &str, rules: u32) -> Result<Program, Failure> {
    let mut text = format!("{direction} locals 64\n");
    for rule in 0..rules {
        let port = 1000 + 2 * rule;
        text += &format!("allow {} peers {} tcp {port}-{port}\n", rule + 3, rule % 64);
    }
    text += "deny 1 default";
    let list: RuleList = text.parse().map_err(|e| format!("{e}"))?;
    let diagram = Diagram::build(&list, &Limits::default()).map_err(|e| e.to_string())?;
    Ok(Program { list, diagram, shadowed: Vec::new() })
}
