//! What the demo does, and what is expected of it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dcenet_core::engine::{AttachRequest, Engine};
use dcenet_core::link::LinkConfig;
use dcenet_core::model::AttachmentKey;
use dcenet_core::netns::{Host, NetNs, Pod as EnginePod};
use dcenet_core::provider::{Dns, Lease, LeasedAddress, LeasedRoute};
use dcenet_core::test_support::HostState;
use dcenet_ebpf::datapath::{FROM_POD, TO_POD};
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::flows::{Flow, FlowEnd, FlowKind};
use dcenet_policy::model::Direction;
use serde_json::{Value, json};

use crate::matrix::{self, Party, Row};
use crate::owner::{self, Owner};
use crate::plugin::{Container, Plugin};
use crate::report::Report;
use crate::stage::{self, Pod, Stage};
use crate::stream::Stream;
use crate::traffic::Server;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The underlay addresses that the firewalls of the enterprise know as the database's.
const DB_ADDRESSES: &str = "10.30.0.5/28, 2001:db8:30::5/64";

/// Somebody outside the cluster.
const OUTSIDE: [&str; 2] = ["192.0.2.10", "2001:db8:ff::10"];

/// The host's own addresses in the pods' subnets.
const NODE: [&str; 4] = ["10.20.0.1", "2001:db8:20::1", "10.30.0.1", "2001:db8:30::1"];

const NOTHING: [bool; 3] = [false; 3];

/// What our programs are called; those of others come and go without us.
const PROGRAMS: [&str; 2] = [FROM_POD, TO_POD];

/// Who may reach whom by policies/shop.yaml, written by hand from its text: TCP to port 8080, UDP to port 8080, ICMP echo.
mod expectations {
    use super::{NOTHING, Row};

    const ALL: [bool; 3] = [true; 3];
    const TCP: [bool; 3] = [true, false, false];

    pub(super) const POLICY: &[Row] = &[
        ("shop/web", "shop/db", TCP),
        ("shop/web", "ops/scan", NOTHING),
        ("shop/web", "outside", ALL),
        ("shop/db", "shop/web", NOTHING),
        ("shop/db", "ops/scan", NOTHING),
        ("shop/db", "outside", NOTHING),
        ("ops/scan", "shop/web", ALL),
        ("ops/scan", "shop/db", NOTHING),
        ("ops/scan", "outside", ALL),
        ("outside", "shop/web", TCP),
        ("outside", "shop/db", NOTHING),
        ("outside", "ops/scan", NOTHING),
        // Between a pod and its own node all passes.
        ("host", "shop/web", ALL),
        ("host", "shop/db", ALL),
        ("host", "ops/scan", ALL),
        ("shop/web", "host", ALL),
        ("shop/db", "host", ALL),
        ("ops/scan", "host", ALL),
    ];
}

/// A pod of the demo.
struct Member {
    party: &'static str,
    namespace: &'static str,
    name: &'static str,
    pod: Pod,
    generation: u32,
}

impl Member {
    fn container(&self) -> Container<'_> {
        Container {
            id: format!("{}-{}-{}", self.namespace, self.name, self.generation),
            netns: &self.pod.path,
            workload: (self.namespace, self.name),
        }
    }

    fn full_name(&self) -> String {
        self.party.to_owned()
    }
}

/// What a run must leave as it was.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    network: BTreeSet<String>,
    programs: BTreeSet<String>,
    mounts: BTreeSet<String>,
}

impl Machine {
    /// Looks at the machine.
    pub fn look() -> Outcome<Self> {
        let network = HostState::capture(&NetNs::of_this_thread()?).lines().map(str::to_owned).collect();
        // The fifth field of a line is the mount point (proc_pid_mountinfo(5)).
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mounts = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(str::to_owned).collect();
        let mut programs = BTreeSet::new();
        for id in Program::ids()? {
            // One that vanishes meanwhile was not there.
            if let Ok(program) = Program::by_id(id)
                && PROGRAMS.contains(&program.info().name.as_str())
            {
                programs.insert(format!("program {} {id}", program.info().name));
            }
        }
        Ok(Self { network, programs, mounts })
    }

    /// What differs in `after`, in words; empty where nothing does.
    fn diff(&self, after: &Self) -> String {
        let sides = [(&self.network, &after.network), (&self.programs, &after.programs), (&self.mounts, &after.mounts)];
        let mut lines = Vec::new();
        for (before, after) in sides {
            lines.extend(before.difference(after).map(|l| format!("gone: {l}")));
            lines.extend(after.difference(before).map(|l| format!("new: {l}")));
        }
        lines.join("; ")
    }
}

/// Tells the story until its end, an error, or an interrupt.
pub fn tell(
    stage: &Stage,
    program: PathBuf,
    keep: bool,
    report: &mut Report,
    interrupted: &dyn Fn() -> Result<(), &'static str>,
) -> Outcome {
    report.step("The stage");
    let member = |party: &'static str| -> Outcome<Member> {
        let (namespace, name) = party.split_once('/').ok_or("a party is NAMESPACE/NAME")?;
        Ok(Member { party, namespace, name, pod: stage.namespace(name)?, generation: 1 })
    };
    let mut members = [member("shop/web")?, member("shop/db")?, member("ops/scan")?];
    let outside = stage.namespace("outside")?;
    connect_outside(stage, &outside)?;
    report.note("network namespaces: a host, its pods shop/web, shop/db and ops/scan, and somebody outside");
    interrupted()?;

    let mut owner = Owner::open(stage, NODE.iter().map(|a| a.parse()).collect::<Result<_, _>>()?)?;
    report.note(format!("policy: {}", owner.kernel()));
    let cast = Cast { members: &mut members, outside: &outside };
    let told = with_owner(stage, program, &mut owner, cast, keep, report, interrupted);
    if keep {
        return told;
    }
    told.and(owner.close())
}

/// Who plays.
struct Cast<'a> {
    members: &'a mut [Member; 3],
    outside: &'a Pod,
}

fn with_owner(
    stage: &Stage,
    program: PathBuf,
    owner: &mut Owner,
    cast: Cast<'_>,
    keep: bool,
    report: &mut Report,
    interrupted: &dyn Fn() -> Result<(), &'static str>,
) -> Outcome {
    let Cast { members, outside } = cast;
    report.step("Pods are added by the CNI plugin, one with fixed addresses");
    let plugin = Plugin { program, host: &stage.host };
    let mut addresses = Vec::new();
    for member in members.iter() {
        interrupted()?;
        let result = call(&plugin, "ADD", member, &config(stage, member))?;
        let own = ips(&result);
        report.note(format!("ADD {:<8} {}", member.full_name(), own.join(", ")));
        let again = call(&plugin, "ADD", member, &config(stage, member))?;
        let same = if again == result { "the same" } else { "another" };
        report.expect(format!("the answer to a repeated ADD of {}", member.full_name()), "the same", same);
        addresses.push(own);
    }
    report.expect("shop/db has the addresses that it claims", DB_ADDRESSES, addresses[1].join(", "));
    fixed_addresses(stage, &plugin, members, report)?;

    let bare = |list: &[String]| -> Outcome<Vec<IpAddr>> {
        list.iter().map(|a| Ok(a.split('/').next().unwrap_or(a).parse()?)).collect()
    };
    let mut parties = Vec::new();
    for (member, own) in members.iter().zip(&addresses) {
        parties.push(Party { name: member.party, netns: &member.pod.netns, addresses: bare(own)? });
    }
    parties.push(Party { name: "outside", netns: &outside.netns, addresses: bare(&OUTSIDE.map(str::to_owned))? });
    parties.push(Party {
        name: "host",
        netns: &stage.host,
        addresses: bare(&NODE[..2].iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())?,
    });
    let servers = parties.iter().map(|p| Server::start(p.netns, &p.addresses)).collect::<Outcome<Vec<_>>>()?;

    report.step("Nothing passes until policy is known");
    interrupted()?;
    let silence: Vec<Row> = expectations::POLICY.iter().map(|(from, to, _)| (*from, *to, NOTHING)).collect();
    matrix::compare(&parties, &silence, report)?;

    report.step("Three NetworkPolicies are compiled to eBPF and attached");
    interrupted()?;
    let begin = Instant::now();
    let done = owner.start(include_str!("../policies/shop.yaml"))?;
    report.note(format!("policies/shop.yaml: in force for {} pods after {:.0} ms", done.enforced, ms(begin)));
    report.expect("pods for which it is not in force", 0, done.failures.len());
    matrix::compare(&parties, expectations::POLICY, report)?;

    report.step("Policy changes while TCP streams run: the database is closed for repair");
    interrupted()?;
    change_under_streams(owner, &parties, report)?;

    report.step("What was seen");
    show_flows(owner, report)?;
    drop(servers);
    if keep {
        return Ok(());
    }

    report.step("Pods are deleted");
    for member in members.iter() {
        call(&plugin, "DEL", member, &config(stage, member))?;
    }
    let host = HostState::capture(&stage.host);
    let left: Vec<_> = host.lines().filter(|l| l.contains("dcenet:shop/")).collect();
    report.expect("devices of deleted pods on the host", "", left.join("; "));
    let records = fs::read_dir(stage.directory("run").join("attachments"))?.count();
    // The outside's own attachment is still there.
    report.expect("records of attachments", 1, records);
    Ok(())
}

/// One stream becomes forbidden, the other stays allowed.
fn change_under_streams(owner: &Owner, parties: &[Party<'_>], report: &mut Report) -> Outcome {
    let [web, db, _, outside, _] = parties else { return Err("five parties are on the stage".into()) };
    let forbidden = Stream::open(web.netns, db.addresses[0])?;
    let allowed = Stream::open(outside.netns, web.addresses[1])?;
    std::thread::sleep(Duration::from_millis(300));
    report.holds("both streams run", forbidden.answered() > 0 && allowed.answered() > 0, "both");
    let begin = Instant::now();
    let done = owner.change(include_str!("../policies/shop-repair.yaml"))?;
    report.note(format!("policies/shop-repair.yaml: in force after {:.1} ms", ms(begin)));
    report.expect("pods for which it is not in force", 0, done.failures.len());
    // What was under way when the change came into force may still be counted.
    std::thread::sleep(Duration::from_millis(50));
    let (forbidden_then, allowed_then) = (forbidden.answered(), allowed.answered());
    std::thread::sleep(Duration::from_millis(700));
    report.expect("answers over the stream shop/web -> shop/db since then", 0, forbidden.answered() - forbidden_then);
    let more = allowed.answered() - allowed_then;
    report.holds("answers over the stream outside -> shop/web since then", more > 50, more);
    let whole = allowed.close().map_or_else(|e| e.to_string(), |()| "whole".to_owned());
    report.expect("the stream outside -> shop/web, number by number", "whole", whole);
    drop(forbidden);
    Ok(())
}

fn show_flows(owner: &mut Owner, report: &mut Report) -> Outcome {
    let flows = owner.flows()?;
    for flow in flows.iter().rev().take(8).rev() {
        report.note(describe(flow));
    }
    let saw = |what: &dyn Fn(&Flow) -> bool| flows.iter().any(what);
    let db = |f: &Flow| f.pod.workload.as_ref().is_some_and(|w| w.name == "db");
    report.holds(
        "an admitted flow names its rule",
        saw(&|f| {
            db(f) && f.kind == FlowKind::New && f.rule.as_deref().is_some_and(|r| r.starts_with("shop/db ingress"))
        }),
        "shop/db ingress",
    );
    report.holds(
        "a denied packet to shop/db is among them, with its reason",
        saw(&|f| db(f) && f.kind == FlowKind::Denied && !f.reason.is_empty()),
        "denied",
    );
    let counters = owner.rule_counters()?;
    let mut busiest: Vec<_> = counters.iter().filter(|c| c.packets > 0).collect();
    busiest.sort_by_key(|c| std::cmp::Reverse(c.packets));
    for counter in busiest.iter().take(6) {
        report.note(format!("{:>6} packets, {:>8} bytes: {}", counter.packets, counter.bytes, counter.rule));
    }
    let admitted = counters.iter().find(|c| c.rule.starts_with("shop/db ingress")).map_or(0, |c| c.packets);
    report.holds("the rule that admits to shop/db has counted", admitted > 0, admitted);
    Ok(())
}

fn describe(flow: &Flow) -> String {
    let end = |end: &FlowEnd| match (&end.workload, end.address) {
        (Some(workload), _) => format!("{workload}"),
        (None, Some(address)) => address.to_string(),
        (None, None) => "?".to_owned(),
    };
    let (from, to, port) = match flow.direction {
        Direction::Ingress => (end(&flow.peer), end(&flow.pod), flow.pod.port),
        Direction::Egress => (end(&flow.pod), end(&flow.peer), flow.peer.port),
    };
    let rule = flow.rule.as_deref().map(|r| format!(" by {r}")).unwrap_or_default();
    format!(
        "{:<6} {:<10} {:<5} {from} -> {to}:{port}{rule}",
        format!("{:?}", flow.kind).to_lowercase(),
        flow.reason,
        flow.protocol.to_string()
    )
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Removes the stage and compares the machine with what it was.
pub fn strike(stage: Stage, before: &Machine, report: &mut Report) -> Outcome {
    stage.strike()?;
    // The kernel frees programs when no packet can be in them any more, a moment after they are let go.
    let deadline = Instant::now() + Duration::from_secs(2);
    let difference = loop {
        let difference = before.diff(&Machine::look()?);
        if difference.is_empty() || Instant::now() > deadline {
            break difference;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    report.expect(
        "links, addresses, routes, rules, filters, programs and mounts that differ on this machine",
        "",
        difference,
    );
    report.expect("files left in /run/dcenet-demo", false, stage::anything_left());
    Ok(())
}

/// The database is deleted and comes back; somebody else wants its address.
fn fixed_addresses(stage: &Stage, plugin: &Plugin<'_>, members: &mut [Member; 3], report: &mut Report) -> Outcome {
    let [_, db, scan] = members;
    let mut greedy = config(stage, scan);
    greedy["name"] = json!("greedy");
    greedy["ipam"]["pools"][2]["claims"] = json!({ "ops/scan": { "address": "10.30.0.5", "keep": "forever" } });
    let refused = match plugin.call("ADD", &scan.container(), &greedy)? {
        Ok(result) => result,
        Err(error) => error["msg"].clone(),
    };
    let holder = refused.as_str().is_some_and(|text| text.contains("shop/db"));
    report.holds("a second claim for its address is refused with the holder's name", holder, &refused);

    call(plugin, "DEL", db, &config(stage, db))?;
    db.generation += 1;
    let result = call(plugin, "ADD", db, &config(stage, db))?;
    report.expect("shop/db is deleted, added again, and has", DB_ADDRESSES, ips(&result).join(", "));
    Ok(())
}

fn call(plugin: &Plugin<'_>, verb: &str, member: &Member, config: &Value) -> Outcome<Value> {
    let answer = plugin.call(verb, &member.container(), config)?;
    answer.map_err(|error| format!("{verb} {}: {error}", member.full_name()).into())
}

fn ips(result: &Value) -> Vec<String> {
    let list = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|ip| ip["address"].as_str()).map(str::to_owned).collect()
}

/// The network configuration, as an operator would write it, with what the runtime adds for this pod.
fn config(stage: &Stage, member: &Member) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "shop", "type": "dcenet",
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
        "ipam": {
            "type": "dcenet",
            "pools": [
                { "name": "pods", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1" },
                { "name": "pods6", "subnet": "2001:db8:20::/64", "gateway": "2001:db8:20::1" },
                {
                    "name": "db", "subnet": "10.30.0.0/28", "gateway": "10.30.0.1",
                    "claims": { "shop/db": { "address": "10.30.0.5", "keep": "forever" } },
                },
                {
                    "name": "db6", "subnet": "2001:db8:30::/64", "gateway": "2001:db8:30::1",
                    "claims": { "shop/db": { "address": "2001:db8:30::5", "keep": "forever" } },
                },
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
        "policy": { "default": "deny", "await": "0s", "pins": owner::pins(stage) },
        "stateDir": stage.directory("state"), "runDir": stage.directory("run"),
        "args": { "cni": { "labels": [{ "key": "app", "value": member.name }] } },
    })
}

/// Connects the namespace outside through the library, as a Rust project would: no CNI, no store.
fn connect_outside(stage: &Stage, outside: &Pod) -> Outcome {
    let host = Host(NetNs::open(stage.directory("netns").join("host"))?);
    let engine = Engine::new(host, &stage.directory("run"), None)?;
    let address = |text: &str, length: u8| -> Outcome<LeasedAddress> {
        let address = ipnet::IpNet::new(text.parse()?, length)?;
        Ok(LeasedAddress::new(address, "outside", 1))
    };
    let route = |text: &str| -> Outcome<LeasedRoute> { Ok(LeasedRoute { destination: text.parse()?, gateway: None }) };
    let key = AttachmentKey { network: "outside".parse()?, container: "outside".parse()?, ifname: "eth0".parse()? };
    let pod = EnginePod { netns: &outside.netns, path: &outside.path };
    let lease = Lease {
        addresses: vec![address(OUTSIDE[0], 32)?, address(OUTSIDE[1], 128)?],
        routes: vec![route("0.0.0.0/0")?, route("::/0")?],
        dns: Dns::default(),
        mac: None,
    };
    engine.attach(&AttachRequest::new(key, pod, LinkConfig::read(&json!({ "kind": "veth" }))?, lease))?;
    Ok(())
}
