//! What the demo does, and what is expected of it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use dcenet_core::engine::{AttachRequest, Engine};
use dcenet_core::link::LinkConfig;
use dcenet_core::model::AttachmentKey;
use dcenet_core::netns::{Host, NetNs, Pod as EnginePod};
use dcenet_core::provider::{Dns, Lease, LeasedAddress, LeasedRoute};
use dcenet_core::test_support::HostState;
use serde_json::{Value, json};

use crate::plugin::{Container, Plugin};
use crate::report::Report;
use crate::stage::{self, Pod, Stage};
use crate::traffic::{Kind, Server, probe};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The underlay addresses that the firewalls of the enterprise know as the database's.
const DB_ADDRESSES: &str = "10.30.0.5/28, 2001:db8:30::5/64";

/// Somebody outside the cluster.
const OUTSIDE: [&str; 2] = ["192.0.2.10", "2001:db8:ff::10"];

/// A pod of the demo.
struct Member {
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
        format!("{}/{}", self.namespace, self.name)
    }
}

/// What a run must leave as it was.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    network: BTreeSet<String>,
    mounts: BTreeSet<String>,
}

impl Machine {
    /// Looks at the machine.
    pub fn look() -> Outcome<Self> {
        let network = HostState::capture(&NetNs::of_this_thread()?).lines().map(str::to_owned).collect();
        // The fifth field of a line is the mount point (proc_pid_mountinfo(5)).
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mounts = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(str::to_owned).collect();
        Ok(Self { network, mounts })
    }

    /// What differs in `after`, in words; empty where nothing does.
    fn diff(&self, after: &Self) -> String {
        let sides = [(&self.network, &after.network), (&self.mounts, &after.mounts)];
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
    report: &mut Report,
    interrupted: &dyn Fn() -> Result<(), &'static str>,
) -> Outcome {
    report.step("The stage");
    let member = |namespace, name| -> Outcome<Member> {
        Ok(Member { namespace, name, pod: stage.namespace(name)?, generation: 1 })
    };
    let mut members = [member("shop", "web")?, member("shop", "db")?, member("ops", "scan")?];
    let outside = stage.namespace("outside")?;
    connect_outside(stage, &outside)?;
    report.note("network namespaces: a host, its pods shop/web, shop/db and ops/scan, and somebody outside");
    interrupted()?;

    report.step("Pods are added by the CNI plugin, one with a fixed address");
    let plugin = Plugin { program, host: &stage.host };
    let config = config(stage);
    let mut addresses = Vec::new();
    for member in &members {
        interrupted()?;
        let result = call(&plugin, "ADD", member, &config)?;
        let own = ips(&result);
        report.note(format!("ADD {:<9} {}", member.full_name(), own.join(", ")));
        let again = call(&plugin, "ADD", member, &config)?;
        report.holds(
            format!("a repeated ADD of {} gives the same answer", member.full_name()),
            again == result,
            "same",
        );
        addresses.push(own);
    }
    report.expect("shop/db has the addresses that it claims", DB_ADDRESSES, addresses[1].join(", "));
    fixed_address(&plugin, &mut members, &config, report)?;

    report.step("Traffic");
    let servers = members.iter().map(|m| Server::start(&m.pod.netns)).collect::<Outcome<Vec<_>>>()?;
    let outside_server = Server::start(&outside.netns)?;
    let mut sources: Vec<(String, &NetNs)> = members.iter().map(|m| (m.full_name(), &m.pod.netns)).collect();
    sources.push(("outside".to_owned(), &outside.netns));
    let mut targets: Vec<(String, Vec<String>)> = members.iter().map(Member::full_name).zip(addresses).collect();
    targets.push(("outside".to_owned(), OUTSIDE.map(str::to_owned).to_vec()));
    for (from, netns) in &sources {
        for (to, list) in targets.iter().filter(|(to, _)| to != from) {
            interrupted()?;
            let mut seen = Vec::new();
            for address in list {
                let address: IpAddr = address.split('/').next().unwrap_or(address).parse()?;
                let family = if address.is_ipv4() { "v4" } else { "v6" };
                for kind in Kind::ALL {
                    let verdict = if probe(netns, kind, address)? { "pass" } else { "drop" };
                    seen.push(format!("{}{} {verdict}", kind.name(), family.trim_start_matches('v')));
                }
            }
            report.holds(format!("{from:<9} -> {to:<9}"), seen.iter().all(|s| s.ends_with("pass")), seen.join(" "));
        }
    }
    drop((servers, outside_server));

    for member in &members {
        call(&plugin, "DEL", member, &config)?;
    }
    report.step("Pods are deleted");
    let host = HostState::capture(&stage.host);
    let left: Vec<_> = host.lines().filter(|l| l.contains("dcenet:shop/")).collect();
    report.expect("devices of deleted pods on the host", "", left.join("; "));
    let records = fs::read_dir(stage.directory("run").join("attachments"))?.count();
    // The outside's own attachment is still there.
    report.expect("records of attachments", 1, records);
    Ok(())
}

/// Removes the stage and compares the machine with what it was.
pub fn strike(stage: Stage, before: &Machine, report: &mut Report) -> Outcome {
    stage.strike()?;
    let difference = before.diff(&Machine::look()?);
    report.expect("links, addresses, routes, rules, filters and mounts that differ on this machine", "", difference);
    report.expect("files left in /run/dcenet-demo", false, stage::anything_left());
    Ok(())
}

/// The database is deleted and comes back; somebody else wants its address.
fn fixed_address(plugin: &Plugin<'_>, members: &mut [Member; 3], config: &Value, report: &mut Report) -> Outcome {
    let [_, db, scan] = members;
    let mut greedy = config.clone();
    greedy["name"] = json!("greedy");
    greedy["ipam"]["pools"][2]["claims"] = json!({ "ops/scan": { "address": "10.30.0.5", "keep": "forever" } });
    let refused = match plugin.call("ADD", &scan.container(), &greedy)? {
        Ok(result) => result,
        Err(error) => error["msg"].clone(),
    };
    let holder = refused.as_str().is_some_and(|text| text.contains("shop/db"));
    report.holds("a second claim for its address is refused with the holder's name", holder, &refused);

    call(plugin, "DEL", db, config)?;
    db.generation += 1;
    let result = call(plugin, "ADD", db, config)?;
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

/// The network configuration, as an operator would write it.
fn config(stage: &Stage) -> Value {
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
        "stateDir": stage.directory("state"), "runDir": stage.directory("run"),
    })
}

/// Connects the namespace outside through the library, as a Rust project would: no CNI, no store.
fn connect_outside(stage: &Stage, outside: &Pod) -> Outcome {
    let host = Host(NetNs::open(stage.directory("netns").join("host"))?);
    let engine = Engine::new(host, &stage.directory("run"), None)?;
    let address = |text: &str, length: u8| -> Outcome<LeasedAddress> {
        let address = ipnet::IpNet::new(text.parse()?, length)?;
        Ok(LeasedAddress { address, gateway: None, pool: "outside".to_owned(), sequence: 1 })
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
