//! What a guard has a pod's own program judge once more, in the VM alone.

use std::net::IpAddr;

use dcenet_ebpf::abi::{self, Event, EventKind, Reason};
use dcenet_ebpf::datapath::guard::FROM_GUARDED;
use dcenet_ebpf::datapath::{self, AllowAll, Slot, Spec};
use dcenet_ebpf::test_support::packet::*;
use dcenet_ebpf::vm::{Environment, Maps, Skb, Update, Vm};

use crate::harness::*;

/// A frame that bears the pod's Ethernet address and an IP address of somebody else is dropped, and told of with its reason.
#[test]
fn a_foreign_address_behind_the_pods_own_ethernet_address_is_told_of() {
    let (allow, sizes) = (AllowAll { rule: 1 }, small());
    let object = datapath::program(&Spec { slot: Slot::Guarded, ..Spec::new(&sizes, &allow, &allow) }).unwrap();
    for (own, peer) in VERSIONS {
        let foreign: IpAddr = if own.is_ipv4() { "10.0.0.9" } else { "fd00::9" }.parse().unwrap();
        for (source, verdict, told) in [
            (foreign, TC_ACT_SHOT, Some(Reason::Spoofed)),
            (own, TC_ACT_UNSPEC, None),
            (peer, TC_ACT_SHOT, Some(Reason::Spoofed)),
        ] {
            let frame = eth().ip(source, peer).udp(40_000, 53).bytes();
            let mac = frame[6..12].try_into().unwrap();
            let mut maps = Maps::new(object.maps());
            let endpoint = endpoint().with_mac(mac).encode();
            maps.get_mut(abi::ENDPOINTS).unwrap().update(&0u32.to_ne_bytes(), &endpoint, Update::Any).unwrap();
            let mut vm = Vm::new(&object.link(FROM_GUARDED).unwrap()).unwrap();
            let run = vm.run(&mut Skb::new(frame), &mut maps, &mut Environment::default());
            let value = run.unwrap_or_else(|trap| panic!("{trap}")).value.cast_signed();
            assert_eq!(value, verdict, "from {source}");
            let events = maps.get_mut(abi::EVENTS).unwrap().drain();
            let events: Vec<Event> = events.iter().map(|bytes| Event::decode(bytes).unwrap()).collect();
            let seen: Vec<_> = events.iter().map(|event| (event.kind, event.reason, event.rule)).collect();
            let expected = told.map(|reason| (EventKind::Denied as u8, reason as u8, Event::NO_RULE));
            assert_eq!(seen, Vec::from_iter(expected), "from {source}");
            // Nothing is written down of what passes.
            assert_eq!(abi::FLOW_TABLES.map(|name| maps.get(name).map_or(0, |map| map.len())), [0, 0]);
        }
    }
}
