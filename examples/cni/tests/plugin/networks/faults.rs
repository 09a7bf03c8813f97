//! Faults: plugins that fail, calls that fail or are the last, restarts.

use dcenet_core::test_support::{Rung, effort, require};
use serde_json::json;

use super::super::common::{Faulted, Node};
use super::{Everything, has_debians, node, three, warm};

/// Puts Debian's plugin behind a script that notes calls, and fails at the call of this number: before it, or after it did its
/// work.
fn wrap(node: &Node, plugin: &str) {
    let directory = node.host.directory().join("bin");
    let script = format!(
        r#"#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin; d={}; export PATH
echo "$CNI_COMMAND {plugin} $CNI_IFNAME netns=$CNI_NETNS" >>$d/calls
n=$(wc -l <$d/calls); read k at <$d/fail 2>/dev/null
[ "$n" = "$at" ] && [ "$k" = before ] && {{ echo '{{"code": 200, "msg": "told to"}}'; exit 1; }}
/usr/lib/cni/{plugin} >$d/out.$$; rc=$?
[ "$n" = "$at" ] && [ "$k" = after ] && {{ rm $d/out.$$; echo '{{"code": 201, "msg": "told to, after"}}'; exit 1; }}
cat $d/out.$$; rm $d/out.$$; exit $rc
"#,
        directory.display()
    );
    node.install(plugin, &script);
}

fn calls(node: &Node) -> Vec<String> {
    let text = std::fs::read_to_string(node.host.directory().join("bin/calls")).unwrap_or_default();
    text.lines().map(|line| line.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect()
}

fn fail_at(node: &Node, rule: &str) {
    let directory = node.host.directory().join("bin");
    std::fs::write(directory.join("fail"), format!("{rule}\n")).unwrap();
    std::fs::write(directory.join("calls"), "").unwrap();
}

#[test]
fn a_plugin_that_fails_at_any_call_leaves_nothing_and_del_tells_of_it_and_is_repeated() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    for plugin in ["bridge", "macvlan"] {
        wrap(&node, plugin);
    }
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    for when in ["before", "after"] {
        for call in 1..=2 {
            fail_at(&node, &format!("{when} {call}"));
            let error = node.add(&pod).unwrap_err();
            assert_eq!(error["code"], if when == "before" { 200 } else { 201 }, "{error}");
            let (network, plugin) = [("legacy (net1)", "bridge"), ("storage (stor0)", "macvlan")][call - 1];
            let says = format!("network {network}: plugin {plugin}: ADD: told to");
            assert!(error["msg"].as_str().unwrap().starts_with(&says), "{error}");
            let expected = match call {
                1 => vec!["ADD bridge net1", "DEL bridge net1"],
                _ => vec!["ADD bridge net1", "ADD macvlan stor0", "DEL macvlan stor0", "DEL bridge net1"],
            };
            assert_eq!(calls(&node), expected);
            assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{when} {call}");
        }
    }
    // Taking back fails too: it says so, and the next DEL finishes it.
    fail_at(&node, "before 2");
    let error = {
        node.install("static", "#!/bin/sh\nexit 9\n");
        let error = node.add(&pod).unwrap_err();
        std::fs::remove_file(node.host.directory().join("bin/static")).unwrap();
        error
    };
    assert_eq!(error["code"], 115, "{error}");
    assert!(error["details"].as_str().unwrap().contains("could not all be taken back"), "{error}");
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    for when in ["before", "after"] {
        for call in 1..=2 {
            fail_at(&node, "never 0");
            node.add(&pod).unwrap();
            fail_at(&node, &format!("{when} {call}"));
            let error = node.del(&pod).unwrap_err();
            let network = ["storage (stor0)", "legacy (net1)"][call - 1];
            assert!(error["msg"].as_str().unwrap().contains(&format!("network {network}")), "{error}");
            // It went on to the others, ours too.
            assert_eq!(calls(&node), ["DEL macvlan stor0", "DEL bridge net1"]);
            assert!(pod.netns.link("eth0").is_none());
            node.del(&pod).unwrap();
            assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{when} {call}");
        }
    }
}

/// Whether all that is left is one file of a record, of which nothing was begun, or of which all was taken back but its removal.
fn is_idle_record(node: &Node, left: &str, removal: bool) -> bool {
    let Some(name) = left.strip_prefix("+ ").and_then(|line| line.strip_suffix('\n')) else { return false };
    let attachments = node.host.run_dir().join("attachments");
    // Of the records of attachments only the names are listed.
    let path = if name.starts_with('/') { name.into() } else { attachments.join(name) };
    let networks = std::path::Path::new(node.config["stateDir"].as_str().unwrap()).join("networks");
    let is_record = [&attachments, &networks].iter().any(|records| path.parent() == Some(records));
    is_record && std::fs::metadata(&path).is_ok_and(|file| removal || file.len() == 0)
}

/// The calls of netlink, of journals, of the store and of plugins, each failing, lost, or the end of the process.
#[test]
fn each_call_of_several_networks_may_fail_or_be_the_last_and_nothing_is_left() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let mut plugins = 0;
    for verb in ["ADD", "DEL"] {
        // What was lost has happened as what follows it finds it, and after call 3 is before call 4.
        for (kind, stride) in [
            ("fail", effort(5, 1, 1)),
            ("lose", effort(11, 3, 1)),
            ("abort", effort(5, 1, 1)),
            ("abort-after", effort(11, 3, 1)),
        ] {
            let (mut met_any, mut left_any, mut repaired) = (0, 0, 0);
            for call in (1..).step_by(stride) {
                if verb == "DEL" {
                    node.add(&pod).unwrap();
                }
                let Faulted { met, outcome } = node.faulted(verb, Some(&pod), &node.config, &format!("{kind}:{call}"));
                let what = format!("{verb}, {kind} {met:?}: {outcome:?}");
                let now = before.diff(&Everything::of(&node, &pod));
                left_any += u32::from(!now.is_empty());
                met_any += u32::from(met.is_some());
                plugins += u32::from(met.as_ref().is_some_and(|met| met.contains("run plugin")));
                match (&outcome, verb) {
                    (Some(Err(error)), "ADD") if error["code"] != 115 => {
                        let removal = met.as_ref().is_some_and(|met| met.contains("remove record"));
                        assert!(now.is_empty() || is_idle_record(&node, &now, removal), "{what}: {now}");
                    }
                    (Some(Ok(_)), "ADD") => drop(node.add(&pod).unwrap_or_else(|e| panic!("{what}: {e}"))),
                    // ADD repairs what a kill left, by turns with DEL.
                    (None, "ADD") if (call / stride) % 2 == 0 => {
                        repaired += 1;
                        let result = node.add(&pod).unwrap_or_else(|e| panic!("{what}: {e}"));
                        node.check(&pod, &result).unwrap_or_else(|e| panic!("{what}: {e}"));
                    }
                    _ => {}
                }
                node.del(&pod).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{what}");
                if met.is_none() {
                    break;
                }
            }
            println!("{verb} {kind}: {met_any} calls met, something left for the next call by {left_any}");
            assert!(met_any > 1, "{verb} {kind}: {met_any}");
            // The twin: kills do leave something, which the next call removes.
            assert!(!kind.starts_with("abort") || left_any > 0, "{verb} {kind}");
            assert!(!kind.starts_with("abort") || verb == "DEL" || repaired > 0, "{verb} {kind}");
        }
    }
    // A dump that is read once more, as on a busy machine, has the numbers of later calls differ between two runs: one kind
    // of fault may miss the few that run plugins.
    assert!(plugins > 0, "no call of a plugin was met");
}

#[test]
fn after_a_restart_and_without_a_namespace_del_and_gc_free_what_plugins_hold() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    wrap(&node, "bridge");
    let (pod, second) = (node.pod("web"), node.pod("db"));
    let before = Everything::of(&node, &pod);
    node.add(&pod).unwrap();
    node.add(&second).unwrap();
    for pod in [&pod, &second] {
        pod.remove_namespace();
        // As a plugin does that locks what is not there (a file at the path of the namespace).
        std::fs::write(pod.netns.path(), "").unwrap();
    }
    fail_at(&node, "never 0");
    node.del(&pod).unwrap();
    // The path leads to no namespace, and no plugin is sent there.
    let text = std::fs::read_to_string(node.host.directory().join("bin/calls")).unwrap();
    assert!(text.starts_with("DEL bridge net1 netns=\n"), "{text}");
    node.gc(Some(&[])).unwrap();
    let lists = Everything::of(&node, &pod).lists;
    let leases = |lists: &[Vec<String>]| lists[1..].to_vec();
    assert_eq!(leases(&lists), leases(&before.lists));
}

/// SIGKILL while a plugin is at work: it ends too, and the next DEL takes back what it has done.
#[test]
fn a_plugin_ends_with_the_call_that_runs_it() {
    if !require(Rung::Netns) {
        return;
    }
    let node =
        node(json!([{ "name": "a", "link": { "kind": "veth" } }, { "name": "b", "delegate": { "type": "slow" } }]));
    let directory = node.host.directory().join("bin");
    let script = format!(
        "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\ncd {}\n[ $CNI_COMMAND = DEL ] && {{ echo DEL >>calls; exit 0; }}\n\
         nsenter --net=$CNI_NETNS ip link add net1 type veth peer name far\nsleep 1000 & echo $! >child\n\
         echo $$ >pid.new; mv pid.new pid; wait\n",
        directory.display()
    );
    node.install("slow", &script);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let mut running = node.start("ADD", &pod);
    let await_that = |what: &str, is: &dyn Fn() -> bool| {
        let begin = std::time::Instant::now();
        while !is() {
            assert!(begin.elapsed() < std::time::Duration::from_secs(120), "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    await_that("the plugin starts", &|| directory.join("pid").exists());
    let pid = std::fs::read_to_string(directory.join("pid")).unwrap();
    // Another call is told to come later.
    assert_eq!(node.del(&pod).unwrap_err()["code"], 11);
    running.kill();
    assert_eq!(running.wait(), None);
    let ended = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        stat.is_empty() || stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
    };
    await_that("the plugin ends", &|| ended(&pid));
    // What it started does not, and would go on: an IPAM plugin that waits for its lock, for example.
    let child = std::fs::read_to_string(directory.join("child")).unwrap();
    assert!(!ended(&child));
    assert!(before.diff(&Everything::of(&node, &pod)).contains("net1"), "what it did is there");
    // Its DEL does nothing: a device that a plugin leaves would be seen.
    node.del(&pod).unwrap();
    assert!(ended(&child));
    assert_eq!(std::fs::read_to_string(directory.join("calls")).unwrap(), "DEL\n");
    pod.netns.sh("ip link del net1");
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}
