//! Dumps of Kubernetes objects.

use dcenet_ipam::adopt::whereabouts::Whereabouts;
use dcenet_ipam::adopt::{Dump, DumpFormat};

pub(super) fn whereabouts(json: &str) -> Whereabouts {
    let dump = Dump::parse("pool.json", json, DumpFormat::Json).unwrap();
    Whereabouts { dumps: vec![dump], network_name: String::new() }
}
