//! Whatever a file of NetworkPolicies holds: it is refused with its place, or read and can be compiled or refused.

#![no_main]

use dcenet_policy::Compiler;
use dcenet_policy::model::{Cluster, Pod, PodId};
use dcenet_policy::sources::networkpolicy::{from_json, from_yaml};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let read = [from_yaml(text), from_json(text)];
    for policies in read.into_iter().flatten() {
        let mut cluster = Cluster::default();
        cluster.insert_namespace("shop", [("team", "shop")]);
        for (name, address) in [("web", "10.0.0.1"), ("db", "2001:db8::1")] {
            let pod = Pod::new([("app", name)], [address.parse().expect("an address")]);
            cluster.pods.insert(PodId::new("shop", name), pod);
        }
        for policy in policies {
            cluster.insert_policy(policy);
        }
        if let Err(error) = Compiler::default().update(&cluster) {
            assert!(!error.to_string().is_empty());
        }
    }
});
