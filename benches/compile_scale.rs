//! `compile-scale`: 10,000 policies compiled for 10,000 pods, all of them endpoints, by one thread; then one label of one pod
//! changed at a time. Times are of the processor that the thread had, so that what else the machine does counts little;
//! memory is the most that the process had resident, the cluster itself included.

use std::collections::BTreeMap;
use std::time::Instant;

use dcenet_benches::policies::{Random, large};
use dcenet_benches::{Row, Sample, Summary, on_cpu, rounds, say};
use dcenet_policy::Compiler;
use dcenet_policy::compiler::Update;
use dcenet_policy::model::{Cluster, PodId, PortSpec, Ports, Protocol, Tuple, Verdict};

const ID: &str = "compile-scale";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let size = rounds(10_000, 1_000);
    let mut cluster = large(size, size);
    say(format_args!("{ID}: {size} policies, {size} pods; the cluster takes {} MB", resident("VmRSS:")? / 1000));
    let mut full = Vec::new();
    let mut memory = None;
    let mut compiler = Compiler::default();
    for _ in 0..rounds(5, 2) {
        compiler = Compiler::default();
        let begin = on_cpu();
        let update = compiler.update(&cluster)?;
        full.push((on_cpu() - begin).as_secs_f64() * 1e3);
        if memory.is_none() {
            memory = Some(resident("VmHWM:")? as f64 / 1e3);
            let (classes, sets) = (update.classes, update.sets().len());
            say(format_args!("{ID}: {classes} classes, {sets} policy sets, {} rules", update.rules.iter().count()));
        }
        if !update.faults.is_empty() {
            return Err(format!("closed: {}", update.faults[0]).into());
        }
    }
    let memory = memory.ok_or("a round")?;
    let (mut flips, mut walls) = (Vec::new(), Vec::new());
    let names: Vec<PodId> = cluster.pods.keys().cloned().collect();
    let mut random = Random::new(5);
    let mut last = None;
    let mut changed = Vec::new();
    for _ in 0..rounds(300, 5) {
        let id = &names[random.below(names.len())];
        let pod = cluster.pods.get_mut(id).ok_or("one of its names")?;
        let old = pod.labels.get("app").and_then(|value| value.strip_prefix('v')?.parse::<usize>().ok());
        let other = (old.ok_or("one of the ten values")? + 1 + random.below(9)) % 10;
        pod.labels.insert("app".to_owned(), format!("v{other}"));
        changed.push(id);
        let (begin, wall) = (on_cpu(), Instant::now());
        let update = compiler.update_pods(&cluster, [id])?;
        walls.push(wall.elapsed().as_secs_f64() * 1e3);
        flips.push((on_cpu() - begin).as_secs_f64() * 1e3);
        // As an owner does once an update is in force.
        compiler.release(update.generation);
        last = Some(update);
    }
    // The same cluster, compiled by one who has not seen it before.
    let (ours, fresh) = (last.ok_or("a round")?, Compiler::default().update(&cluster)?);
    if ours.table.exact().len() != fresh.table.exact().len() || ours.classes != fresh.classes {
        return Err("the changed cluster is not what a full compilation makes of it".into());
    }
    judge_alike(&cluster, &changed, [&ours, &fresh], &mut random)?;
    let sample = Sample::new(flips.clone());
    let wall = Sample::new(walls);
    let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|p| sample.quantile(p));
    say(format_args!(
        "{ID}: a label: p50 {p50:.3} ms, p90 {p90:.3} ms, p99 {p99:.3} ms; wall p50 {:.3} ms",
        wall.median()
    ));
    let mut summary = Summary::default();
    summary.add(Row::compare(ID, "all", 1.0, &full, ("3 s", &vec![3000.0; full.len()])));
    summary.add(Row::compare(ID, "memory", 1.0, &[memory], ("150 MB", &[150.0])).in_unit("MB"));
    summary.add(Row::compare(ID, "one label", 1.0, &flips, ("1 ms", &vec![1.0; flips.len()])));
    summary.write();
    Ok(())
}

/// Refuses verdicts that differ where a changed pod is at one of the ends. Ports are those that policies of the namespace name.
fn judge_alike(
    cluster: &Cluster,
    changed: &[&PodId],
    [ours, fresh]: [&Update; 2],
    random: &mut Random,
) -> Result<(), Failure> {
    let mut pods: BTreeMap<&str, Vec<&PodId>> = BTreeMap::new();
    for id in cluster.pods.keys() {
        pods.entry(&id.namespace).or_default().push(id);
    }
    let mut ports: BTreeMap<&str, Vec<u16>> = BTreeMap::new();
    for policy in cluster.policies.values() {
        for rule in policy.ingress.iter().chain(&policy.egress).flatten() {
            if let Ports::OneOf(services) = &rule.ports {
                let first = services.iter().filter_map(|service| match service.port {
                    PortSpec::Range { first, .. } => Some(first),
                    _ => None,
                });
                ports.entry(&policy.id.namespace).or_default().extend(first);
            }
        }
    }
    let mut allowed = 0;
    for _ in 0..rounds(100_000, 2_000) {
        let one = changed[random.below(changed.len())];
        let (around, ports) = (&pods[one.namespace.as_str()], &ports[one.namespace.as_str()]);
        let pair = [one, around[random.below(around.len())]];
        let turned = random.below(2);
        let (subject, peer) = (pair[turned], &cluster.pods[pair[1 - turned]]);
        let (address, port) = (*peer.addresses.first().ok_or("each pod has one")?, ports[random.below(ports.len())]);
        for tuple in [Tuple::ingress(address, Protocol::TCP, port), Tuple::egress(address, Protocol::TCP, port)] {
            let [ours, fresh] = [ours, fresh].map(|update| update.decide(subject, &tuple).map(|leaf| leaf.verdict));
            if ours != fresh {
                return Err(format!("{subject:?}, {tuple:?}: {ours:?}, and {fresh:?} by a full compilation").into());
            }
            allowed += usize::from(ours == Some(Verdict::Allow));
        }
    }
    if allowed == 0 {
        return Err("no draw is allowed, so that equal verdicts say nothing".into());
    }
    say(format_args!("{ID}: changed pods: {allowed} draws allowed by both"));
    Ok(())
}

/// Kilobytes.
fn resident(field: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    Ok(line.split_whitespace().nth(1).ok_or("a number")?.parse()?)
}
