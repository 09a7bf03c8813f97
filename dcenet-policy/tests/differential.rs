//! The evaluator and the compiled form agree, and the comparison notices when they do not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dcenet_policy::Compiler;
use dcenet_policy::model::Direction;
use dcenet_policy::test_support::{
    PlantedBug, Rng, Tally, addresses, boundary_tuples, cluster, compare, compare_random,
};

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
        let cluster = cluster(&mut Rng::new(seed));
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
    for bug in [PlantedBug::EndPortExclusive, PlantedBug::ExceptIgnored] {
        let caught = compare_random(0..200, 500, || Compiler::default().with_planted_bug(bug));
        let message = caught.expect_err("a wrong compiler must not pass").to_string();
        assert!(message.contains("the evaluator says"), "{message}");
    }
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
            let questions = dcenet_policy::test_support::tuples(&mut rng, &state, 100);
            let mut tally = Tally::default();
            compare(&state, &update, questions.clone(), &mut tally)
                .unwrap_or_else(|error| panic!("seed {seed} step {step}: {error}"));
            let fresh = Compiler::default().update(&state).unwrap();
            for (pod, tuple) in questions {
                let name = |update: &dcenet_policy::Update| {
                    update.decide(&pod, &tuple).map(|leaf| (leaf.verdict, update.rules.name(leaf.rule)))
                };
                assert_eq!(name(&update), name(&fresh));
            }
        }
    }
}
