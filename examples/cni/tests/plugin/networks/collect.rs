//! What DEL and GC remove after changes of the configuration and of records, and what they let be.

use std::path::PathBuf;

use dcenet_core::test_support::{Rung, require};
use serde_json::{Value, json};

use super::super::common::{Node, Pod};
use super::{Everything, files, key, node, ours, status, warm};

/// A plugin that makes nothing, and notes what it is called for and, of GC, what is valid.
fn install_noting(node: &Node, name: &str) {
    let directory = node.host.directory().join("bin");
    let script = format!(
        "#!/bin/sh\ncd {}\necho \"$CNI_COMMAND {name} $CNI_CONTAINERID\" >>calls\n[ $CNI_COMMAND = GC ] && cat >{name}.gc\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\": \"1.1.0\"}}'\nexit 0\n",
        directory.display()
    );
    node.install(name, &script);
}

/// What plugins were called for since this was asked last.
fn calls(node: &Node) -> Vec<String> {
    let path = node.host.directory().join("bin/calls");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    std::fs::write(path, "").unwrap();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

/// The containers that the plugin was told to keep.
fn kept(node: &Node, plugin: &str) -> Vec<String> {
    let conf = std::fs::read(node.host.directory().join("bin").join(format!("{plugin}.gc"))).unwrap();
    let conf: Value = serde_json::from_slice(&conf).unwrap();
    let list = conf["cni.dev/valid-attachments"].as_array().unwrap();
    let mut kept: Vec<_> = list
        .iter()
        .map(|a| format!("{} {}", a["containerID"].as_str().unwrap(), a["ifname"].as_str().unwrap()))
        .collect();
    kept.sort();
    kept
}

fn records(node: &Node) -> PathBuf {
    PathBuf::from(node.config["stateDir"].as_str().unwrap()).join("networks")
}

/// Of two plugins, one makes the network of the configuration's own name.
fn noting() -> Node {
    let delegate = |plugin: &str| json!({ "cniVersion": "1.1.0", "type": plugin });
    let node = node(json!([
        { "name": "pods", "delegate": delegate("whole") }, { "name": "storage", "delegate": delegate("shared") },
    ]));
    install_noting(&node, "whole");
    install_noting(&node, "shared");
    node
}

#[test]
fn plugins_are_told_to_collect_only_where_everything_that_lives_is_known() {
    if !require(Rung::Netns) {
        return;
    }
    let node = noting();
    let (a, b, gone) = (node.pod("a"), node.pod("b"), node.pod("gone"));
    for pod in [&a, &b, &gone] {
        node.add(pod).unwrap();
    }
    // Attached by the plugin alone, before the configuration named it among several.
    let earlier = node.pod("earlier");
    calls(&node);
    node.gc(Some(&[&a, &b, &earlier])).unwrap();
    let deleted = [format!("DEL shared {}", gone.container), format!("DEL whole {}", gone.container)];
    assert_eq!(calls(&node), [&deleted[..], &["GC whole".to_owned()]].concat());
    let mut expected = [&a, &b, &earlier].map(|pod| format!("{} eth0", pod.container));
    expected.sort();
    assert_eq!(kept(&node, "whole"), expected);

    // A record that cannot be read is of a pod that may live, of this network or of another.
    let broken = records(&node).join(key(&node, &node.pod("x")).id().to_string());
    std::fs::write(&broken, "{\"intent\": {\"newer\": 1}}\n").unwrap();
    let error = node.gc(Some(&[&a])).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    let message = error["msg"].as_str().unwrap();
    assert!(message.contains(broken.to_str().unwrap()) && message.contains("nothing is collected by list"), "{error}");
    let deleted = [format!("DEL shared {}", b.container), format!("DEL whole {}", b.container)];
    assert_eq!(calls(&node), deleted, "what is known to be stale goes");
    std::fs::remove_file(&broken).unwrap();
    node.gc(Some(&[&a])).unwrap();
    assert_eq!(calls(&node), ["GC whole"]);
    assert_eq!(kept(&node, "whole"), [format!("{} eth0", a.container)]);
    node.del(&a).unwrap();
}

/// Two configurations have a network in common, which somebody uses without either.
#[test]
fn what_others_have_of_a_shared_network_is_not_collected() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node(json!([ours()]));
    node.config["networks"][0]["ipam"]["cooldown"] = json!("0s");
    warm(&node);
    let first = node.config.clone();
    let mut second = first.clone();
    second["name"] = json!("others");
    let theirs = json!({
        "cniVersion": "1.1.0", "name": "shop", "type": "bridge", "ipam": first["networks"][0]["ipam"],
        "stateDir": first["stateDir"], "runDir": first["runDir"],
    });
    let (a, b, c) = (node.pod("a"), node.pod("b"), node.pod("c"));
    let before = Everything::of(&node, &a);
    node.call("ADD", &b, &second.to_string()).unwrap();
    // As the IPAM plugin of another plugin: there is an address, and no device of ours.
    node.call("ADD", &c, &theirs.to_string()).unwrap();
    let shared = Everything::of(&node, &a);
    node.add(&a).unwrap();
    assert_ne!(shared.diff(&Everything::of(&node, &a)), "");
    node.gc(Some(&[])).unwrap();
    assert_eq!(shared.diff(&Everything::of(&node, &a)), "", "all that is stale, and nothing else");
    // Nor do those who have the network's name for their own collect what pods of several networks have of it: the runtime
    // lists it under another name.
    let mut alone = theirs.clone();
    (alone["type"], alone["link"]) = (json!("dcenet"), first["networks"][0]["link"].clone());
    let keeping = |conf: &Value, pods: &[&Pod]| {
        let mut conf = conf.clone();
        let list: Vec<_> = pods.iter().map(|p| json!({ "containerID": p.container, "ifname": "eth0" })).collect();
        conf["cni.dev/valid-attachments"] = json!(list);
        conf.to_string()
    };
    for conf in [&alone, &theirs] {
        node.call("GC", &c, &keeping(conf, &[&c])).unwrap();
        assert_eq!(shared.diff(&Everything::of(&node, &a)), "", "{conf}");
    }
    let unreadable = records(&node).join(key(&node, &node.pod("x")).id().to_string());
    std::fs::write(&unreadable, "{}\n").unwrap();
    for conf in [&alone, &theirs] {
        let error = node.call("GC", &c, &keeping(conf, &[])).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(unreadable.to_str().unwrap()), "{error}");
    }
    std::fs::remove_file(unreadable).unwrap();
    assert_eq!(shared.diff(&Everything::of(&node, &a)), "", "what cannot be judged stays");
    node.call("DEL", &c, &theirs.to_string()).unwrap();
    node.call("DEL", &b, &second.to_string()).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &a)), "");
    // Nobody has the network any more: the bridge goes too.
    assert!(node.host.root().link("dc0").is_some());
    node.gc(Some(&[])).unwrap();
    assert!(node.host.root().link("dc0").is_none());
}

/// What a pod of one network leaves, where its configuration's sections are moved into `networks`.
#[test]
fn a_pod_of_one_network_is_removed_whole_after_its_sections_were_moved() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["ipam"]["cooldown"] = json!("0s");
    node.warm();
    let one = node.config.clone();
    let moved = |name: &str, default: bool| {
        let mut moved = one.clone();
        let keys = moved.as_object_mut().unwrap();
        let sections = (keys.remove("link"), keys.remove("ipam"));
        moved["networks"] = json!([
            { "name": "plain", "link": { "kind": "veth" } },
            { "name": name, "link": sections.0, "ipam": sections.1, "default": default },
        ]);
        moved
    };
    let pod = node.pod("web");
    let whole = |node: &Node| (node.host.state(), node.store_of(&one), node.host.records());
    let before = whole(&node);
    let same = |before: &(_, Vec<String>, Vec<String>), after: &(_, Vec<String>, Vec<String>)| {
        (before.1 == after.1, before.2 == after.2)
    };
    for changed in [moved("inner", true), moved("inner", false), moved("shop", true)] {
        for verb in ["DEL", "DEL without namespace", "GC"] {
            node.config = one.clone();
            node.add(&pod).unwrap();
            assert_eq!(same(&before, &whole(&node)), (false, false), "something is there");
            node.config = changed.clone();
            match verb {
                "DEL" => drop(node.del(&pod).unwrap()),
                "GC" => {
                    node.gc(Some(&[&pod])).unwrap();
                    assert!(pod.netns.link("eth0").is_some(), "it is alive");
                    node.gc(Some(&[&node.pod("other")])).unwrap();
                }
                _ => drop(node.del_without_namespace(&pod).unwrap()),
            }
            let after = whole(&node);
            assert_eq!(before.0.diff(&after.0), "", "{verb}");
            assert_eq!(same(&before, &after), (true, true), "{verb}");
            assert!(pod.netns.link("eth0").is_none());
        }
    }
    // With no network of ours nobody can release the address: it is told, once, and the device is gone.
    node.config = one.clone();
    node.add(&pod).unwrap();
    let mut foreign = one.clone();
    foreign.as_object_mut().unwrap().retain(|key, _| key != "link" && key != "ipam");
    foreign["networks"] = json!([{ "name": "x", "delegate": { "cniVersion": "1.1.0", "type": "whole" } }]);
    install_noting(&node, "whole");
    node.config = foreign;
    let error = node.del(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("10.20.0.") && error["code"] == 7, "{error}");
    assert!(pod.netns.link("eth0").is_none());
    node.del(&pod).unwrap();
    node.config = one.clone();
    assert_ne!(before.1, node.store_of(&one));
    node.gc(Some(&[&node.pod("other")])).unwrap();
    assert_eq!(before.1, node.store_of(&one));
}

#[test]
fn a_damaged_record_still_tells_what_to_take_back() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node(json!([
        { "name": "a", "link": { "kind": "veth" } }, { "name": "b", "delegate": { "cniVersion": "1.1.0", "type": "whole" } },
    ]));
    install_noting(&node, "whole");
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let damage = |node: &Node, pod: &Pod| {
        let path = records(node).join(key(node, pod).id().to_string());
        let text = std::fs::read_to_string(&path).unwrap();
        let (intent, rest) = text.split_once('\n').unwrap();
        std::fs::write(&path, format!("{intent}\n{{\"begun\": \n{rest}")).unwrap();
    };
    node.add(&pod).unwrap();
    damage(&node, &pod);
    let read = dcenet_core::cni::networks::network_status(records(&node).parent().unwrap(), &key(&node, &pod));
    assert!(read.unwrap_err().to_string().contains("line 2"));
    // The runtime repeats ADD: it is made anew.
    node.add(&pod).unwrap();
    assert_eq!(status(&node, &pod).unwrap().len(), 1, "the plugin tells of no interface");
    damage(&node, &pod);
    calls(&node);
    node.config["networks"] = json!([{ "name": "x", "link": { "kind": "veth" } }]);
    node.del(&pod).unwrap();
    assert_eq!(calls(&node), [format!("DEL whole {}", pod.container)]);
    let left = before.diff(&Everything::of(&node, &pod));
    assert!(left.lines().count() == 1 && left.ends_with(".unreadable\n"), "it is kept for people: {left}");
    assert_eq!(files(&records(&node)).len(), 1);
    node.del(&pod).unwrap();
    node.gc(Some(&[])).unwrap();
    assert_eq!(calls(&node), [""; 0]);
}

/// A byte that is no text, as a bad block leaves, is damage as any other is, and stands in nobody else's way.
#[test]
fn a_record_with_a_byte_that_is_no_text_holds_up_neither_del_nor_what_gc_knows() {
    if !require(Rung::Netns) {
        return;
    }
    let node = noting();
    let (whole, progress, intent) = (node.pod("whole"), node.pod("progress"), node.pod("intent"));
    for pod in [&whole, &progress, &intent] {
        node.add(pod).unwrap();
    }
    for (pod, in_intent) in [(&progress, false), (&intent, true)] {
        let path = records(&node).join(key(&node, pod).id().to_string());
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
        bytes[if in_intent { end / 2 } else { end + 4 }] = 0xff;
        std::fs::write(path, bytes).unwrap();
    }
    calls(&node);
    // Of nobody but who can be read it is known whether they are stale.
    let error = node.gc(Some(&[&progress])).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("nothing is collected by list"), "{error}");
    assert_eq!(calls(&node), ["shared", "whole"].map(|plugin| format!("DEL {plugin} {}", whole.container)));
    for pod in [&progress, &intent] {
        node.del(pod).unwrap();
        assert_eq!(calls(&node), ["shared", "whole"].map(|plugin| format!("DEL {plugin} {}", pod.container)));
    }
    node.gc(Some(&[])).unwrap();
    assert_eq!(calls(&node), ["GC whole"]);
}

/// Rules do not go with interfaces: who does not know of them leaves them, or finds them in the way.
#[test]
fn rules_are_taken_back_by_a_damaged_record_too() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node(json!([ours(), { "name": "more", "link": { "kind": "veth" } }]));
    node.config["networks"][0]["ipam"]["cooldown"] = json!("0s");
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let rules = || pod.netns.sh("ip -4 rule show pref 2200; ip -6 rule show pref 2200").lines().count();
    for damaged in ["{\"begun\"", "{\"steering\""] {
        let damage = || {
            let path = records(&node).join(key(&node, &pod).id().to_string());
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(damaged), "{text}");
            std::fs::write(&path, text.replace(damaged, "{\"?\"")).unwrap();
        };
        node.add(&pod).unwrap();
        assert_eq!(rules(), 2);
        damage();
        node.add(&pod).unwrap();
        assert_eq!(rules(), 2, "{damaged}");
        damage();
        node.del(&pod).unwrap();
        assert_eq!(rules(), 0, "{damaged}");
        for file in files(&records(&node)) {
            std::fs::remove_file(file).unwrap();
        }
        assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    }
}

/// What a pod was given is of no other one: a plugin's configuration is the same for all.
#[test]
fn labels_of_pods_make_one_collection_of_a_network_and_not_one_for_each() {
    if !require(Rung::Netns) {
        return;
    }
    let node = noting();
    let pods = [node.pod("a"), node.pod("b"), node.pod("c")];
    for (i, pod) in pods.iter().enumerate() {
        let mut conf = node.config.clone();
        conf["args"] = json!({ "cni": { "labels": [{ "key": "pod", "value": i.to_string() }] } });
        node.call("ADD", pod, &conf.to_string()).unwrap();
    }
    calls(&node);
    node.gc(Some(&pods.each_ref())).unwrap();
    assert_eq!(calls(&node), ["GC whole"]);
    let given = std::fs::read_to_string(node.host.directory().join("bin/whole.gc")).unwrap();
    assert!(!given.contains("labels"), "{given}");
    node.gc(Some(&[])).unwrap();
}
