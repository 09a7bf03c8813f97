//! The evaluator and the compiled form agree, and the comparison notices when they do not.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::ir::{Leaf, RuleList};
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::{
    Action, Cluster, Direction, IpBlock, LabelSelector, Mode, NamespaceMatch, Peer, Peers, Pod, PodId, PodMatch,
    Policy, PolicyId, Ports, Protocol, Rule, Tier, Tuple, Verdict,
};
use dcenet_policy::test_support::{
    PlantedBug, Rng, Tally, addresses, ask_for_accounts, boundary_tuples, change_a_name, claim_twice, cluster, compare,
    compare_random, tuples,
};
use dcenet_policy::{Compiler, Update};

#[test]
fn a_million_packets_get_the_evaluators_verdict_and_rule() {
    let tally = compare_random(0..2_000, 500, Compiler::default).unwrap();
    assert_eq!(tally.pairs, 1_000_000);
    assert!(tally.by_rule * 2 >= tally.pairs, "decided by a rule: {} of {}", tally.by_rule, tally.pairs);
    let denied = tally.pairs - tally.allowed;
    assert!(tally.allowed > 200_000 && denied > 200_000, "allowed {}, denied {denied}", tally.allowed);
}

#[test]
fn every_leaf_is_met_at_its_boundaries() {
    let (mut met, mut all) = (0, 0);
    for seed in 10_000..10_300 {
        let mut cluster = cluster(&mut Rng::new(seed));
        // A rule by a name is compiled before anything is known of the name, and met by nobody then.
        for (number, name) in ["a.example.com", "b.example.com", "c.b.example.com", "no.example.org"].iter().enumerate()
        {
            cluster.names.learn(name.parse().unwrap(), [172, 16, 0, number as u8].into(), 1000);
        }
        let update = Compiler::default().update(&cluster).unwrap();
        // The generator's small blocks lie in these ranges, so that a leaf not met from here has no address: more
        // specific prefixes and pods cover all of a block.
        let mut peers = addresses(&cluster);
        peers.extend((0..0x400).map(|low| IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + low))));
        peers.extend((0..0x400).map(|low| IpAddr::from(Ipv6Addr::from_bits((0xfd << 120) + low))));
        let mut tally = Tally::default();
        for endpoint in update.endpoints.keys() {
            for direction in Direction::ALL {
                let questions = boundary_tuples(&update, endpoint, direction, &peers);
                compare(&cluster, &update, questions, &mut tally).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
        }
        for (id, set) in update.sets() {
            let leaves = set.program.diagram.leaves();
            met += tally.leaves_hit[&id].len();
            all += leaves.len();
        }
    }
    assert!(all > 5_000 && met * 100 >= all * 99, "{met} of {all} leaves");
}

#[test]
fn planted_bugs_are_caught() {
    for bug in [PlantedBug::EndPortExclusive, PlantedBug::ExceptIgnored, PlantedBug::PassIgnored] {
        let caught = compare_random(0..200, 500, || Compiler::default().with_planted_bug(bug));
        let message = caught.expect_err("a wrong compiler must not pass").to_string();
        assert!(message.contains("the evaluator says"), "{message}");
    }
}

#[test]
fn addresses_that_several_pods_claim_are_judged_alike_and_a_believer_is_caught() {
    let run = |compiler: &dyn Fn() -> Compiler| {
        let mut tally = Tally::default();
        for seed in 30_000..30_300 {
            let mut rng = Rng::new(seed);
            let mut cluster = cluster(&mut rng);
            claim_twice(&mut rng, &mut cluster);
            let update = compiler().update(&cluster).unwrap();
            let questions = tuples(&mut rng, &cluster, 500);
            compare(&cluster, &update, questions, &mut tally).map_err(|error| format!("seed {seed}: {error}"))?;
        }
        Ok::<_, String>(tally)
    };
    let tally = run(&Compiler::default).unwrap();
    assert!(tally.pairs > 100_000 && tally.by_rule * 4 > tally.pairs, "{} of {}", tally.by_rule, tally.pairs);
    let error = run(&|| Compiler::default().with_planted_bug(PlantedBug::ClaimsBelieved)).unwrap_err();
    assert!(error.contains("the evaluator says"), "{error}");
}

#[test]
fn accounts_that_are_not_known_are_judged_alike() {
    let (mut tally, mut unknown) = (Tally::default(), 0);
    for seed in 40_000..40_300 {
        let mut rng = Rng::new(seed);
        let mut cluster = cluster(&mut rng);
        ask_for_accounts(&mut rng, &mut cluster);
        claim_twice(&mut rng, &mut cluster);
        let update = Compiler::default().update(&cluster).unwrap();
        unknown += update.faults.iter().filter(|fault| matches!(fault, Fault::UnknownAccount { .. })).count();
        let questions = tuples(&mut rng, &cluster, 500);
        compare(&cluster, &update, questions, &mut tally).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    assert!(unknown > 200 && tally.by_rule * 4 > tally.pairs, "{unknown}; {} of {}", tally.by_rule, tally.pairs);
}

#[test]
fn a_sequence_of_updates_decides_as_a_fresh_compilation() {
    for seed in 0..60 {
        let mut rng = Rng::new(20_000 + seed);
        let mut compiler = Compiler::default();
        let mut state = cluster(&mut rng);
        for step in 0..12 {
            let other = cluster(&mut rng);
            match rng.below(4) {
                0 => state.policies = other.policies,
                1 => {
                    let gone = state.pods.keys().nth(rng.below(state.pods.len())).cloned();
                    state.pods.remove(&gone.unwrap());
                    if state.pods.is_empty() {
                        state.pods = other.pods;
                    }
                }
                2 => state.namespaces = other.namespaces,
                _ => {
                    for (pod, twin) in state.pods.values_mut().zip(other.pods.into_values()) {
                        pod.labels = twin.labels;
                    }
                }
            }
            let update = compiler.update(&state).unwrap();
            if rng.chance(50) {
                compiler.release(update.generation.saturating_sub(rng.below(3) as u64));
            }
            let questions = tuples(&mut rng, &state, 100);
            let mut tally = Tally::default();
            compare(&state, &update, questions.clone(), &mut tally)
                .unwrap_or_else(|error| panic!("seed {seed} step {step}: {error}"));
            let fresh = Compiler::default().update(&state).unwrap();
            for (pod, tuple) in questions {
                let name = |update: &Update| {
                    update.decide(&pod, &tuple).map(|leaf| (leaf.verdict, update.rules.name(leaf.rule)))
                };
                assert_eq!(name(&update), name(&fresh));
            }
        }
    }
}

/// Judges by a program of one update, a class array found by number, and the address table of another.
fn mixed(program_of: &Update, arrays: &Update, table_of: &Update, pod: &PodId, tuple: &Tuple) -> Option<Leaf> {
    let set = program_of.endpoints.get(pod)?.set(tuple.direction);
    let all = arrays.endpoints.values().flat_map(|plan| [&plan.ingress, &plan.egress]).chain(&arrays.retiring);
    let array = all.into_iter().find(|candidate| candidate.id == set.id)?;
    let local = array.local(table_of.table.lookup(tuple.peer));
    Some(set.program.diagram.decide(local, tuple.protocol, tuple.port))
}

#[test]
fn between_the_steps_of_an_update_the_old_policy_stands() {
    let (mut compared, mut changed) = (0, 0);
    for seed in 0..150 {
        let mut rng = Rng::new(30_000 + seed);
        let mut compiler = Compiler::default();
        let mut state = cluster(&mut rng);
        let mut before = compiler.update(&state).unwrap();
        for step in 0..8 {
            if rng.chance(50) {
                compiler.release(before.generation);
            }
            let other = cluster(&mut rng);
            state.policies.retain(|_, _| rng.chance(60));
            state.policies.extend(other.policies.into_iter().filter(|_| rng.chance(60)));
            let after = compiler.update(&state).unwrap();
            for (pod, tuple) in tuples(&mut rng, &state, 60) {
                let old = before.decide(&pod, &tuple);
                let place = format!("seed {seed} step {step} {pod} {tuple:?}");
                assert_eq!(mixed(&before, &after, &before, &pod, &tuple), old, "arrays written: {place}");
                assert_eq!(mixed(&before, &after, &after, &pod, &tuple), old, "table written: {place}");
                compared += 1;
                changed +=
                    usize::from(after.decide(&pod, &tuple).map(|leaf| leaf.verdict) != old.map(|leaf| leaf.verdict));
            }
            before = after;
        }
    }
    assert!(compared > 50_000 && changed > 5_000, "{compared} compared, {changed} changed");
}

/// Changes a pod: its labels mostly; or it goes, or another comes that is no endpoint of a node.
fn change_a_pod(rng: &mut Rng, cluster: &mut Cluster) -> PodId {
    let names: Vec<PodId> = cluster.pods.keys().cloned().collect();
    let (id, model) = (rng.pick(&names).clone(), rng.pick(&names).clone());
    let labels = cluster.pods[&model].labels.clone();
    match rng.below(10) {
        0 if names.len() > 4 => drop(cluster.pods.remove(&id)),
        1 => {
            let fresh = IpAddr::from([10, 0, 3, rng.below(250) as u8]);
            let id = PodId::new(id.namespace, format!("new{}", rng.below(4)));
            cluster.pods.insert(id.clone(), Pod { labels, addresses: [fresh].into(), ..Pod::default() });
            return id;
        }
        _ => cluster.pods.get_mut(&id).unwrap().labels = labels,
    }
    id
}

/// Of what a compiler is told.
#[derive(Clone, Copy)]
struct Told {
    pods: bool,
    names: bool,
}

/// Sequences of changes of pods and names, of which `told` says whether the compiler hears of them: how many updates, how many of them
/// needed no full compilation, and what was compared.
fn parts_change(scope: &Scope, told: Told) -> Result<(usize, usize, Tally), String> {
    let (mut all, mut quick, mut tally) = (0, 0, Tally::default());
    for seed in 70_000..70_300 {
        let rng = &mut Rng::new(seed);
        let mut cluster = cluster(rng);
        let new = || Compiler::new(scope.clone(), Limits::default());
        let mut compiler = new();
        let mut before = compiler.update(&cluster).unwrap();
        for step in 0..10 {
            let place = format!("seed {seed} step {step}");
            let mut touched: Vec<PodId> = (0..rng.below(3)).map(|_| change_a_pod(rng, &mut cluster)).collect();
            // Now and then only names change, now and then only pods.
            let mut renamed = BTreeSet::new();
            for _ in 0..rng.below(3) {
                renamed.insert(change_a_name(rng, &mut cluster.names));
            }
            if !told.pods {
                touched.clear();
            }
            if !told.names {
                renamed.clear();
            }
            quick += usize::from(!compiler.would_compile_all(&cluster, &touched, &renamed));
            all += 1;
            let after = compiler.update_parts_within(&cluster, &touched, &renamed, |_| Ok(())).unwrap();
            let fresh = new().update(&cluster).unwrap();
            if !after.endpoints.keys().eq(fresh.endpoints.keys()) {
                return Err(format!("{place}: its endpoints are others"));
            }
            let questions: Vec<_> =
                tuples(rng, &cluster, 80).into_iter().filter(|(pod, _)| after.endpoints.contains_key(pod)).collect();
            compare(&cluster, &after, questions.clone(), &mut tally).map_err(|error| format!("{place}: {error}"))?;
            // An owner writes arrays before tables, and tables before programs: what an old program meets then, it knows. Of
            // pods that are not what they were it may judge as of somebody unknown.
            let is_same = |address: &IpAddr| before.table.lookup(*address) == after.table.lookup(*address);
            for (pod, tuple) in questions.iter().filter(|(_, tuple)| is_same(&tuple.peer)) {
                if before.endpoints.contains_key(pod) {
                    let (old, now) = (before.decide(pod, tuple), mixed(&before, &after, &after, pod, tuple));
                    assert_eq!(now, old, "{place} {pod} {tuple:?}");
                }
            }
            let changes = before.table.changes_to(&after.table);
            assert_eq!(changes, after.table_changes, "{place}");
            if rng.chance(50) {
                compiler.release(after.generation);
            }
            before = after;
        }
    }
    Ok((all, quick, tally))
}

#[test]
fn pods_and_names_that_change_get_the_evaluators_verdict_after_each_step_and_what_nobody_tells_of_is_missed() {
    let told = Told { pods: true, names: true };
    let (all, quick, tally) = parts_change(&Scope::Cluster, told).unwrap();
    println!("of all pods: {quick} of {all} updates without a full compilation");
    assert!(quick * 5 > all, "{quick} of {all} updates needed no full compilation");
    assert!(tally.pairs > 100_000 && tally.by_rule * 4 > tally.pairs, "{} of {}", tally.by_rule, tally.pairs);
    let (all, quick, tally) = parts_change(&Scope::Node("n1".to_owned()), told).unwrap();
    println!("of one node: {quick} of {all} updates without a full compilation");
    assert!(quick * 4 > all, "{quick} of {all} updates needed no full compilation");
    assert!(tally.pairs > 20_000, "{}", tally.pairs);
    for told in [Told { pods: false, ..told }, Told { names: false, ..told }] {
        assert!(parts_change(&Scope::Cluster, told).is_err(), "the comparison is blind");
    }
}

#[test]
fn lists_print_and_parse_back_and_compile_the_same_each_time() {
    let mut lists = 0;
    for seed in 40_000..40_200 {
        let cluster = cluster(&mut Rng::new(seed));
        let [one, two] = [(); 2].map(|()| Compiler::default().update(&cluster).unwrap());
        for (first, second) in one.sets().values().zip(two.sets().values()) {
            assert_eq!(first, second);
            let text = first.program.list.to_string();
            assert_eq!(text.parse::<RuleList>().unwrap(), first.program.list, "{text}");
            lists += 1;
        }
    }
    assert!(lists > 1_000, "{lists}");
}

#[test]
fn rules_that_match_nobody_change_nothing() {
    // 203.0.113.0/24 and 2001:db8:113::/48 are for documentation (RFC 5737, RFC 3849), and no question asks about them.
    let nobody = |number: u32| {
        let v4 = IpAddr::from(Ipv4Addr::from_bits(0xcb00_7100 + number % 256));
        let v6 = IpAddr::from(Ipv6Addr::from_bits((0x2001_0db8_0113 << 80) + u128::from(number)));
        let block = |address: IpAddr| Peer::Block(IpBlock { cidr: address.into(), except: Vec::new() });
        Rule {
            action: Action::Deny,
            peers: Peers::OneOf(vec![block(v4), block(v6)]),
            ports: Ports::Any,
            schedule: None,
            log: false,
        }
    };
    let mut denied_there = 0;
    for seed in 50_000..50_010 {
        let mut rng = Rng::new(seed);
        let plain = cluster(&mut rng);
        let mut padded = plain.clone();
        for policy in padded.policies.values_mut() {
            for rules in [&mut policy.ingress, &mut policy.egress].into_iter().flatten() {
                rules.splice(0..0, (0..1_000).map(nobody));
            }
        }
        let [one, two] = [&plain, &padded].map(|cluster| Compiler::default().update(cluster).unwrap());
        // The twin: somebody there would be denied.
        let there =
            Tuple { direction: Direction::Egress, peer: [203, 0, 113, 7].into(), protocol: Protocol::TCP, port: 1 };
        let verdicts = |update: &Update| {
            let all = plain.pods.keys().filter_map(|pod| update.decide(pod, &there)).map(|leaf| leaf.verdict);
            all.filter(|verdict| *verdict == Verdict::Deny).count()
        };
        denied_there += verdicts(&two).saturating_sub(verdicts(&one));
        for (pod, tuple) in tuples(&mut rng, &plain, 500) {
            let verdict = |update: &Update| update.decide(&pod, &tuple).map(|leaf| leaf.verdict);
            assert_eq!(verdict(&one), verdict(&two));
        }
    }
    assert!(denied_there > 0, "the rules are in the lists");
}

#[test]
fn a_rule_that_passes_everything_takes_out_what_is_behind_it_in_its_tier_and_nothing_else() {
    let pass = Rule { action: Action::Pass, peers: Peers::Any, ports: Ports::Any, schedule: None, log: false };
    let everybody =
        PodMatch { namespaces: NamespaceMatch::Selected(LabelSelector::default()), pods: LabelSelector::default() };
    let pass_all = |tier, priority| Policy {
        id: PolicyId::cluster(tier, "pass-all"),
        priority,
        mode: Mode::Enforce,
        subject: everybody.clone(),
        ingress: Some(vec![pass.clone()]),
        egress: Some(vec![pass.clone()]),
    };
    let (mut compared, mut changed) = (0, 0);
    for seed in 60_000..60_200 {
        let mut rng = Rng::new(seed);
        let plain = cluster(&mut rng);
        let questions = tuples(&mut rng, &plain, 200);
        let verdicts = |cluster: &_| -> Vec<Option<Verdict>> {
            let update = Compiler::default().update(cluster).unwrap();
            questions.iter().map(|(pod, tuple)| update.decide(pod, tuple).map(|leaf| leaf.verdict)).collect()
        };
        let before = verdicts(&plain);
        for tier in [Tier::Admin, Tier::Baseline] {
            let (mut first, mut last, mut without) = (plain.clone(), plain.clone(), plain.clone());
            // The generator's begin at 0.
            for policy in first.policies.values_mut() {
                policy.priority += 1;
            }
            first.insert_policy(pass_all(tier.clone(), 0));
            last.insert_policy(pass_all(tier.clone(), 1000));
            without.policies.retain(|id, _| id.tier != tier);
            assert_eq!(verdicts(&last), before, "seed {seed}, last in {tier}");
            let alone = verdicts(&without);
            changed += before.iter().zip(&alone).filter(|(one, other)| one != other).count();
            compared += alone.len();
            assert_eq!(verdicts(&first), alone, "seed {seed}, first in {tier}");
        }
    }
    assert!(compared >= 70_000 && changed * 25 > compared, "{changed} of {compared} verdicts are of these tiers");
}
