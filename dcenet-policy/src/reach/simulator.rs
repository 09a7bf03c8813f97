//! Whole programs on packets: compiler, target and the VM of dcenet-ebpf, without a kernel.

use std::collections::HashMap;
use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_ebpf::abi::{self, Endpoint, Event, Sizes};
use dcenet_ebpf::datapath::classes::{ClassError, Classes, Write};
use dcenet_ebpf::datapath::{FROM_POD, TO_POD};
use dcenet_ebpf::test_support::packet::{Packet, SYN, eth};
use dcenet_ebpf::vm::{Environment, Maps, Skb, Update as Mode, Vm};
use ipnet::IpNet;

use super::{Engine, ReachError};
use crate::compiler::{Compiler, Decider, EndpointPlan, PolicySet, SetId, Update};
use crate::eval::{Decision, Reason};
use crate::ir::RuleId;
use crate::model::{Catalog, Cluster, Direction, PodId, PolicyId, Protocol, Tier, TierEnd, Tuple, Verdict};
use crate::target::{Artefact, Cache, Target, Tc};

/// Compiles a cluster as an owner of a node's policy state does, and runs the programs that would be attached: from the
/// Ethernet header over conntrack, class tables and diagram to the event that tells what decided.
///
/// Each question meets an empty conntrack table.
#[derive(Debug)]
pub struct Simulator {
    update: Update,
    catalog: Catalog,
    cache: Cache<Tc>,
    classes: Vec<Write>,
    /// By what differs between endpoints: their policy sets.
    running: HashMap<[SetId; 2], Running>,
}

#[derive(Debug)]
struct Running {
    /// In the order of [`Direction::ALL`].
    programs: [Vm; 2],
    maps: Maps,
}

impl Simulator {
    /// Compiles a cluster.
    ///
    /// # Errors
    ///
    /// [`ReachError::Compile`] where anything would not be enforced as it is written.
    pub fn new(cluster: &Cluster) -> Result<Self, ReachError> {
        Self::compiled_by(&mut Compiler::default(), cluster)
    }

    /// As [`Simulator::new`], by a compiler with other limits or a history.
    ///
    /// # Errors
    ///
    /// As [`Simulator::new`].
    pub fn compiled_by(compiler: &mut Compiler, cluster: &Cluster) -> Result<Self, ReachError> {
        let update = compiler.update(cluster).map_err(compile)?;
        if let Some(fault) = update.faults.first() {
            return Err(compile(fault.clone()));
        }
        let last_rule = update.rules.iter().map(|(id, _)| id.0).max().unwrap_or(0).max(RuleId::FIRST.0);
        let classes = update.endpoints.values().flat_map(|plan| [&plan.ingress, &plan.egress]);
        let classes = classes.map(|set| set.locals.last().map_or(0, |last| last as usize + 1)).max().unwrap_or(0);
        let sizes = Sizes {
            endpoints: 1,
            blocks_v4: 64,
            members_v6: 64,
            blocks_v6: 64,
            classes: u32::try_from(classes).map_err(compile)?.max(4).next_multiple_of(4),
            conntrack: 16,
            fragments: 16,
            rules: last_rule + 1,
            event_bytes: 4096,
            ..Sizes::default()
        };
        let (sizes, classes) = tables(&update, sizes)?;
        let mut target = Tc::new(sizes);
        target.denied_events = u32::MAX;
        target.flow_events = u32::MAX;
        Ok(Self {
            update,
            catalog: cluster.catalog.clone(),
            cache: Cache::new(target),
            classes,
            running: HashMap::new(),
        })
    }

    fn running(&mut self, plan: &EndpointPlan) -> Result<&mut Running, ReachError> {
        let key = [plan.ingress.id, plan.egress.id];
        if !self.running.contains_key(&key) {
            let artefact = self.cache.get(plan).map_err(compile)?;
            let started = start(&artefact, plan, &self.classes, self.cache.target().sizes.classes)?;
            // Each holds tables of its own.
            if self.running.len() >= MOST_RUNNING {
                self.running.clear();
            }
            self.running.insert(key, started);
        }
        self.running.get_mut(&key).ok_or_else(|| compile("the programs did not start"))
    }
}

impl Engine for Simulator {
    fn name(&self) -> &'static str {
        "vm"
    }

    fn judge(&mut self, subject: &PodId, own: IpAddr, tuple: &Tuple) -> Result<Decision, ReachError> {
        let Some(plan) = self.update.endpoints.get(subject).cloned() else {
            // The compiler plans for every pod with a network of its own.
            return Ok(Decision { verdict: Verdict::Allow, reason: Reason::HostNetwork });
        };
        let defect = |what: String| ReachError::Defect { subject: subject.clone(), tuple: *tuple, what };
        let codes = self.cache.target().codes();
        let event = self.running(&plan)?.run(own, tuple).map_err(&defect)?;
        let verdict = match event.value.cast_signed() {
            value if value == codes.pass => Verdict::Allow,
            value if value == codes.drop => Verdict::Deny,
            value => return Err(defect(format!("the program returned {value}"))),
        };
        let due = match verdict {
            Verdict::Allow => abi::Reason::Allowed,
            Verdict::Deny => abi::Reason::Denied,
        };
        match abi::Reason::from_number(event.reason) {
            Some(reason) if reason == due => {}
            Some(reason) => return Err(defect(format!("{verdict}, told as {}", reason.name()))),
            None => return Err(defect(format!("{verdict}, told as reason {}", event.reason))),
        }
        let governing = || plan.set(tuple.direction).policies.to_vec();
        let isolating = || governing().into_iter().filter(|id| id.tier == Tier::NetworkPolicy).collect();
        let rule = match self.update.rules.decider(RuleId(event.rule)) {
            Decider::Fixed(id) => id,
            Decider::Rule(rule) => return Ok(Decision { verdict, reason: Reason::Rule(rule) }),
        };
        let reason = match rule {
            RuleId::NOT_GOVERNED => Reason::NotGoverned,
            RuleId::OWN_NODE => Reason::OwnNode,
            RuleId::ISOLATED => Reason::Isolated(isolating()),
            RuleId::TIER_END => {
                let end = |id: &PolicyId| self.catalog.tier(&id.tier).map(|spec| spec.end);
                let is_named = |id: &PolicyId| id.tier != Tier::NetworkPolicy;
                let of = |wanted| -> Vec<PolicyId> {
                    governing().into_iter().filter(|id| is_named(id) && end(id) == wanted).collect()
                };
                let unknown = of(None);
                match unknown.is_empty() {
                    true => Reason::TierEnd(of(Some(TierEnd::Deny))),
                    false => Reason::UnknownTier(unknown),
                }
            }
            RuleId::UNMATCHED => Reason::Unmatched(governing()),
            RuleId::REFUSED => Reason::Refused(governing()),
            id => return Err(defect(format!("told as rule {}, which there is not", id.0))),
        };
        Ok(Decision { verdict, reason })
    }
}

/// What a run came to.
struct Told {
    value: u32,
    reason: u8,
    rule: u32,
}

impl Running {
    fn run(&mut self, own: IpAddr, tuple: &Tuple) -> Result<Told, String> {
        let endpoint = match own {
            IpAddr::V4(own) => Endpoint::new(Some(own), None, None),
            IpAddr::V6(own) => Endpoint::new(None, Some(own), None),
        };
        store(&mut self.maps, abi::ENDPOINTS, &0_u32.to_ne_bytes(), &endpoint.encode())?;
        let (place, packet) = match tuple.direction {
            Direction::Ingress => (0, packet(tuple.peer, own, tuple)?),
            Direction::Egress => (1, packet(own, tuple.peer, tuple)?),
        };
        let mut skb = Skb::new(packet.bytes());
        let run = self.programs[place].run(&mut skb, &mut self.maps, &mut Environment::default());
        let value = run.map_err(|trap| trap.to_string())?.value;
        let events = self.maps.get_mut(abi::EVENTS).ok_or("there is no map of events")?.drain();
        let [event] = &events[..] else {
            return Err(format!("the program told {} events for one packet", events.len()));
        };
        let event = Event::decode(event).ok_or_else(|| format!("an event of {} bytes", event.len()))?;
        for table in abi::FLOW_TABLES {
            let flows = self.maps.get_mut(table).ok_or("there is no map of flows")?;
            let keys: Vec<Vec<u8>> = flows.entries().map(|(key, _)| key.to_vec()).collect();
            for key in keys {
                flows.delete(&key).map_err(|error| error.to_string())?;
            }
        }
        Ok(Told { value, reason: event.reason, rule: event.rule })
    }
}

fn packet(source: IpAddr, destination: IpAddr, tuple: &Tuple) -> Result<Packet, String> {
    let packet = eth().ip(source, destination);
    Ok(match tuple.protocol {
        Protocol::TCP => packet.tcp(EPHEMERAL_PORT, tuple.port, SYN),
        Protocol::UDP => packet.udp(EPHEMERAL_PORT, tuple.port),
        Protocol::SCTP => packet.sctp(EPHEMERAL_PORT, tuple.port),
        Protocol::ICMP | Protocol::ICMPV6 => packet.icmp((tuple.port >> 8) as u8, tuple.port as u8, [0, 1, 0, 1]),
        other => return Err(format!("no packets of protocol {other} are made here")),
    })
}

/// What the class tables hold, and sizes that have room for it.
fn tables(update: &Update, mut sizes: Sizes) -> Result<(Sizes, Vec<Write>), ReachError> {
    let (exact, prefixes) = (update.table.exact(), update.table.prefixes());
    // Of a single address and a prefix that holds nothing else, the address counts.
    let covered = |prefix: &IpNet| prefix.prefix_len() == prefix.max_prefix_len() && exact.contains_key(&prefix.addr());
    let blocks = prefixes.iter().filter(|(prefix, _)| !covered(prefix)).map(|(prefix, class)| (*prefix, Some(class.0)));
    let singles = exact.iter().map(|(address, class)| (IpNet::from(*address), Some(class.0)));
    let all: Vec<_> = blocks.chain(singles).collect();
    loop {
        let full = match Classes::new(&sizes).apply(&all) {
            Ok(writes) => return Ok((sizes, writes)),
            Err(ClassError::Full { map, .. }) => map,
            Err(error) => return Err(compile(error)),
        };
        let size = match full {
            abi::CLASS_V4 => &mut sizes.blocks_v4,
            abi::MEMBERS_V6 => &mut sizes.members_v6,
            _ => &mut sizes.blocks_v6,
        };
        if *size >= MOST_BLOCKS {
            return Err(compile(format!("map {full} has no room for the cluster's addresses in {size} blocks")));
        }
        *size *= 2;
    }
}

fn start(artefact: &Artefact, plan: &EndpointPlan, classes: &[Write], room: u32) -> Result<Running, ReachError> {
    let object = &artefact.object;
    let mut maps = Maps::new(object.maps());
    for write in classes {
        store(&mut maps, write.map(), &write.index().to_ne_bytes(), &write.value()).map_err(compile)?;
    }
    for (map, set) in [(abi::LOCAL_IDS_INGRESS, &plan.ingress), (abi::LOCAL_IDS_EGRESS, &plan.egress)] {
        for index in 0..room / 4 {
            store(&mut maps, map, &index.to_ne_bytes(), &four_locals(set, index)).map_err(compile)?;
        }
    }
    for content in &artefact.contents {
        for (index, value) in content.values() {
            store(&mut maps, &content.map, &index.to_ne_bytes(), value).map_err(compile)?;
        }
    }
    let program = |name: &str| {
        let linked = object.link(name).map_err(compile)?;
        Vm::new(&linked).map_err(compile)
    };
    Ok(Running { programs: [program(TO_POD)?, program(FROM_POD)?], maps })
}

/// One value of the array from classes to local ids.
fn four_locals(set: &Arc<PolicySet>, index: u32) -> Vec<u8> {
    (0..4).flat_map(|low| set.locals.get(index * 4 + low).to_ne_bytes()).collect()
}

fn store(maps: &mut Maps, map: &str, key: &[u8], value: &[u8]) -> Result<(), String> {
    let found = maps.get_mut(map).ok_or_else(|| format!("the programs have no map {map:?}"))?;
    found.update(key, value, Mode::Any).map_err(|error| format!("map {map:?}: {error}"))
}

fn compile(error: impl Into<Box<dyn Error + Send + Sync>>) -> ReachError {
    ReachError::Compile(error.into())
}

const EPHEMERAL_PORT: u16 = 40_000;

/// Policy sets that are ready to run at a time, each with 256 KiB of tables and more.
const MOST_RUNNING: usize = 64;

const MOST_BLOCKS: u32 = 1 << 20;
