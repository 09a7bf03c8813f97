//! Ways around a policy that a pod with privileges over its own network might try.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, require};
use dcenet_ebpf::abi;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, verdict};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{Array, Map};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::pin::Pins;

use crate::world::*;

/// Attaches a program to the pod's own end.
fn in_pod(pod: &TestNetNs, direction: Direction, name: &str, code: Asm, maps: Vec<MapSpec>) -> Option<Map> {
    let mut object = Object::new();
    let counter = maps.first().map(|map| map.name.clone());
    for map in maps {
        object.add_map(map).unwrap();
    }
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let program = loaded.take_program(name).unwrap();
    let hook = Hook { device: pod.link("eth0").unwrap().index, direction };
    pod.run(|| ClsactAttacher.attach(hook, &program, "test").unwrap());
    counter.map(|name| loaded.take_map(&name).unwrap())
}

/// Puts what the pod sends into a VLAN.
fn tag_all(pod: &TestNetNs, vlan: i32) {
    let mut code = Asm::program("tag", ProgramKind::Classifier);
    code.mov(R2, i32::from(0x8100_u16.to_be())).mov(R3, vlan).call(Helper::SkbVlanPush).ret(verdict::UNSPEC);
    in_pod(pod, Direction::Egress, "tag", code, Vec::new());
}

/// Counts tagged packets that reach the pod.
fn count_tagged(pod: &TestNetNs) -> Array<u64> {
    // `vlan_present` in struct __sk_buff (include/uapi/linux/bpf.h).
    let vlan_present = 20;
    let mut code = Asm::program("count", ProgramKind::Classifier);
    let untagged = code.label();
    code.load(Size::W, R1, R1, vlan_present)
        .jump_if(Cond::Eq, R1, 0, untagged)
        .store(Size::W, R10, -4, 0)
        .load_map(R1, "tagged")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, untagged)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(untagged)
        .ret(verdict::UNSPEC);
    let counter = in_pod(pod, Direction::Ingress, "count", code, vec![MapSpec::array("tagged", 8, 1)]);
    Array::new(counter.unwrap()).unwrap()
}

/// A bridge without VLAN filtering forwards tagged frames as they are, and a port of a trunk takes them into another
/// network, where an allowed address is another host's.
#[test]
fn a_tagged_frame_passes_no_pod() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    world.udp("web", "db", 5353, true);
    let pins = Pins::at(world.host.directory().join("bpf"));
    let cells = Map::from_fd(pins.get(abi::ENDPOINTS).unwrap().unwrap()).unwrap();
    let cells = Array::<abi::Endpoint>::new(cells).unwrap();
    let slot = |name: &str| {
        let endpoints = owner.endpoints();
        u32::from(endpoints.iter().find(|e| e.attachment == key(name)).unwrap().slot.unwrap())
    };
    let trunk = |name: &str, on: bool| {
        let cell = cells.load(slot(name)).unwrap();
        let flags = if on { cell.flags | abi::Endpoint::TRUNK } else { cell.flags & !abi::Endpoint::TRUNK };
        cells.store(slot(name), &abi::Endpoint { flags, ..cell }).unwrap();
    };

    for ipv6 in [false, true] {
        let (to, mac) = (world.address("db", ipv6), world.endpoint("db").mac);
        world.pod("web").sh(&format!("ip neigh replace {to} lladdr {mac} nud permanent dev eth0"));
    }
    let counter = count_tagged(world.pod("db"));
    tag_all(world.pod("web"), 5);
    let send = |ipv6: bool| {
        let to = SocketAddr::new(world.address("db", ipv6), 5353);
        let any = if ipv6 { "[::]:0" } else { "0.0.0.0:0" };
        let client = world.pod("web").run(|| UdpSocket::bind(any)).unwrap();
        for _ in 0..10 {
            client.send_to(b"x", to).unwrap();
        }
    };
    // A pod that sends a tag, a pod that is sent one, and the twin: both of them trunks.
    for (sender, receiver, arrive) in [(false, true, false), (true, false, false), (true, true, true)] {
        trunk("web", sender);
        trunk("db", receiver);
        let before = counter.load(0).unwrap();
        send(false);
        send(true);
        let deadline = Instant::now() + if arrive { ALLOWED } else { DENIED };
        while counter.load(0).unwrap() < before + 20 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let arrived = counter.load(0).unwrap() - before;
        assert!(if arrive { arrived >= 20 } else { arrived == 0 }, "trunks {sender} {receiver}: {arrived} arrived");
    }
    owner.uninstall().unwrap();
}
