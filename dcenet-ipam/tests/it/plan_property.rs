//! Random claims, returns and moves against a list that is searched from end to end.

use std::sync::Arc;

use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::plan::{Advice, Claim, Level, Plan, PlanError, Prefix};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use ipnet::IpNet;
use pollster::block_on;
use proptest::prelude::*;

use crate::plan::{net, overlaps, stored};

#[derive(Debug, Clone)]
enum Action {
    At { length: u8, place: u8, level: Level },
    Within { length: u8, parent: u8, level: Level },
    Release { which: u8 },
    Move { length: u8 },
}

fn level() -> impl Strategy<Value = Level> {
    prop_oneof![Just(Level::Region), Just(Level::Cluster), Just(Level::Pool)]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (0..=5_u8, 0..32_u8, level()).prop_map(|(length, place, level)| Action::At { length, place, level }),
        4 => (0..=5_u8, any::<u8>(), level()).prop_map(|(length, parent, level)| Action::Within { length, parent, level }),
        4 => any::<u8>().prop_map(|which| Action::Release { which }),
        1 => (0..=5_u8).prop_map(|length| Action::Move { length }),
    ]
}

/// First and last address.
fn ends(cidr: &IpNet) -> (u128, u128) {
    let number = |ip| match ip {
        std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
        std::net::IpAddr::V6(ip) => u128::from(ip),
    };
    (number(cidr.network()), number(cidr.broadcast()))
}

fn share(a: &IpNet, b: &IpNet) -> bool {
    let ((a_first, a_last), (b_first, b_last)) = (ends(a), ends(b));
    a_first <= b_last && b_first <= a_last
}

fn holds(a: &IpNet, b: &IpNet) -> bool {
    let ((a_first, a_last), (b_first, b_last)) = (ends(a), ends(b));
    a_first <= b_first && b_last <= a_last
}

/// What is held; the first is the top.
struct Model(Vec<(IpNet, Level)>);

impl Model {
    /// The smallest around, the deepest of equals.
    fn around(&self, cidr: &IpNet, below: Option<Level>) -> Option<(IpNet, Level)> {
        self.0
            .iter()
            .filter(|(c, l)| holds(c, cidr) && below.is_none_or(|b| *l < b))
            .max_by_key(|(c, l)| (c.prefix_len(), *l))
            .copied()
    }

    /// Whether a claim of exactly this may be.
    fn fits(&self, cidr: &IpNet, level: Level) -> bool {
        let around = self.around(cidr, None);
        let below = around.is_some_and(|(_, l)| l < level);
        below && self.0.iter().all(|held| Some(*held) == around || !share(&held.0, cidr) || holds(&held.0, cidr))
    }

    fn free(&self, parent: &(IpNet, Level), cidr: &IpNet) -> bool {
        holds(&parent.0, cidr)
            && self
                .0
                .iter()
                .all(|held| !share(&held.0, cidr) || held == parent || (holds(&held.0, &parent.0) && held.1 < parent.1))
    }

    /// The lowest place of the length in the smallest free block, by looking at all.
    fn best(&self, parent: &(IpNet, Level), length: u8) -> Option<IpNet> {
        for wide in (parent.0.prefix_len()..=length).rev() {
            // The smallest free block: nothing wider around it is free.
            let mut blocks = parent.0.subnets(wide).unwrap();
            let found = blocks.find(|b| {
                self.free(parent, b)
                    && (wide == parent.0.prefix_len()
                        || !self.free(parent, &IpNet::new(b.network(), wide - 1).unwrap().trunc()))
            });
            if let Some(block) = found {
                return block.subnets(length).unwrap().next();
            }
        }
        None
    }

    fn leaf(&self, of: &(IpNet, Level)) -> bool {
        self.0.iter().all(|held| held == of || !holds(&of.0, &held.0) || (held.0 == of.0 && held.1 < of.1))
    }
}

fn run(top: IpNet, actions: Vec<Action>) {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let plan = Plan::new(store.clone(), "fleet").unwrap();
    let space = AddressSpace::default();
    block_on(plan.add_space(&space, &[])).unwrap();
    block_on(plan.own(&Claim::at(top, Level::Fleet, "top", "net"))).unwrap();
    let mut model = Model(vec![(top, Level::Fleet)]);
    let mut held: Vec<Prefix> = Vec::new();
    let room = top.max_prefix_len() - top.prefix_len();
    let mut names = 0;
    let mut name = || {
        names += 1;
        format!("n{names}")
    };
    for action in actions {
        match action {
            Action::At { length, place, level } => {
                let length = top.prefix_len() + length.min(room);
                let Some(cidr) =
                    top.subnets(length).unwrap().nth(usize::from(place) % (1 << (length - top.prefix_len())))
                else {
                    continue;
                };
                let got = block_on(plan.claim(&Claim::at(cidr, level, &name(), "x")));
                assert_eq!(got.is_ok(), model.fits(&cidr, level), "{cidr} {level}: {got:?} in {:?}", model.0);
                match got {
                    Ok(prefix) => {
                        assert_eq!(prefix.cidr, cidr);
                        held.push(prefix);
                        model.0.push((cidr, level));
                    }
                    Err(error) => {
                        let holder = error.holder().unwrap_or_else(|| panic!("{error}"));
                        assert!(share(&holder.cidr, &cidr), "{error}");
                        assert!(model.0.contains(&(holder.cidr, holder.level)), "{error}");
                    }
                }
            }
            Action::Within { length, parent, level } => {
                let parent = model.0[usize::from(parent) % model.0.len()];
                // A claim names the prefix; of equal ones the deepest below its own level holds it.
                let Some(parent) = model.around(&parent.0, Some(level)).filter(|(c, _)| *c == parent.0) else {
                    continue;
                };
                let length = (parent.0.prefix_len() + length).min(parent.0.max_prefix_len());
                let got = block_on(plan.claim(&Claim::within(parent.0, length, level, &name(), "x")));
                let best = model.best(&parent, length);
                match got {
                    Ok(prefix) => {
                        assert_eq!(Some(prefix.cidr), best, "in {parent:?} of {:?}", model.0);
                        model.0.push((prefix.cidr, level));
                        held.push(prefix);
                    }
                    Err(PlanError::Exhausted { .. }) => assert_eq!(best, None, "in {parent:?} of {:?}", model.0),
                    Err(error) => panic!("{error}"),
                }
            }
            Action::Release { which } => {
                if held.is_empty() {
                    continue;
                }
                let which = usize::from(which) % held.len();
                let key = (held[which].cidr, held[which].level);
                match block_on(plan.release(&held[which])) {
                    Ok(was) => {
                        assert!(was && model.leaf(&key), "{key:?} of {:?}", model.0);
                        held.swap_remove(which);
                        model.0.retain(|h| *h != key);
                    }
                    Err(PlanError::NotEmpty { .. }) => assert!(!model.leaf(&key), "{key:?} of {:?}", model.0),
                    Err(error) => panic!("{error}"),
                }
            }
            Action::Move { length } => {
                let length = top.prefix_len() + length.min(room);
                let fleet = (top, Level::Fleet);
                match block_on(plan.advise(&space, top, Level::Fleet, length)).unwrap() {
                    Advice::Free(cidr) => assert_eq!(Some(cidr), model.best(&fleet, length)),
                    Advice::Moves { moves, then } => {
                        assert_eq!(model.best(&fleet, length), None);
                        // Nothing of a subtree can be moved without what is in it.
                        if moves.iter().any(|m| !model.leaf(&(m.prefix.cidr, m.prefix.level))) {
                            continue;
                        }
                        for step in &moves {
                            let (level, old) = (step.prefix.level, (step.prefix.cidr, step.prefix.level));
                            let new = block_on(plan.claim(&Claim::at(step.to, level, &name(), "x"))).unwrap();
                            assert!(model.free(&fleet, &step.to), "{step:?} of {:?}", model.0);
                            model.0.push((step.to, level));
                            held.push(new);
                            assert!(block_on(plan.release(&step.prefix)).unwrap());
                            model.0.retain(|h| *h != old);
                            held.retain(|h| (h.cidr, h.level) != old);
                        }
                        assert!(model.free(&fleet, &then), "{then} of {:?}", model.0);
                    }
                    Advice::Grow { .. } => panic!("there is nothing around the top"),
                    Advice::Overflow { .. } => assert_eq!(model.best(&fleet, length), None),
                }
            }
        }
        let mut known: Vec<(IpNet, Level)> =
            block_on(plan.tree(&space)).unwrap().rows.iter().map(|r| (r.prefix.cidr, r.prefix.level)).collect();
        let mut expected = model.0.clone();
        known.sort();
        expected.sort();
        assert_eq!(known, expected);
    }
    // Whoever begins anew reads the same, and nothing overlaps.
    let fresh = Plan::new(store.clone(), "fleet").unwrap();
    assert_eq!(block_on(fresh.tree(&space)).unwrap(), block_on(plan.tree(&space)).unwrap());
    let all = stored(&store, "default");
    assert_eq!((all.len(), overlaps(&all)), (model.0.len(), 0));
}

const TOPS: [&str; 9] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/27",
    "255.255.255.254/31",
    "255.255.255.255/32",
    "8000::/1",
    "fd00:20::/64",
    "fd00::6/127",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_claims_agrees_with_a_list(top in prop::sample::select(&TOPS[..]), actions in prop::collection::vec(action(), 1..50)) {
        run(net(top), actions);
    }
}

#[test]
fn all_of_ipv6_is_planned_without_the_mapped_addresses() {
    let plan = Plan::new(Arc::new(MemoryStore::new()), "fleet").unwrap();
    let space = AddressSpace::default();
    block_on(plan.add_space(&space, &[])).unwrap();
    block_on(plan.own(&Claim::at(net("::/0"), Level::Fleet, "all", "net"))).unwrap();
    let mapped = net("::ffff:0:0/96");
    let claim = |length: u8, name: &str| {
        block_on(plan.claim(&Claim::within(net("::/0"), length, Level::Region, name, "x"))).map(|p| p.cidr)
    };
    // The smallest free block is the one beside the mapped addresses; they themselves are never given.
    assert_eq!(claim(96, "a").unwrap(), net("::fffe:0:0/96"));
    assert_eq!(claim(1, "b").unwrap(), net("8000::/1"));
    for length in [2, 64, 80, 95, 96, 97, 127, 128] {
        let cidr = claim(length, &format!("c{length}")).unwrap();
        assert!(!cidr.contains(&mapped) && !mapped.contains(&cidr), "{cidr}");
    }
    let refused = claim(1, "d").unwrap_err();
    assert!(matches!(refused, PlanError::Exhausted { largest: Some(3), .. }), "{refused}");
    let exact = Claim::at(net("::ffff:10.0.0.0/120"), Level::Region, "e", "x");
    assert!(matches!(block_on(plan.claim(&exact)).unwrap_err(), PlanError::Invalid { .. }));
    let used = block_on(plan.utilisation(&space, net("::/0"), Level::Fleet)).unwrap().unwrap();
    assert!(used.percent() >= 75.0 && used.percent() < 75.1, "{}", used.percent());
}
