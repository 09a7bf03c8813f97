//! Policies that allow by names, of which the daemon's DNS proxy learns.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use serde_json::json;

use crate::common::*;

const POLICY: &str = "
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: out, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  egress: [ { action: allow, to: [ { fqdns: [ db.example.com ] } ] } ]
";

/// A query for the IPv4 address of `db.example.com` (RFC 1035, section 4.1).
const QUERY: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x07example\x03com\x00\x00\x01\x00\x01";

/// Answers every query with this address.
fn serve(socket: UdpSocket, address: [u8; 4]) {
    let mut buffer = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        let mut answer = buffer[..length].to_vec();
        answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
        // The question's name, A, IN, for 300 s.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
        answer.extend(address);
        if socket.send_to(&answer, client).is_err() {
            return;
        }
    }
}

/// The address that a pod hears, if it hears one.
fn asks(pod: &Pod) -> Option<IpAddr> {
    let socket = pod.netns.run(|| UdpSocket::bind((pod.address, 0))).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket.connect("10.20.0.1:53").unwrap();
    socket.send(QUERY).ok()?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).ok()?;
    let answer = &buffer[..length];
    let (head, address) = answer.split_at_checked(QUERY.len() + 12)?;
    let address: [u8; 4] = address.try_into().ok()?;
    (head[..2] == QUERY[..2] && head[3] & 0xf == 0).then(|| address.into())
}

#[test]
fn a_pod_reaches_what_a_policy_names_once_it_has_asked_the_daemon_for_it() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.put_policy("out.yaml", POLICY);
    let is_told = |node: &Node| {
        let told = String::from_utf8(node.run("--check").stdout).unwrap();
        told.contains("shop/policy/out: addresses of names are not known here")
    };
    assert!(is_told(&node));
    // The address of the bridge, which comes with the first pod.
    node.config["dns"] = json!({ "listen": ["10.20.0.1:53"], "upstreams": ["127.0.0.1:5300"], "timeout": "10s" });
    assert!(!is_told(&node));
    let daemon = node.start();
    assert!(daemon.log().contains("the DNS proxy listens"), "{}", daemon.log());
    let [web, db, other] = ["web", "db", "other"].map(|name| node.add("shop", name));
    let IpAddr::V4(address) = db.address else { panic!("{}", db.address) };
    node.host.root().sh("ip link set lo up");
    let socket = node.host.root().run(|| UdpSocket::bind("127.0.0.1:5300")).unwrap();
    std::thread::spawn(move || serve(socket, address.octets()));
    assert!(!talks(&web, &db, false));
    eventually("the proxy's answer", || asks(&web) == Some(db.address));
    assert!(talks(&web, &db, true));
    assert!(!talks(&web, &other, false));
    let samples = node.samples();
    assert!(samples["dcenet_daemon_dns_queries_total"] >= 1.0, "{samples:?}");
    assert!(samples[r#"dcenet_daemon_dns_outcomes_total{outcome="learnt"}"#] >= 1.0, "{samples:?}");
    assert_eq!(samples["dcenet_daemon_names_overdue"], 0.0);

    daemon.kill();
    assert!(talks(&web, &db, true));
    let _daemon = node.start();
    assert!(talks(&web, &db, true), "the next one knows it");
}
