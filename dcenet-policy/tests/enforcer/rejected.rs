//! Rules that reject: who is denied learns it at once.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::Reason;
use dcenet_policy::enforcer::Enforcer;
use dcenet_policy::sources::native::from_yaml;

use crate::inside;
use crate::world::*;

/// Longer than any answer takes.
const LONG: Duration = Duration::from_secs(60);

/// `web` may be opened by nobody, so that answers pass by themselves; what is denied is done by `ACTION`.
const BOTH_WAYS: &str = "
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: web, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  ingress: []
  egress:
    - { action: allow, to: [ { pods: { podSelector: { matchLabels: { app: db } } } } ] }
    - { action: ACTION }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: db, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
    - { action: allow, services: [ { protocol: tcp, ports: [ 80 ] } ] }
    - { action: ACTION }
  egress: []
";

fn set(owner: &Enforcer, action: &str) {
    let report = owner.set_policies(from_yaml(&BOTH_WAYS.replace("ACTION", action)).unwrap()).unwrap();
    assert!(report.is_complete() && report.faults.is_empty(), "{report:?}");
}

impl World {
    /// What becomes of a connection that somebody listens for.
    fn connect(&self, from: &str, to: &str, port: u16, ipv6: bool, limit: Duration) -> Result<TcpStream, ErrorKind> {
        let address = SocketAddr::new(self.address(to, ipv6), port);
        let _listening = self.pod(to).run(|| TcpListener::bind(address)).unwrap();
        self.pod(from).run(|| TcpStream::connect_timeout(&address, limit)).map_err(|error| error.kind())
    }

    /// What a connected socket is told after a datagram that somebody waits for.
    fn datagram(&self, from: &str, to: &str, ipv6: bool, limit: Duration) -> Option<i32> {
        let address = SocketAddr::new(self.address(to, ipv6), 53);
        let waiting = self.pod(to).run(|| UdpSocket::bind(address)).unwrap();
        let any: IpAddr = if ipv6 { [0; 16].into() } else { [0; 4].into() };
        let asking = self.pod(from).run(|| UdpSocket::bind((any, 0))).unwrap();
        asking.connect(address).unwrap();
        asking.set_read_timeout(Some(limit)).unwrap();
        asking.send(b"x").unwrap();
        let told = asking.recv(&mut [0]).unwrap_err();
        waiting.set_nonblocking(true).unwrap();
        assert_eq!(waiting.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it arrived");
        told.raw_os_error()
    }

    fn are_told(&self, own: &str, of: &str, port: u16) {
        for ipv6 in [false, true] {
            assert_eq!(self.connect(own, of, port, ipv6, LONG).unwrap_err(), ErrorKind::ConnectionRefused, "{ipv6}");
            // net/ipv4/icmp.c (`icmp_err_convert`), net/ipv6/icmp.c (`tab_unreach`).
            let told = if ipv6 { libc::EACCES } else { libc::EHOSTUNREACH };
            assert_eq!(self.datagram(own, of, ipv6, LONG), Some(told), "{ipv6}");
        }
    }

    fn are_not_told(&self, own: &str, of: &str, port: u16) {
        for ipv6 in [false, true] {
            assert!(!self.denied((own, of), ipv6, || {
                let told = self.connect(own, of, port, ipv6, DENIED);
                assert_eq!(told.as_ref().err(), Some(&ErrorKind::TimedOut), "{ipv6}");
                assert_eq!(self.datagram(own, of, ipv6, DENIED), Some(libc::EAGAIN));
                told.is_ok()
            }));
        }
    }
}

fn both_ways(mut world: World) {
    let owner = world.started();
    for (n, name) in [(2, "web"), (3, "db"), (4, "other")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    set(&owner, "reject");
    world.tcp("web", "db", 80, true);
    // By the receiver's policy, and by the sender's.
    world.are_told("web", "db", 81);
    world.are_told("web", "other", 80);
    assert!(world.reasons()[&Reason::Related] > 0);
    // The same without the answers; no program is another.
    set(&owner, "deny");
    let before = world.reasons()[&Reason::Related];
    world.tcp("web", "db", 80, true);
    world.are_not_told("web", "db", 81);
    world.are_not_told("web", "other", 80);
    assert_eq!(world.reasons()[&Reason::Related], before);

    // A connection that is rejected later ends at once, at the end that sends.
    owner.set_policies([]).unwrap();
    for ipv6 in [false, true] {
        let address = SocketAddr::new(world.address("other", ipv6), 80);
        let listening = world.pod("other").run(|| TcpListener::bind(address)).unwrap();
        let mut open = world.pod("web").run(|| TcpStream::connect_timeout(&address, LONG)).unwrap();
        let _accepted = listening.accept().unwrap();
        set(&owner, "reject");
        open.set_read_timeout(Some(LONG)).unwrap();
        open.write_all(b"x").unwrap();
        assert_eq!(open.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset, "{ipv6}");
        owner.set_policies([]).unwrap();
    }
    // Another owner has numbers of its own.
    set(&owner, "reject");
    drop(owner);
    world.are_told("web", "db", 81);
    let owner = world.started();
    set(&owner, "reject");
    world.are_told("web", "db", 81);
    owner.uninstall().unwrap();
}

#[test]
fn who_is_rejected_is_told_at_once() {
    if require(Rung::Kernel) {
        both_ways(World::new());
    }
}

#[test]
fn who_is_rejected_by_programs_in_the_pod_is_told_at_once() {
    if inside::ready() {
        both_ways(World::of_macvlans(Default::default()));
    }
}

#[test]
fn answers_of_a_guarded_pod_pass_its_guard() {
    if inside::ready() && inside::has_guards() {
        both_ways(inside::guarded_world());
    }
}
