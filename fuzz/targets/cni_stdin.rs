//! Whatever stands on stdin: it is refused or read, and what was read can be asked for its sections.

#![no_main]

use dcenet_core::cni::NetConf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stdin: &[u8]| {
    if let Ok(conf) = NetConf::parse(stdin) {
        for section in ["link", "ipam", "policy"] {
            let _ = conf.section::<serde_json::Value>(section);
        }
    }
});
