//! Services whose addresses nftables translates behind the programs that judge, as kube-proxy does.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_policy::sources::kubernetes::Documents;

use crate::world::*;

const SERVICES: &str = r#"
{ apiVersion: v1, kind: Service, metadata: { name: db, namespace: shop }, spec: { clusterIPs: [ 10.96.0.10, "fd96::10" ], ports: [ { port: 80, targetPort: 8080 } ] } }
---
{ apiVersion: v1, kind: Service, metadata: { name: admin, namespace: shop }, spec: { clusterIPs: [ 10.96.0.11, "fd96::11" ], ports: [ { port: 80, targetPort: 9090 } ] } }
---
{ apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: { name: db-4, namespace: shop, labels: { kubernetes.io/service-name: db } }, addressType: IPv4, endpoints: [ { addresses: [ 10.20.0.3 ] } ], ports: [ { port: 8080 } ] }
---
{ apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: { name: db-6, namespace: shop, labels: { kubernetes.io/service-name: db } }, addressType: IPv6, endpoints: [ { addresses: [ "fd20::3" ] } ], ports: [ { port: 8080 } ] }
---
{ apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: { name: admin-4, namespace: shop, labels: { kubernetes.io/service-name: admin } }, addressType: IPv4, endpoints: [ { addresses: [ 10.20.0.3 ] } ], ports: [ { port: 9090 } ] }
"#;

const POLICIES: &str = "
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: web, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  egress: [ { action: allow, to: [ { service: { name: db } } ] } ]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  policyTypes: [ Ingress ]
  ingress: [ { from: [ { podSelector: { matchLabels: { app: web } } } ] } ]
";

/// What the node translates: both services to the pod `db`, and the second one at the first one's port of its backend, too.
const TRANSLATION: &str = "nft -f - <<'END'
table ip services { chain pre { type nat hook prerouting priority dstnat;
  ip daddr 10.96.0.10 tcp dport 80 dnat to 10.20.0.3:8080
  ip daddr 10.96.0.11 tcp dport 80 dnat to 10.20.0.3:9090; }; }
table ip6 services { chain pre { type nat hook prerouting priority dstnat;
  ip6 daddr fd96::10 tcp dport 80 dnat to [fd20::3]:8080
  ip6 daddr fd96::11 tcp dport 80 dnat to [fd20::3]:9090; }; }
END";

impl World {
    /// Whether a connection to an address reaches `db` at a port.
    fn reaches(&self, address: &str, port: u16, listening: u16, ipv6: bool, limit: Duration) -> bool {
        let own = SocketAddr::new(self.address("db", ipv6), listening);
        let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
        let listener = self.pod("db").run(|| TcpListener::bind(own)).unwrap();
        let Ok(mut stream) = self.pod("web").run(|| TcpStream::connect_timeout(&to, limit)) else { return false };
        let (mut accepted, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), self.address("web", ipv6), "nobody translates who asks");
        accepted.write_all(b"x").unwrap();
        stream.set_read_timeout(Some(limit)).unwrap();
        stream.read_exact(&mut [0]).is_ok()
    }
}

#[test]
fn a_service_is_judged_alike_before_and_behind_its_translation() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    // Answers go back by the node, which has to undo what it translated.
    world.host.root().sh(TRANSLATION);
    world.host.root().sysctl("ipv4/conf/all/send_redirects", "0");
    world.host.root().sysctl("ipv4/conf/dc0/send_redirects", "0");
    world.pod("db").sh("ip route add 10.20.0.2/32 via 10.20.0.1; ip -6 route add fd20::2/128 via fd20::1");

    let (db, admin) = (["10.96.0.10", "fd96::10"], ["10.96.0.11", "fd96::11"]);
    let own = ["10.20.0.3", "fd20::3"];
    let check = |expected: [bool; 4], what: &str| {
        for ipv6 in [false, true] {
            let at = usize::from(ipv6);
            let questions = [(db[at], 80, 8080), (own[at], 8080, 8080), (own[at], 9090, 9090), (admin[at], 80, 9090)];
            for ((address, port, listening), expected) in questions.into_iter().zip(expected) {
                let other = if address == own[at] { "db" } else { "node" };
                let got = if expected {
                    world.reaches(address, port, listening, ipv6, ALLOWED)
                } else {
                    world.denied(("web", other), ipv6, || world.reaches(address, port, listening, ipv6, DENIED))
                };
                assert_eq!(got, expected, "{what}: {address} {port}");
            }
        }
    };
    // The twin: without policy all of it is reached, so what is not below is not for want of a way.
    check([true; 4], "no policy");
    let documents = Documents::default().with_yaml("services.yaml", SERVICES).unwrap();
    let documents = documents.with_yaml("policies.yaml", POLICIES).unwrap();
    let report = owner.replace_documents(&Documents::default(), &documents).unwrap();
    assert!(report.is_complete() && report.faults.is_empty(), "{report:?}");
    check([true, true, false, false], "the service alone");
    // Where nothing is known of the service, it is nobody.
    let unknown = Documents::default().with_yaml("policies.yaml", POLICIES).unwrap();
    owner.replace_documents(&documents, &unknown).unwrap();
    check([false; 4], "nothing is known of it");
    owner.uninstall().unwrap();
}
