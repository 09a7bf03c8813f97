//! Owners that are killed at each call to bpf(2) while they cover a pod by a guard, or forget it.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};

use dcenet_core::test_support::effort;
use dcenet_ebpf::abi::{Guarded, Sender};

use super::*;

/// More than an owner makes for one pod.
const MOST_CALLS: usize = 5000;

/// Has strace(1) kill a process at one of its calls to bpf(2), counted for each thread from now on.
struct Killer(Child);

impl Killer {
    fn of(process: u32, call: usize) -> Self {
        let inject = format!("inject=bpf:signal=KILL:when={call}");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=bpf", "-e", &inject, "-p", &process.to_string()]);
        let killer = Self(strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let is_traced = |thread: std::fs::DirEntry| {
            let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            !status.lines().any(|line| line.split_whitespace().eq(["TracerPid:", "0"]))
        };
        eventually("all threads are traced", || {
            std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten().all(is_traced)
        });
        killer
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        // Not SIGTERM, on which it waits for the first thread of whom it traces, which cannot be told while others end: for ever
        // where the process is being killed. Without it the kernel lets them go (ptrace(2)).
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is there of guards: pods by Ethernet address and slot, namespaces, judges, and links on parents.
type Guards = (BTreeMap<[u8; 6], u32>, BTreeSet<u64>, BTreeSet<u32>, Vec<&'static str>);

impl World {
    fn senders(&self) -> HashTable<Sender, Guarded> {
        let pin = Pins::at(self.host.directory().join("bpf")).get(SENDERS).unwrap().unwrap();
        HashTable::new(Map::from_fd(pin).unwrap()).unwrap()
    }

    fn delete_if_there(&mut self, name: &str) {
        self.engine.detach(&key(name), None).unwrap();
        self.pods.remove(name);
    }

    /// Whether an owner, who may be about to end, has been killed: it ends, or answers.
    fn is_killed(&self, owner: &mut OwnerProcess) -> bool {
        let mut killed = false;
        eventually("the owner ends, or answers", || {
            killed = owner.is_killed();
            killed || self.await_enforced("db", DENIED).is_ok()
        });
        killed
    }

    fn guards(&self) -> Guards {
        let senders = self.senders().entries().unwrap().into_iter();
        let namespaces = self.guarded_namespaces().entries().unwrap().into_iter();
        (
            senders.map(|(sender, pod)| (sender.mac, pod.slot)).collect(),
            namespaces.map(|(namespace, _)| namespace.netns).collect(),
            self.judged_slots(),
            self.guarded_parents(),
        )
    }
}

/// Whenever an owner is killed: who was told that the pod is there is guarded, and the next owner makes whole what has been begun, or
/// takes it away.
#[test]
fn an_owner_killed_while_it_covers_or_forgets_a_pod_leaves_no_gap_and_no_trace() {
    let without = || Command::new("strace").arg("-V").output().is_err().then(|| "there is no strace".to_owned());
    if !ready() || !has_guards() || !require_with(Rung::Kernel, without) {
        return;
    }
    let mut world = guarded_world();
    let mut owner = Some(OwnerProcess::start(&world));
    world.add_enforced("db", 3, &[("app", "db")]);
    world.add_enforced("scan", 4, &[]);
    let without_web = world.guards();
    // The twin: a trace is seen.
    let (mac, parent) = ([2, 0, 0, 0, 0, 9], world.senders().entries().unwrap()[0].0.parent);
    let trace = Sender { mac, parent };
    world.senders().store(&trace, &Guarded { attachment: 9, netns: 9, slot: 9 }, Put::Any).unwrap();
    assert_ne!(world.guards(), without_web);
    world.senders().remove(&trace).unwrap();
    assert_eq!(world.guards(), without_web);

    let next = |call: usize| effort(call * 3, call * 3, call + 7);
    let mut met = Vec::new();
    for forgets in [false, true] {
        for call in std::iter::successors(Some(2), |call| Some(next(*call))) {
            assert!(call < MOST_CALLS, "it does not come to its end");
            let mut running = owner.take().unwrap_or_else(|| OwnerProcess::start(&world));
            let told = |what: &str| format!("{what}, killed at call {call}, forgets: {forgets}");
            let killer = |running: &OwnerProcess| Killer::of(running.id(), call);
            let added = if forgets {
                world.add_enforced("web", 2, &[("app", "web")]);
                let killer = killer(&running);
                // What it answers does not matter: it is repeated below.
                let _ = world.engine.detach(&key("web"), None);
                settled(&mut running, || world.guards() == without_web);
                drop(killer);
                false
            } else {
                let killer = killer(&running);
                let added = world.try_add("web", 2, &[("app", "web")]).is_ok();
                settled(&mut running, || added && world.await_enforced("web", DENIED).is_ok());
                drop(killer);
                added
            };
            if added {
                assert_eq!(world.missing("web"), None, "{}", told("the pod has been let begin"));
            }
            let killed = world.is_killed(&mut running);
            met.push((forgets, call, killed, added));
            owner = Some(if killed { OwnerProcess::start(&world) } else { running });
            if added {
                world.await_enforced("web", ALLOWED).unwrap();
                assert_eq!(world.missing("web"), None, "{}", told("it is adopted"));
                let (senders, ..) = world.guards();
                assert!(senders.contains_key(&world.endpoint("web").mac.bytes()), "{}", told("it is known"));
            }
            world.delete_if_there("web");
            eventually(&told("nothing is left"), || world.guards() == without_web);
            for name in ["db", "scan"] {
                assert_eq!(world.missing(name), None, "{}", told(name));
            }
            if !killed {
                break;
            }
        }
    }
    let kills = |forgets| met.iter().filter(|(of, _, killed, _)| *of == forgets && *killed).count();
    println!("kills at calls to bpf: {} of covering, {} of forgetting: {met:?}", kills(false), kills(true));
    assert!(kills(false) >= 2 && kills(true) >= 1, "{met:?}");
    drop(owner);
    world.open(tools()).uninstall().unwrap();
}

/// Waits until an owner has been killed, or has done what it was told.
fn settled(owner: &mut OwnerProcess, is_done: impl Fn() -> bool) {
    eventually("the owner ends, or does as told", || owner.is_killed() || is_done());
}
