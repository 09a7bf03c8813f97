use super::*;

fn with_spec(namespace: &str, spec: &str) -> String {
    format!("{{apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {{name: p{namespace}}}, spec: {{{spec}}}}}")
}

#[test]
fn ports_and_their_gaps_are_exact() {
    let ports = |service: &str| {
        let rule = format!("tier: admin, priority: 0, ingress: [{{action: deny, services: [{service}]}}]");
        let policy = from_yaml(&with_spec("", &rule)).unwrap().remove(0);
        let Ports::OneOf(ports) = policy.ingress.unwrap().remove(0).ports else { panic!("all ports of {service}") };
        let text = |port: &PortMatch| match &port.port {
            PortSpec::Any => format!("{}", port.protocol),
            PortSpec::Range { first, last } => format!("{} {first}-{last}", port.protocol),
            PortSpec::Named(name) => format!("{} {name}", port.protocol),
        };
        ports.iter().map(text).collect::<Vec<_>>().join(", ")
    };
    assert_eq!(ports("{protocol: tcp}"), "tcp");
    assert_eq!(
        ports("{protocol: UDP, ports: [53, 60-70, '99', http-alt]}"),
        "udp 53-53, udp 60-70, udp 99-99, udp http-alt"
    );
    assert_eq!(ports("{protocol: tcp, notPorts: [443]}"), "tcp 0-442, tcp 444-65535");
    assert_eq!(ports("{protocol: tcp, notPorts: [80-90, 1-79, 85, 65535]}"), "tcp 0-0, tcp 91-65534");
    assert_eq!(ports("{protocol: sctp, notPorts: [1-65535]}"), "sctp 0-0");
    assert_eq!(ports("{protocol: icmp, type: 3}"), "icmp 768-1023");
    assert_eq!(ports("{protocol: icmpv6, type: 1, code: 4}"), "icmpv6 260-260");
    assert_eq!(ports("{protocol: 47}, {protocol: 6, ports: [1]}"), "47, tcp 1-1");
}

#[test]
fn prefixes_and_their_complements_are_exact() {
    let blocks = |peer: &str| {
        let rule = format!("tier: admin, priority: 0, ingress: [{{action: deny, from: [{peer}]}}]");
        let policy = from_yaml(&with_spec("", &rule)).unwrap().remove(0);
        let Peers::OneOf(peers) = policy.ingress.unwrap().remove(0).peers else { panic!("anybody of {peer}") };
        let text = |peer: &Peer| match peer {
            Peer::Block(IpBlock { cidr, except }) => format!("{cidr} but {except:?}"),
            other => panic!("{other:?}"),
        };
        peers.iter().map(text).collect::<Vec<_>>().join(", ")
    };
    assert_eq!(blocks("{cidrs: [10.0.0.1/8, 'fd00::/8']}"), "10.0.0.0/8 but [], fd00::/8 but []");
    assert_eq!(
        blocks("{cidrs: [10.0.0.0/8, 10.1.0.0/24, 'fd00::/8'], except: [10.1.0.0/16]}"),
        "10.0.0.0/8 but [10.1.0.0/16], fd00::/8 but []",
        "what an exception covers whole is not there"
    );
    assert_eq!(blocks("{notCidrs: [10.0.0.0/8, 'fd00::/8']}"), "0.0.0.0/0 but [10.0.0.0/8], ::/0 but [fd00::/8]");
    assert_eq!(blocks("{notCidrs: [10.0.0.0/8, '::/0']}"), "0.0.0.0/0 but [10.0.0.0/8]");
}

#[test]
fn what_cannot_be_meant_is_refused_by_field() {
    let refusal = |namespace, spec: &str| from_yaml(&with_spec(namespace, spec)).unwrap_err().to_string();
    let rule = |rule: &str| refusal("", &format!("tier: admin, priority: 1, egress: [{{action: deny, {rule}}}]"));
    let cases = [
        (refusal("", "ingress: []"), "spec.tier: nothing: is required"),
        (refusal("", "tier: admin, ingress: []"), "spec.priority: nothing: must be a number from 0 to 65535"),
        (
            refusal("", "tier: network-policy, priority: 1, ingress: []"),
            "spec.tier: \"network-policy\": must be admin, baseline or the name of a Tier; add a namespace for this one",
        ),
        (
            refusal(", namespace: shop", "tier: admin, ingress: []"),
            "spec.tier: \"admin\": must be network-policy in a namespace; remove the namespace for another tier",
        ),
        (
            refusal("", "tier: admin, priority: 1, mode: dry, ingress: []"),
            "spec.mode: \"dry\": must be enforce or audit",
        ),
        (
            refusal(", namespace: shop", "priority: 0, ingress: []"),
            "spec.priority: 0: must be a number from 1 to 65535",
        ),
        (
            refusal(", namespace: shop", "subject: {namespaceSelector: {}}, ingress: []"),
            "spec.subject.namespaceSelector: unknown field",
        ),
        (
            refusal("", "tier: admin, priority: 1"),
            "spec: {\"priority\":1,\"tier\":\"admin\"}: must have ingress or egress; an empty list is one",
        ),
        (
            refusal("", "tier: admin, priority: 1, egress: [{action: refuse}]"),
            "spec.egress[0].action: \"refuse\": must be allow or deny or reject or pass",
        ),
        (rule("log: yes please"), "spec.egress[0].log: \"yes please\": must be true or false"),
        (rule("to: []"), "spec.egress[0].to: []: must have at least one element; leave it out for anybody"),
        (rule("from: [{pods: {}}]"), "spec.egress[0].from: unknown field"),
        (
            rule("to: [{pods: {}, cidrs: [10.0.0.0/8]}]"),
            "spec.egress[0].to[0]: {\"cidrs\":[\"10.0.0.0/8\"],\"pods\":{}}: must have exactly one of pods, cidrs, notCidrs, nodes, prefixGroups, \
             clusters, service, fqdns; \
             make several elements of it",
        ),
        (
            rule("to: [{pods: {}, except: [10.0.0.0/8]}]"),
            "spec.egress[0].to[0].except: [\"10.0.0.0/8\"]: belongs to cidrs; remove it",
        ),
        (
            rule("to: [{cidrs: [10.0.0.0/8], except: [10.1.0.0/16, 11.0.0.0/16]}]"),
            "spec.egress[0].to[0].except[1]: \"11.0.0.0/16\": must be a strict subset of one of cidrs",
        ),
        (
            rule("to: [{notCidrs: [10.0.0.0/8]}]"),
            "spec.egress[0].to[0].notCidrs: [\"10.0.0.0/8\"]: must name prefixes of both families; add \"::/0\" or 0.0.0.0/0 \
             if no address of the other is meant",
        ),
        (
            rule("to: [{notCidrs: [0.0.0.0/0, '::/0']}]"),
            "spec.egress[0].to[0].notCidrs: [\"0.0.0.0/0\",\"::/0\"]: leaves no address; name the prefixes that are meant",
        ),
        (
            rule("services: [{protocol: tcp, ports: [8000-81o0]}]"),
            "spec.egress[0].services[0].ports[0]: \"8000-81o0\": must be a number from 1 to 65535, a range",
        ),
        (rule("to: [{notCidrs: []}]"), "spec.egress[0].to[0].notCidrs: []: must have at least one prefix"),
        (
            rule("services: [{protocol: gre}]"),
            "spec.egress[0].services[0].protocol: \"gre\": must be tcp, udp, sctp, icmp, icmpv6 or a number from 0 to 255",
        ),
        (
            rule("services: [{ports: [1]}]"),
            "spec.egress[0].services[0].protocol: nothing: must be tcp, udp, sctp, icmp, icmpv6 or a number from 0 to 255",
        ),
        (
            rule("services: [{protocol: 47, ports: [1]}]"),
            "spec.egress[0].services[0].ports: [1]: only tcp, udp and sctp have ports; remove it or change protocol",
        ),
        (
            rule("services: [{protocol: icmp, code: 1}]"),
            "spec.egress[0].services[0].code: 1: needs a type beside it, of icmp or icmpv6; set type or remove it",
        ),
        (
            rule("services: [{protocol: icmp, type: 256}]"),
            "spec.egress[0].services[0].type: 256: must be a number from 0 to 255",
        ),
        (
            rule("services: [{protocol: tcp, ports: [90-80]}]"),
            "spec.egress[0].services[0].ports[0]: \"90-80\": must be a number from 1 to 65535, a range such as 8000-8100, or the name \
             of a port",
        ),
        (
            rule("services: [{protocol: tcp, notPorts: [http]}]"),
            "spec.egress[0].services[0].notPorts[0]: \"http\": must be a number or a range: what a name stands for differs by pod",
        ),
        (
            rule("services: [{protocol: tcp, ports: [1], notPorts: [2]}]"),
            "spec.egress[0].services[0].notPorts: [2]: excludes ports; make two elements of it",
        ),
    ];
    for (told, wanted) in cases {
        assert!(told.starts_with(&format!("document 0: {wanted}")), "{told}\nwanted: {wanted}");
    }
    let twice = [
        with_spec("", "tier: admin, priority: 1, ingress: []"),
        with_spec("", "tier: admin, priority: 2, ingress: []"),
    ];
    let told = from_yaml(&twice.join("\n---\n")).unwrap_err().to_string();
    assert_eq!(told, "document 1: metadata: {\"name\":\"p\"}: admin:policy/p is there twice; remove or rename one");
}

#[test]
fn peers_that_are_named_are_read_and_what_cannot_be_meant_is_refused() {
    let rule = |direction: &str, rule: &str| {
        with_spec("", &format!("tier: extra, priority: 1, {direction}: [{{action: deny, {rule}}}]"))
    };
    let policy = from_yaml(&rule(
        "egress",
        "to: [{prefixGroups: [a, b]}, {nodes: {matchLabels: {z: q}}}, {service: {namespace: n, name: s}}]",
    ));
    let policy = policy.unwrap().remove(0);
    assert_eq!(policy.id.to_string(), "extra:policy/p");
    let Peers::OneOf(peers) = policy.egress.unwrap().remove(0).peers else { panic!("anybody") };
    assert_eq!(peers[..2], [Peer::Group("a".to_owned()), Peer::Group("b".to_owned())]);
    assert!(matches!(&peers[2], Peer::Nodes(selector) if selector.requirements.len() == 1));
    assert_eq!(peers[3], Peer::Service(ServiceId::new("n", "s")));
    let refusal = |direction, text| from_yaml(&rule(direction, text)).unwrap_err().to_string();
    let cases = [
        (
            refusal("egress", "to: [{service: {name: s}}]"),
            "spec.egress[0].to[0].service.namespace: nothing: is required",
        ),
        (
            refusal("ingress", "from: [{service: {namespace: n, name: s}}]"),
            "spec.ingress[0].from[0].service: {\"name\":\"s\",\"namespace\":\"n\"}: is for egress; name the pods that may \
             come in",
        ),
        (
            refusal("egress", "to: [{service: {namespace: n, name: s}}], services: [{protocol: tcp}]"),
            "spec.egress[0].to: [{\"service\":{\"name\":\"s\",\"namespace\":\"n\"}}]: has a service, which has ports of \
             its own; make two rules, one without services",
        ),
        (
            refusal("egress", "to: [{prefixGroups: []}]"),
            "spec.egress[0].to[0].prefixGroups: []: must have at least one element; leave it out for anybody",
        ),
        (
            refusal("egress", "to: [{fqdns: [db.example.com]}]"),
            "spec.egress[0].to: [{\"fqdns\":[\"db.example.com\"]}]: has fqdns, which are for rules that allow",
        ),
        (
            refusal("ingress", "from: [{fqdns: [db.example.com]}]"),
            "spec.ingress[0].from[0].fqdns: [\"db.example.com\"]: is for egress",
        ),
        (
            refusal("egress", "to: [{fqdns: [db.example.com, '*.com']}]"),
            "spec.egress[0].to[0].fqdns[1]: \"*.com\": must be a full domain name, such as db.example.com, or *.example.com",
        ),
        (
            refusal("egress", "to: [{fqdns: ['10.0.0.1']}]"),
            "spec.egress[0].to[0].fqdns[0]: \"10.0.0.1\": is an address; name it as a prefix",
        ),
    ];
    for (told, wanted) in cases {
        assert!(told.starts_with(&format!("document 0: {wanted}")), "{told}\nwanted: {wanted}");
    }
}
