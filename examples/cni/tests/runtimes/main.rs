//! The plugin under real runtimes, and beside the plugins that they come with.
//!
//! A runtime runs on a [`Machine`](machine::Machine) of its own: namespaces for network, mounts and processes, so that it
//! meets neither the host's directories nor its devices, and ends with the test however that ends.

#[path = "../common/mod.rs"]
mod common;

mod containerd;
mod cri;
mod killed;
mod libcni;
mod lists;
mod machine;
mod page;
mod podman;
mod reference_bugs;

use std::path::Path;

use dcenet_core::test_support::{Rung, TestHost, require_with};

/// Whether these programs are there, named by path or by their name in `/usr/bin`, with the package that has each.
fn has(programs: &[(&str, &str)]) -> bool {
    require_with(Rung::Services, || {
        let missing = programs.iter().find(|(program, _)| !Path::new("/usr/bin").join(program).exists());
        missing.map(|(program, package)| format!("{program} is missing: install {package}"))
    })
}

/// Has the host's IPv6 addresses come into use at once, so that the host looks the same at any time.
fn without_surprises(host: &TestHost) {
    for name in ["all/accept_dad", "default/accept_dad"] {
        host.root().sysctl(&format!("ipv6/conf/{name}"), "0");
    }
}
