//! Each row of the verdict table, with the twin that passes where the row's guard is not met.

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::Reason;
use dcenet_ebpf::datapath::AllowAll;
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

fn open() -> Pod {
    Pod::new(&AllowAll { rule: 1 }, &AllowAll { rule: 2 })
}

#[test]
fn a_first_packet_is_allowed_and_the_next_one_is_known() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let pod = open();
            let (from, to) = way(direction, addresses);
            let packet = eth().ip(from, to).tcp(40000, 80, SYN);
            pod.expect(direction, &packet, Some(Reason::Allowed));
            pod.expect(direction, &packet, None);
            let reply = eth().ip(to, from).tcp(80, 40000, SYN | ACK);
            pod.expect(direction.opposite(), &reply, None);
        }
    }
}
