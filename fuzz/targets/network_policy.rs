//! Whatever a file of policies, namespaces and pods holds: it is refused with its place, or read and can be compiled or
//! refused.

#![no_main]

use dcenet_policy::Compiler;
use dcenet_policy::model::{Pod, PodId};
use dcenet_policy::sources::kubernetes::Documents;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let read = [Documents::default().with_yaml("file", text), Documents::default().with_json("file", text)];
    for documents in read.into_iter().flatten() {
        let mut cluster = documents.into_cluster();
        cluster.insert_namespace("shop", [("team", "shop")]);
        for (name, address) in [("web", "10.0.0.1"), ("db", "2001:db8::1")] {
            let pod = Pod::new([("app", name)], [address.parse().expect("an address")]);
            cluster.pods.insert(PodId::new("shop", name), pod);
        }
        if let Err(error) = Compiler::default().update(&cluster) {
            assert!(!error.to_string().is_empty());
        }
    }
});
