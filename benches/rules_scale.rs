//! `rules-scale`: 100,000 rules for one pod, from the model to loaded programs with their tables, in time of the processor: rules
//! for groups of pods, prefixes as in ClassBench, and as much overlap as there can be. Then how long a change takes until
//! it is in force on a device, by the clock: a peer that comes to another group under 1,000 rules, and 1,000 rules
//! that take the place of others. Needs root.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_benches::owner::Owner;
use dcenet_benches::policies::{addresses, by_group, by_prefix, one_subject, overlapping, policy, subject};
use dcenet_benches::{Row, Sample, Summary, on_cpu, rounds, say};
use dcenet_core::engine::AttachRequest;
use dcenet_core::link::Policy as LinkPolicy;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{Dns, Lease, LeasedAddress, PolicySink};
use dcenet_core::test_support::TestHost;
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::Put;
use dcenet_ebpf::probe::Features;
use dcenet_policy::Compiler;
use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use dcenet_policy::model::{Cluster, Pod, PodId, Rule};
use dcenet_policy::target::{MAX_TABLE_NODES, Policies, Target, Tc};
use serde_json::json;

const ID: &str = "rules-scale";
const GROUPS: usize = 1_024;
const LIMIT: Duration = Duration::from_secs(20);

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut summary = Summary::default();
    let count = rounds(100_000, 5_000);
    let target = Tc::for_kernel(Sizes::default(), &Features::probe()?);
    let sets: [(&str, Vec<Rule>); 3] =
        [("pods", by_group(count, GROUPS)), ("prefixes", by_prefix(count)), ("overlap", overlapping(count))];
    for (name, rules) in sets {
        let mut cluster = one_subject(10 * GROUPS, GROUPS);
        cluster.insert_policy(policy(rules));
        let mut times = Vec::new();
        for round in 0..rounds(5, 1) {
            match load(&target, &cluster, round == 0, name)? {
                Some(time) => times.push(time.as_secs_f64() * 1e3),
                None => break,
            }
        }
        let variant = format!("{count} rules, {name}");
        summary.add(match times.is_empty() {
            true => Row::refused(ID, &variant, 1.0, ("1 s", 1000.0)),
            false => Row::compare(ID, &variant, 1.0, &times, ("1 s", &vec![1000.0; times.len()])),
        });
    }
    changes(&mut summary)?;
    summary.write();
    Ok(())
}

/// From the model to programs that could be attached; `None` where the rules are not enforced as written.
fn load(target: &Tc, cluster: &Cluster, tell: bool, name: &str) -> Result<Option<Duration>, Failure> {
    let limits = Limits { arms: MAX_TABLE_NODES, ..Limits::default() };
    let begin = on_cpu();
    let update = Compiler::new(Scope::Cluster, limits).update(cluster)?;
    if let Some(fault) = update.faults.first() {
        say(format_args!("{ID}: {name}: REFUSED: {fault}"));
        return Ok(None);
    }
    let compiled = on_cpu() - begin;
    let plan = &update.endpoints[&subject()];
    let artefact = target.lower(Policies { ingress: &plan.ingress.program, egress: &plan.egress.program })?;
    let elf = artefact.object.to_elf()?;
    let lowered = on_cpu() - begin;
    let mut loaded = AyaLoader.load(&elf, &LoadRequest::default())?;
    for content in &artefact.contents {
        let map = loaded.take_map(&content.map).ok_or("the object has the maps of its contents")?;
        for (index, value) in content.values() {
            map.update(&index.to_ne_bytes(), value, Put::Any)?;
        }
    }
    let all = on_cpu() - begin;
    if tell {
        let stats = plan.ingress.program.diagram.stats();
        let shadowed = plan.ingress.program.shadowed.len();
        let form = artefact.ingress;
        say(format_args!(
            "{ID}: {name}: {} arms, {} nodes, depth {}, {shadowed} shadowed rules, {} classes, as {form:?}: compiled in {:.0} ms, \
             lowered in {:.0}, loaded in {:.0}",
            stats.arms,
            stats.nodes,
            stats.depth,
            update.classes,
            compiled.as_secs_f64() * 1e3,
            (lowered - compiled).as_secs_f64() * 1e3,
            (all - lowered).as_secs_f64() * 1e3
        ));
    }
    Ok(Some(all))
}

fn changes(summary: &mut Summary) -> Result<(), Failure> {
    let host = TestHost::new();
    let pins = host.directory().join("bpf");
    let config = PolicyConfig { pins: pins.clone(), ..PolicyConfig::default() };
    let owner = Owner::with(host.host(), &host.run_dir(), &pins, "");
    let sink = Arc::new(PinnedDefault::new(&config, &host.run_dir()));
    let engine = host.engine(Some(Arc::clone(&sink) as _));
    let pod = host.new_pod();
    let key = AttachmentKey { network: "bench".parse()?, container: "subject".parse()?, ifname: "eth0".parse()? };
    let address =
        LeasedAddress { gateway: Some("10.88.0.1".parse()?), ..LeasedAddress::new("10.88.0.2/24".parse()?, "pods", 2) };
    engine.attach(&AttachRequest {
        key: key.clone(),
        pod: pod.pod(),
        link: serde_json::from_value(json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true }))?,
        lease: Lease { addresses: vec![address], routes: Vec::new(), dns: Dns::default(), mac: None },
        mac: None,
        workload: Some("bench/subject".parse()?),
        labels: [("subject".to_owned(), String::new())].into(),
        policy: LinkPolicy::Wanted,
        nat: Default::default(),
        fingerprint: "1".into(),
    })?;
    let records = engine.attachments(&"bench".parse()?)?;
    let record = records.into_iter().find(|record| record.key == key).ok_or("the record just written")?;
    sink.await_enforced(&record.endpoint().ok_or("an endpoint")?, LIMIT)?;

    let enforcer = owner.enforcer();
    let groups = 100;
    let peer = |number: usize, group: usize| {
        let group = format!("v{}", group % groups);
        (PodId::new("bench", format!("p{number}")), Pod::new([("group", group.as_str())], [addresses(number)[0]]))
    };
    enforcer.upsert_pods((0..1000).map(|number| peer(number, number)))?;
    let (one, other) = (by_group(1_000, groups), by_group(1_001, groups).split_off(1));
    let complete = |report: dcenet_policy::enforcer::Report| match report.is_complete() && report.enforced == 1 {
        true => Ok(()),
        false => Err(format!("{report:?}")),
    };
    complete(enforcer.set_policies([policy(one.clone())])?)?;
    let mut members = Vec::new();
    for round in 0..rounds(1000, 20) {
        let (id, pod) = peer(round, round + 1);
        let begin = Instant::now();
        let report = enforcer.upsert_pod(id, pod)?;
        members.push(begin.elapsed().as_secs_f64() * 1e6);
        complete(report)?;
    }
    let mut rules = Vec::new();
    for round in 0..rounds(40, 4) {
        let next = policy(if round % 2 == 0 { other.clone() } else { one.clone() });
        let begin = Instant::now();
        let report = enforcer.set_policies([next])?;
        rules.push(begin.elapsed().as_secs_f64() * 1e3);
        complete(report)?;
    }
    for (name, times, unit) in [("a member", &members, "us"), ("1,000 rules", &rules, "ms")] {
        let sample = Sample::new(times.clone());
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|p| sample.quantile(p));
        say(format_args!("{ID}: {name}: p50 {p50:.2} {unit}, p90 {p90:.2}, p99 {p99:.2}"));
    }
    let p99 = |times: &[f64]| vec![Sample::new(times.to_vec()).quantile(0.99)];
    summary.add(Row::compare(ID, "a member, p99", 1.0, &p99(&members), ("100 us", &[100.0])).in_unit("us"));
    summary.add(Row::compare(ID, "1,000 rules, p99", 1.0, &p99(&rules), ("10 ms", &[10.0])));
    engine.detach(&key, None)?;
    owner.close();
    Ok(())
}
