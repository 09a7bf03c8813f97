//! What was counted of virtual functions while pods have them, for Prometheus:
//!
//! | Name | Labels | Of |
//! |---|---|---|
//! | `dcenet_vf_packets_total` | those below | packets |
//! | `dcenet_vf_bytes_total` | the same | their bytes |
//! | `dcenet_vf_dropped_total` | the same | packets that were dropped |
//!
//! `namespace` and `pod` (empty where they are not known), `container`, `network` and `interface` say whose it is, `function` which it
//! is, `direction` is `received` or `sent`, by the pod. `by` is `device` for what the pod's own device counted, and `port` for
//! what the adapter's port counted of the function, which not every driver does, and which sees what goes past the pod's stack, such
//! as RDMA. Numbers are of the function since it was made: a pod's do not begin with 0.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::atomic::Ordering;

use dcenet_core::engine::Engine;
use dcenet_core::model::{AttachmentKey, Workload};
use dcenet_core::netns::{Host, NetNs};
use dcenet_sriov::kernel::{LinkCounters, Traffic};
use dcenet_sriov::lease::Counted;
use dcenet_sriov::source::Machine;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

type Outcome<T> = Result<T, Box<dyn Error>>;
type Labels = [(&'static str, String); 8];

/// The metrics, and where they come from.
pub struct Functions {
    look: Box<dyn Fn() -> Outcome<Look> + Send>,
    packets: Family<Labels, Counter>,
    bytes: Family<Labels, Counter>,
    dropped: Family<Labels, Counter>,
}

/// What there is now.
struct Look {
    counted: Vec<Counted>,
    workloads: BTreeMap<AttachmentKey, Workload>,
}

impl Functions {
    /// Enters them into a registry: those of the leases of a state directory, whose pods the records of a run directory name.
    pub fn register(registry: &mut Registry, state: &Path, run: &Path) -> Self {
        let (state, run) = (state.to_owned(), run.to_owned());
        let look = move || {
            let counted = Machine::of_this_thread(&state, None)?.leases.counters()?;
            if counted.is_empty() {
                return Ok(Look { counted, workloads: BTreeMap::new() });
            }
            let records = Engine::new(Host(NetNs::of_this_thread()?), &run, None)?.records()?;
            let workloads = records.into_iter().filter_map(|record| Some((record.key, record.workload?))).collect();
            Ok(Look { counted, workloads })
        };
        Self::of(registry, Box::new(look))
    }

    fn of(registry: &mut Registry, look: Box<dyn Fn() -> Outcome<Look> + Send>) -> Self {
        let [packets, bytes, dropped] = <[Family<Labels, Counter>; 3]>::default();
        let r = registry.sub_registry_with_prefix("dcenet_vf");
        r.register("packets", "Packets of virtual functions", packets.clone());
        r.register("bytes", "Bytes of virtual functions", bytes.clone());
        r.register("dropped", "Packets that virtual functions dropped", dropped.clone());
        Self { look, packets, bytes, dropped }
    }

    /// All of it as of now; what cannot be counted stays as it was, and is told.
    pub fn publish(&self) {
        let Look { counted, workloads } = match (self.look)() {
            Ok(look) => look,
            Err(error) => {
                tracing::warn!(error, "virtual functions cannot be counted");
                return;
            }
        };
        // Those of pods that have gone go.
        self.packets.clear();
        self.bytes.clear();
        self.dropped.clear();
        for Counted { vf, owner, by_device, by_port } in &counted {
            let workload = workloads.get(owner);
            for (by, counters) in [("device", by_device), ("port", by_port)] {
                let Some(LinkCounters { received, sent }) = counters else { continue };
                for (direction, traffic) in [("received", received), ("sent", sent)] {
                    let labels = [
                        ("namespace", workload.map_or_else(String::new, |w| w.namespace().to_owned())),
                        ("pod", workload.map_or_else(String::new, |w| w.name().to_owned())),
                        ("container", owner.container.to_string()),
                        ("network", owner.network.to_string()),
                        ("interface", owner.ifname.to_string()),
                        ("function", vf.to_string()),
                        ("by", by.to_owned()),
                        ("direction", direction.to_owned()),
                    ];
                    let Traffic { packets, bytes, dropped } = *traffic;
                    for (family, value) in [(&self.packets, packets), (&self.bytes, bytes), (&self.dropped, dropped)] {
                        family.get_or_create(&labels).inner().store(value, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn key(container: &str) -> AttachmentKey {
        AttachmentKey {
            network: "fast".parse().unwrap(),
            container: container.parse().unwrap(),
            ifname: "net1".parse().unwrap(),
        }
    }

    fn counters(n: u64) -> LinkCounters {
        LinkCounters {
            received: Traffic { packets: n, bytes: n * 100, dropped: 1 },
            sent: Traffic { packets: n + 1, bytes: n * 200, dropped: 2 },
        }
    }

    #[test]
    fn each_pod_has_its_functions_counters_as_long_as_it_has_the_function() {
        let of = |function: &str, container, by_device, by_port| Counted {
            vf: function.parse().unwrap(),
            owner: key(container),
            by_device,
            by_port,
        };
        let both = vec![
            of("0000:01:10.0", "c1", Some(counters(5)), Some(counters(7))),
            of("0000:01:10.2", "c2", Some(counters(9)), None),
        ];
        let there = Arc::new(Mutex::new(both));
        let seen = there.clone();
        let look = move || {
            let workloads = [(key("c1"), Workload::new("shop", "db").unwrap())].into();
            Ok(Look { counted: seen.lock().unwrap().clone(), workloads })
        };
        let mut registry = Registry::default();
        let metrics = Functions::of(&mut registry, Box::new(look));
        let text = || {
            metrics.publish();
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let labels = |pod: &str, container: &str, function: &str, by: &str, direction: &str| {
            format!(
                "{{{pod},container=\"{container}\",network=\"fast\",interface=\"net1\",function=\"{function}\",by=\"{by}\",\
                 direction=\"{direction}\"}}"
            )
        };
        let (db, nobody) = ("namespace=\"shop\",pod=\"db\"", "namespace=\"\",pod=\"\"");
        let first = |by, direction| labels(db, "c1", "0000:01:10.0", by, direction);
        let second = |direction| labels(nobody, "c2", "0000:01:10.2", "device", direction);
        let now = text();
        for line in [
            format!("dcenet_vf_packets_total{} 5\n", first("device", "received")),
            format!("dcenet_vf_packets_total{} 6\n", first("device", "sent")),
            format!("dcenet_vf_bytes_total{} 700\n", first("port", "received")),
            format!("dcenet_vf_bytes_total{} 1400\n", first("port", "sent")),
            format!("dcenet_vf_dropped_total{} 1\n", second("received")),
            format!("dcenet_vf_dropped_total{} 2\n", second("sent")),
        ] {
            assert!(now.contains(&line), "{line}: {now}");
        }
        assert_eq!(now.matches("0000:01:10.2").count(), 6, "its port counts nothing: {now}");
        there.lock().unwrap().remove(0);
        let later = text();
        assert!(!later.contains("0000:01:10.0") && later.contains(&second("sent")), "{later}");
    }
}
