//! Every netlink request and journal write (in guests some of them) made to fail once: host and pod are as before.

mod common;

use common::{bridge, key, lease, request, veth};
use dcenet_core::engine::{AttachRequest, Engine};
use dcenet_core::link::{LinkConfig, Policy};
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{Endpoint, PolicyError, PolicySink};
use dcenet_core::test_support::{Fault, HostState, Injection, Rung, TestHost, TestNetNs, effort, require, with_fault};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Remembers who is under policy, and refuses a device that is up.
#[derive(Default)]
struct Sink(Mutex<BTreeSet<String>>);

impl PolicySink for Sink {
    fn missing(&self, _: &Endpoint) -> Result<Option<String>, PolicyError> {
        Ok(None)
    }

    fn ready(&self) -> Result<(), PolicyError> {
        Ok(())
    }

    fn attach(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        assert_eq!(endpoint.addresses.len(), 2);
        self.0.lock().unwrap().insert(endpoint.attachment.to_string());
        let flags = std::process::Command::new("ip").args(["link", "show", "dev", endpoint.ifname.as_str()]).output();
        let text = String::from_utf8(flags.unwrap().stdout).unwrap();
        assert!(text.starts_with(&format!("{}: ", endpoint.ifindex)), "{text}");
        assert!(text.contains("state DOWN"), "{text}");
        Ok(())
    }

    fn await_enforced(&self, _: &Endpoint, _: Duration) -> Result<(), PolicyError> {
        Ok(())
    }

    fn detach(&self, attachment: &AttachmentKey) -> Result<(), PolicyError> {
        self.0.lock().unwrap().remove(&attachment.to_string());
        Ok(())
    }
}

fn wanted<'a>(container: &str, pod: &'a TestNetNs, config: &LinkConfig) -> AttachRequest<'a> {
    AttachRequest { policy: Policy::Wanted, ..request(container, pod, config, lease(2)) }
}

fn each_call(what: &str, stride: usize, mut run: impl FnMut(Injection) -> (bool, u64)) {
    for fault in [Fault::Fail, Fault::Lose] {
        let mut failed = 0;
        for call in (1..).step_by(stride) {
            let (ok, calls) = run(Injection { call, fault });
            failed += u64::from(!ok);
            if calls < call {
                assert!(ok, "no fault was met");
                assert!(failed > 0);
                println!("{what}, {fault:?}: {calls} calls, {failed} of them fatal");
                break;
            }
        }
    }
}

fn attach_is_all_or_nothing(config: &LinkConfig, neighbour: bool) {
    let sink = Arc::new(Sink::default());
    let host = TestHost::new();
    let engine = host.engine(Some(sink.clone()));
    let other = host.new_pod();
    if neighbour {
        engine.attach(&request("other", &other, config, lease(9))).unwrap();
    }
    let records = host.records();
    let pod = host.new_pod();
    let (before, empty) = (host.state(), HostState::capture(pod.netns()));
    let what = format!("attach {} neighbour {neighbour}", config.driver().kind());
    each_call(&what, effort(4, 1, 1), |injection| {
        let (result, calls) = with_fault(injection, || engine.attach(&wanted("c1", &pod, config)));
        let ok = result.is_ok();
        if ok {
            assert!(sink.0.lock().unwrap().contains(&key("c1").to_string()));
            engine.detach(&key("c1"), None).unwrap();
            if !neighbour && let LinkConfig::Bridge(config) = config {
                assert!(engine.remove_idle(&config.bridge).unwrap());
            }
        }
        assert_eq!(before.diff(&host.state()), "", "{injection:?} {result:?}");
        assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{injection:?}");
        assert!(sink.0.lock().unwrap().is_empty(), "{injection:?}");
        // A record whose removal failed holds nothing that the next attach or detach would not clear.
        if host.records() != records {
            engine.detach(&key("c1"), None).unwrap();
            assert_eq!(host.records(), records, "{injection:?}");
        }
        (ok, calls)
    });
}

#[test]
fn attach_to_a_new_bridge_is_all_or_nothing() {
    if require(Rung::Netns) {
        attach_is_all_or_nothing(&bridge(), false);
    }
}

#[test]
fn attach_to_a_bridge_in_use_is_all_or_nothing() {
    if require(Rung::Netns) {
        attach_is_all_or_nothing(&bridge(), true);
    }
}

#[test]
fn routed_attach_is_all_or_nothing() {
    if require(Rung::Netns) {
        attach_is_all_or_nothing(&veth(), false);
    }
}

#[test]
fn a_failed_detach_is_finished_by_the_next() {
    if !require(Rung::Netns) {
        return;
    }
    let sink = Arc::new(Sink::default());
    let host = TestHost::new();
    let engine: Engine = host.engine(Some(sink.clone()));
    let other = host.new_pod();
    engine.attach(&request("other", &other, &bridge(), lease(9))).unwrap();
    let pod = host.new_pod();
    let (before, records) = (host.state(), host.records());
    each_call("detach", effort(2, 1, 1), |injection| {
        engine.attach(&wanted("c1", &pod, &bridge())).unwrap();
        let (result, calls) = with_fault(injection, || engine.detach(&key("c1"), None));
        if result.is_err() {
            engine.detach(&key("c1"), None).unwrap();
        }
        assert_eq!(before.diff(&host.state()), "", "{injection:?} {result:?}");
        assert_eq!(host.records(), records, "{injection:?} {result:?}");
        assert!(sink.0.lock().unwrap().is_empty(), "{injection:?}");
        (result.is_ok(), calls)
    });
}
