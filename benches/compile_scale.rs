//! `compile-scale`: 10,000 policies compiled for 10,000 pods, all of them endpoints, by one thread; then one label of one pod
//! changed at a time. Times are of the processor that the thread had, so that what else the machine does counts little;
//! memory is the most that the process had resident, the cluster itself included.

use std::time::Instant;

use dcenet_benches::policies::{Random, large};
use dcenet_benches::{Row, Sample, Summary, on_cpu, rounds, say};
use dcenet_policy::Compiler;
use dcenet_policy::model::PodId;

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
    for _ in 0..rounds(300, 5) {
        let id = &names[random.below(names.len())];
        let pod = cluster.pods.get_mut(id).ok_or("one of its names")?;
        pod.labels.insert("app".to_owned(), format!("v{}", random.below(10)));
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

/// Kilobytes.
fn resident(field: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    Ok(line.split_whitespace().nth(1).ok_or("a number")?.parse()?)
}
