//! The choice against every possible one.

use std::collections::BTreeMap;

use dcenet_sriov::allocate::{CandidatePort, Candidates, Near, Refusal, Request, Shape};
use dcenet_sriov::{Location, PciAddress};
use proptest::prelude::*;

fn at(numa: Option<u32>, bridges: &[&str]) -> Location {
    Location { numa, bridges: bridges.iter().map(|name| name.to_string()).collect() }
}

fn address(bus: u8, function: u16) -> PciAddress {
    PciAddress::new(0, bus, (function >> 3) as u8, function as u8 & 7).unwrap()
}

fn port(bus: u8, location: Location, in_use: u32, functions: std::ops::Range<u16>) -> CandidatePort {
    CandidatePort { address: address(bus, 0), location, in_use, free: functions.map(|f| address(bus, f)).collect() }
}

/// How good a choice is, written down as the module's first paragraph says it, and nothing more clever.
fn badness(candidates: &Candidates, request: &Request, choice: &[PciAddress]) -> Option<(u64, u64, Vec<PciAddress>)> {
    let mut taken: BTreeMap<PciAddress, u64> = BTreeMap::new();
    let mut cost = 0;
    for function in choice {
        let port = candidates.ports.iter().find(|port| port.free.contains(function)).unwrap();
        if request.numa.is_some() && port.location.numa != request.numa {
            return None;
        }
        *taken.entry(port.address).or_default() += 1;
        for near in &request.near {
            let (ours, theirs) = (&port.location.bridges, &near.location.bridges);
            let mut shared = 0;
            while shared < ours.len() && shared < theirs.len() && ours[shared] == theirs[shared] {
                shared += 1;
            }
            let step = 1_048_576;
            cost += match (port.location.numa, near.location.numa) {
                _ if shared > 0 => (ours.len() - shared + theirs.len() - shared) as u64,
                (Some(a), Some(b)) if a == b => step,
                (Some(_), Some(_)) => 3 * step,
                _ => 2 * step,
            };
        }
    }
    let squares = || {
        let after = |p: &CandidatePort| u64::from(p.in_use) + taken.get(&p.address).copied().unwrap_or(0);
        candidates.ports.iter().map(|port| after(port) * after(port)).sum()
    };
    let shape = match request.shape {
        Shape::Pack => taken.len() as u64,
        Shape::Distinct if taken.values().any(|count| *count > 1) => return None,
        Shape::Spread | Shape::Distinct => squares(),
        _ => 0,
    };
    let mut list = choice.to_vec();
    list.sort();
    Some((cost, shape, list))
}

fn every_choice(from: &[PciAddress], count: usize) -> Vec<Vec<PciAddress>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let Some((first, rest)) = from.split_first() else { return Vec::new() };
    let mut with: Vec<Vec<PciAddress>> = every_choice(rest, count - 1);
    with.iter_mut().for_each(|choice| choice.push(*first));
    with.extend(every_choice(rest, count));
    with
}

fn location() -> impl Strategy<Value = Location> {
    let numa = prop::sample::select(vec![None, Some(0), Some(1)]);
    let bridges = prop::sample::select(vec![
        vec!["pci0000:00"],
        vec!["pci0000:00", "0000:00:01.0"],
        vec!["pci0000:00", "0000:00:02.0"],
        vec!["pci0000:00", "0000:00:02.0", "0000:07:00.0"],
        vec!["pci0000:80", "0000:80:01.0"],
    ]);
    (numa, bridges).prop_map(|(numa, bridges)| at(numa, &bridges))
}

fn topology() -> impl Strategy<Value = (Candidates, Request)> {
    // Functions of all ports interleave, as those of the two ports of one adapter do.
    let functions = prop::collection::vec((0..4usize, 0..64u16), 0..10);
    let ports = prop::collection::vec((location(), 0..4u32), 4);
    let near = prop::collection::vec(location(), 0..3);
    let shapes = vec![Shape::Lowest, Shape::Pack, Shape::Spread, Shape::Distinct];
    let numa = prop::option::weighted(0.2, 0..2u32);
    (functions, ports, near, prop::sample::select(shapes), numa, 0..6usize).prop_map(
        |(functions, ports, near, shape, numa, count)| {
            let mut all: Vec<CandidatePort> = Vec::new();
            for (number, (location, in_use)) in ports.into_iter().enumerate() {
                let address = address(number as u8 + 1, 0);
                all.push(CandidatePort { address, location, in_use, free: Vec::new() });
            }
            let mut seen = std::collections::BTreeSet::new();
            for (number, function) in functions {
                if seen.insert(function) {
                    all[number].free.push(address(9, function));
                }
            }
            let near = near.into_iter().map(|location| Near { name: "gpu".into(), location }).collect();
            (Candidates { ports: all }, Request { count, near, numa, shape })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]
    #[test]
    fn the_choice_is_the_best_of_all((candidates, request) in topology()) {
        let all: Vec<PciAddress> = candidates.ports.iter().flat_map(|port| port.free.clone()).collect();
        let best = every_choice(&all, request.count)
            .iter()
            .filter_map(|choice| badness(&candidates, &request, choice))
            .min();
        match (best, candidates.choose(&request)) {
            (None, Err(_)) => {}
            (Some(best), Ok(choice)) => {
                prop_assert_eq!(badness(&candidates, &request, &choice.functions), Some(best));
                let taken: usize = choice.shares.iter().map(|share| share.taken).sum();
                prop_assert_eq!(taken, request.count);
            }
            (best, choice) => prop_assert!(false, "best {:?}, chosen {:?}", best, choice),
        }
    }
}

#[test]
fn a_function_below_the_switch_of_the_gpu_comes_first_and_the_choice_says_why() {
    let gpu = at(Some(0), &["pci0000:00", "0000:00:02.0", "0000:07:00.0"]);
    let candidates = Candidates {
        ports: vec![
            port(1, at(Some(0), &["pci0000:00", "0000:00:01.0"]), 0, 8..12),
            port(8, at(Some(0), &["pci0000:00", "0000:00:02.0"]), 3, 8..10),
            port(9, at(Some(1), &["pci0000:80"]), 0, 8..12),
        ],
    };
    let near = vec![Near { name: "0000:0a:00.0".into(), location: gpu }];
    let choice = candidates.choose(&Request { near, ..Request::of(3) }).unwrap();
    assert_eq!(choice.functions, [address(1, 8), address(8, 8), address(8, 9)]);
    let told: Vec<String> = choice.shares.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "port 0000:08:00.0: 2 of 2 free functions, 3 in use before; 0000:0a:00.0 is 1 bridges apart",
            "port 0000:01:00.0: 1 of 4 free functions, 0 in use before; 0000:0a:00.0 is 3 bridges apart",
            "port 0000:09:00.0: 0 of 4 free functions, 0 in use before; 0000:0a:00.0 is on another NUMA node",
        ]
    );
}

#[test]
fn the_halves_of_a_bond_are_on_different_ports() {
    let root = || at(None, &["pci0000:00"]);
    let candidates =
        Candidates { ports: vec![port(1, root(), 5, 8..12), port(2, root(), 0, 8..12), port(3, root(), 1, 8..12)] };
    let pair = |shape| candidates.choose(&Request { shape, ..Request::of(2) }).unwrap().functions;
    assert_eq!(pair(Shape::Distinct), [address(2, 8), address(3, 8)]);
    assert_eq!(pair(Shape::Pack), [address(1, 8), address(1, 9)]);
    let four = Request { shape: Shape::Distinct, ..Request::of(4) };
    assert_eq!(candidates.choose(&four).unwrap_err(), Refusal::TooFewPorts { wanted: 4, ports: 3 });
    assert_eq!(candidates.choose(&Request::of(13)).unwrap_err(), Refusal::TooFew { wanted: 13, free: 12 });
    let on_node = Request { numa: Some(1), ..Request::of(1) };
    let told = Refusal::TooFewOnNode { wanted: 1, there: 0, free: 12, node: 1 };
    assert_eq!(candidates.choose(&on_node).unwrap_err(), told);
}
