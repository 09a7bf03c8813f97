//! What is read of nodes and services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use dcenet_policy::sources::kubernetes::Documents;

fn read(texts: &[&str]) -> Result<Documents, String> {
    let all = texts.join("\n---\n");
    Documents::default().with_yaml("a.yaml", &all).map_err(|error| error.to_string())
}

fn node(addresses: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Node, metadata: {{name: n1, labels: {{zone: a}}}}, status: {{addresses: \
         [{addresses}]}}}}"
    )
}

fn pod(name: &str, node: &str, own: &str, host: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{nodeName: {node}}}, status: {{podIP: {own}, \
         hostIPs: [{{ip: {host}}}]}}}}"
    )
}

fn of<const N: usize>(addresses: [&str; N]) -> BTreeSet<IpAddr> {
    addresses.map(|text| text.parse().unwrap()).into()
}

#[test]
fn addresses_of_both_families_are_the_nodes_and_names_are_not() {
    let text = node(
        "{type: Hostname, address: n1}, {type: InternalIP, address: 10.1.0.1}, {type: InternalIP, address: 'fd00::1'}, \
         {type: ExternalIP, address: 203.0.113.1}, {type: ExternalIP, address: 10.1.0.1}, \
         {type: InternalDNS, address: n1.example}",
    );
    let documents = read(&[&text]).unwrap();
    assert_eq!(documents.nodes["n1"], of(["10.1.0.1", "fd00::1"]));
    // Whoever comes by an address that is translated for many is not the pods' own node.
    assert_eq!(documents.catalog.external_addresses["n1"], of(["203.0.113.1"]));
    assert_eq!(documents.catalog.node_labels["n1"]["zone"], "a");
    let bare = read(&["{apiVersion: v1, kind: Node, metadata: {name: n2}}"]).unwrap();
    assert!(bare.nodes.is_empty() && bare.catalog.node_labels["n2"].is_empty());
    let bad = node("{type: InternalIP, address: n1}");
    let error = read(&[&bad]).unwrap_err();
    assert!(error.contains("status.addresses[0].address: \"n1\": must be an address that a host can have"), "{error}");
    let error = read(&[&text, &text]).unwrap_err();
    assert!(error.contains("Node n1 is in a.yaml, document 0, too; remove or rename one"), "{error}");
}

#[test]
fn what_pods_say_of_their_node_is_added() {
    let [node, pod] = [node("{type: InternalIP, address: 10.1.0.1}"), pod("web", "n1", "10.0.0.1", "10.1.0.9")];
    for texts in [[&*node, &*pod], [&*pod, &*node]] {
        assert_eq!(read(&texts).unwrap().nodes["n1"], of(["10.1.0.1", "10.1.0.9"]));
    }
}

#[test]
fn an_address_that_a_pod_has_alone_is_not_its_nodes() {
    let node = node("{type: InternalIP, address: 10.1.0.1}, {type: InternalIP, address: 10.1.0.2}");
    let alone = pod("alone", "n1", "10.1.0.1", "10.1.0.1");
    for texts in [[&*node, &*alone], [&*alone, &*node]] {
        let documents = read(&texts).unwrap();
        assert_eq!(documents.nodes["n1"], of(["10.1.0.2"]));
        assert_eq!(documents.pods.len(), 1);
    }
    // A pod of another node, or one whose node has the address by the word of others, is a mistake.
    let elsewhere = pod("web", "n2", "10.1.0.1", "10.1.0.9");
    let other = pod("other", "n1", "10.0.0.2", "10.1.0.1");
    for texts in [
        &[&*node, &*elsewhere][..],
        &[&*elsewhere, &*node],
        &[&*node, &*other, &*alone],
        &[&*other, &*node, &*alone],
        &[&*other, &*alone, &*node],
        &[&*node, &*alone, &*other],
    ] {
        let error = read(texts).unwrap_err();
        assert!(error.contains("10.1.0.1 is the address of "), "{error}");
    }
}

fn addresses(spec: &str) -> Result<Option<Vec<String>>, String> {
    let text = format!("{{apiVersion: v1, kind: Service, metadata: {{name: db, namespace: x}}, {spec}}}");
    let read = Documents::default().with_yaml("a.yaml", &text).map_err(|error| error.to_string())?;
    let of = read.catalog.service_addresses.into_values().next();
    Ok(of.map(|all| all.iter().map(|b| format!("{} {} {:?}", b.address, b.protocol, b.port.unwrap())).collect()))
}

#[test]
fn a_services_addresses_are_read_with_its_ports() {
    let spec = "spec: {type: LoadBalancer, clusterIP: 10.96.0.9, clusterIPs: [10.96.0.9, 'fd00:96::9'], externalIPs: \
                [203.0.113.9], ports: [{port: 5432, targetPort: sql, nodePort: 30001}, {port: 53, protocol: UDP}]}, \
                status: {loadBalancer: {ingress: [{ip: 198.51.100.9}, {hostname: db.example}]}}";
    let wanted: Vec<String> = ["10.96.0.9", "198.51.100.9", "203.0.113.9", "fd00:96::9"]
        .iter()
        .flat_map(|at| [format!("{at} tcp 5432"), format!("{at} udp 53")])
        .collect();
    assert_eq!(addresses(spec).unwrap(), Some(wanted));
}

#[test]
fn a_headless_service_is_known_and_an_alias_is_not() {
    let none = Some(Vec::new());
    assert_eq!(addresses("spec: {clusterIP: None, clusterIPs: [None], ports: [{port: 80}]}").unwrap(), none);
    assert_eq!(addresses("spec: {clusterIP: '', ports: [{port: 80}]}").unwrap(), none);
    assert_eq!(addresses("spec: {type: ExternalName, externalName: db.example}").unwrap(), None);
    let error = addresses("spec: {clusterIP: db}").unwrap_err();
    assert!(error.contains("spec.clusterIP: \"db\": must be an address that a host can have"), "{error}");
    let error = addresses("spec: {clusterIP: 10.96.0.9, ports: [{port: 0}]}").unwrap_err();
    assert!(error.contains("spec.ports[0].port: 0: must be a number from 1 to 65535"), "{error}");
}
