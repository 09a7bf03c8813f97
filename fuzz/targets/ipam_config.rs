//! Whatever stands in the section `ipam`: it is refused by field, or its pools are what they say.

#![no_main]

use dcenet_ipam::IpamConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(config) = serde_json::from_slice::<IpamConfig>(text) else { return };
    match config.layout() {
        Ok(layout) => {
            for pool in &layout.pools {
                assert!(pool.size() > 0, "{}: no address to hand out", pool.name);
                for claim in &pool.claims {
                    if let Some(address) = claim.address {
                        assert!(pool.subnet.contains(&address.ip()), "{}: {}", pool.name, address.ip());
                    }
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty() && error.field.starts_with("ipam")),
    }
});
