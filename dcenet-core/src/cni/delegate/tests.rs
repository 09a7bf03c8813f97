//! Plugins that are shell scripts: each way in which a program can fail to be a plugin.

use std::fs;
use std::path::Path;

use serde_json::{Map, json};

use super::*;
use crate::cni::SpecVersion;
use crate::model::NetworkName;

/// A directory of plugins.
pub(super) struct Directory(tempfile::TempDir);

impl Directory {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Has a child write the program: one that this process has open for writing cannot be executed (ETXTBSY), nor can it as
    /// long as a child that another test's thread forks meanwhile has the descriptor too.
    pub(super) fn install(&self, name: &str, script: &str) {
        let mut writer = Command::new("/bin/sh");
        writer.args(["-c", "cat >\"$1\" && chmod 755 \"$1\"", "sh"]).arg(self.path().join(name));
        let mut writer = writer.stdin(Stdio::piped()).spawn().unwrap();
        let text = format!("#!/bin/sh\ncd {}\n{script}\n", self.path().display());
        writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
    }

    fn plugins(&self, limit: Duration) -> Plugins {
        Plugins::new(self.path().as_os_str(), limit)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap()
    }

    /// Runs a script as ADD of a plugin.
    fn add(&self, script: &str) -> Result<Option<Value>, DelegateError> {
        self.install("it", script);
        self.plugins(GENEROUS).run(&"it".parse().unwrap(), Verb::Add, &call(), &json!({ "name": "n" }))
    }
}

const GENEROUS: Duration = Duration::from_secs(120);

fn call() -> PluginCall {
    PluginCall {
        container: Some("c1".parse().unwrap()),
        netns: Some("/run/netns/p".into()),
        ifname: Some("net1".parse().unwrap()),
        args: "IgnoreUnknown=1;K8S_POD_NAME=db".to_owned(),
        netns_override: false,
        trace: None,
    }
}

fn network() -> NetworkName {
    "storage".parse().unwrap()
}

fn chain(value: Value) -> Result<Chain, String> {
    Chain::read("networks[0].delegate", &value, &network(), SpecVersion::V1_0_0).map_err(|e| e.to_string())
}

fn scripted(scripts: &[(&str, &str)]) -> Directory {
    let directory = Directory::new();
    for (name, script) in scripts {
        directory.install(name, script);
    }
    directory
}

#[test]
fn a_plugin_gets_configuration_and_environment_and_nothing_else_of_ours() {
    let directory = Directory::new();
    let held = fs::File::open("/").unwrap();
    let answer = directory
        .add(
            "cat >conf; env | grep ^CNI_ | sort >env; ls -l /proc/self/fd >fds; echo '{\"cniVersion\":\"1.0.0\",\"x\":1}'",
        )
        .unwrap();
    drop(held);
    assert_eq!(answer, Some(json!({ "cniVersion": "1.0.0", "x": 1 })));
    assert_eq!(directory.read("conf"), "{\"name\":\"n\"}");
    let expected = format!(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=db\nCNI_COMMAND=ADD\nCNI_CONTAINERID=c1\nCNI_IFNAME=net1\n\
         CNI_NETNS=/run/netns/p\nCNI_PATH={}\n",
        directory.path().display()
    );
    assert_eq!(directory.read("env"), expected);
    // As any program that is started here has: what this one was started with, and its own three.
    let mut plain = Command::new(directory.path().join("it"));
    plain.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let through_plugins = directory.read("fds");
    assert!(plain.output().unwrap().status.success());
    let numbers = |text: &str| {
        text.lines().filter_map(|l| Some(l.split(" -> ").next()?.rsplit(' ').next()?.to_owned())).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&through_plugins), numbers(&directory.read("fds")));
    assert!(
        !through_plugins.contains("pidfd") && !through_plugins.lines().any(|l| l.ends_with("-> /")),
        "{through_plugins}"
    );
}

#[test]
fn names_are_programs_of_the_path_and_no_paths() {
    for bad in ["", ".", "..", "../bridge", "/bin/sh", "a/b", "a\0b"] {
        assert_eq!(bad.parse::<PluginName>().unwrap_err().value, bad);
        let error = chain(json!({ "type": bad })).unwrap_err();
        assert!(error.starts_with("networks[0].delegate.type: "), "{error}");
    }
    let directory = scripted(&[("there", "exit 0")]);
    fs::create_dir(directory.path().join("folder")).unwrap();
    for absent in ["absent", "folder"] {
        let plugins = directory.plugins(GENEROUS);
        let error = plugins.run(&absent.parse().unwrap(), Verb::Del, &call(), &json!({})).unwrap_err();
        assert!(matches!(error, DelegateError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(absent) && error.to_string().contains("CNI_PATH"), "{error}");
    }
    let second = Directory::new();
    let path = format!("relative:{}:{}", second.path().display(), directory.path().display());
    let found = Plugins::new(path.as_ref(), GENEROUS).find(&"there".parse().unwrap()).unwrap();
    assert_eq!(found, directory.path().join("there"));
}

#[test]
fn every_kind_of_answer_has_its_error() {
    let directory = Directory::new();
    let refused = |script: &str| directory.add(script).unwrap_err();

    let error =
        refused("echo trouble >&2; echo '{\"code\": 7, \"msg\": \"no such bridge\", \"details\": \"br9\"}'; exit 1");
    assert!(matches!(error, DelegateError::Refused { code: 7, .. }), "{error:?}");
    assert_eq!(error.to_string(), "plugin it: ADD: no such bridge (its code 7): br9: trouble");
    assert_eq!(CniError::from(error).code.number(), 7);

    let error = refused("echo cannot do it >&2; exit 3");
    assert!(matches!(&error, DelegateError::Died { said, .. } if said == "cannot do it"), "{error:?}");
    let error = refused("echo not JSON; exit 1");
    assert!(matches!(&error, DelegateError::Died { said, .. } if said == "not JSON"), "{error:?}");
    let error = refused("kill -SEGV $$");
    assert!(error.to_string().contains("signal: 11"), "{error}");
    let error = refused("exit 0");
    assert!(matches!(error, DelegateError::Empty { .. }), "{error:?}");
    for (script, excerpt) in [("echo '{\"cniVersion\":'", "{\"cniVersion\":"), ("echo '[1]'", "[1]"), ("echo up", "up")]
    {
        let error = refused(script);
        assert!(matches!(&error, DelegateError::Malformed { excerpt: e, .. } if e == excerpt), "{error:?}");
    }
    let error = refused("yes");
    assert!(matches!(error, DelegateError::TooLong { .. }), "{error:?}");
    // What is said to stderr has no end either, and only its last part matters.
    let error = refused("yes | head -c 3000000 >&2; echo at last >&2; exit 1");
    assert!(error.to_string().ends_with("at last") && error.to_string().len() < 8000, "{}", error.to_string().len());

    fs::write(directory.path().join("data"), "no program").unwrap();
    let error = directory.plugins(GENEROUS).run(&"data".parse().unwrap(), Verb::Add, &call(), &json!({})).unwrap_err();
    assert!(matches!(error, DelegateError::Start { .. }), "{error:?}");
}

#[test]
fn codes_that_mean_something_to_the_runtime_do_not_pass_for_ours() {
    let directory = Directory::new();
    for (theirs, ours) in [(3, 100), (0, 100), (11, 11), (999, 999), (5, 5)] {
        let error = directory.add(&format!("echo '{{\"code\": {theirs}, \"msg\": \"m\"}}'; exit 1")).unwrap_err();
        assert_eq!(CniError::from(error).code.number(), ours, "{theirs}");
    }
}

#[test]
fn a_large_configuration_reaches_who_reads_it_and_who_does_not() {
    let directory = Directory::new();
    let conf = json!({ "name": "n", "annotation": "x".repeat(1 << 20) });
    directory.install("reads", "wc -c >count; echo '{}'");
    directory.install("ignores", "exec 0<&-; echo '{}'");
    // It answers while it reads: neither end may wait for the other.
    directory.install("echoes", "echo '{\"a\": \"'; head -c 500000 | tr -c x x; echo '\"}'");
    for plugin in ["reads", "ignores"] {
        let plugins = directory.plugins(GENEROUS);
        assert_eq!(plugins.run(&plugin.parse().unwrap(), Verb::Add, &call(), &conf).unwrap(), Some(json!({})));
    }
    assert_eq!(directory.read("count").trim().parse::<usize>().unwrap(), conf.to_string().len());
    let error = directory.plugins(GENEROUS).run(&"echoes".parse().unwrap(), Verb::Add, &call(), &conf).unwrap_err();
    assert!(matches!(error, DelegateError::Malformed { .. }), "a line feed in a string: {error:?}");
}

fn alive(directory: &Directory, name: &str) -> bool {
    let pid = directory.read(name);
    // A zombie is nobody's work any more; whoever inherits it has yet to wait for it.
    fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

fn await_end(directory: &Directory, name: &str) {
    let begin = Instant::now();
    while alive(directory, name) {
        assert!(begin.elapsed() < GENEROUS, "{name} still lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn at_the_deadline_a_plugin_ends_with_all_that_it_started() {
    let directory = Directory::new();
    directory.install("slow", "sleep 1000 & echo $! >grandchild; echo $$ >child; echo waiting >&2; wait");
    // However busy the machine is: some deadline comes when all of it has started.
    let mut limit = Duration::from_secs(1);
    loop {
        let error = directory.plugins(limit).run(&"slow".parse().unwrap(), Verb::Del, &call(), &json!({})).unwrap_err();
        let DelegateError::TimedOut { stderr, .. } = &error else { panic!("{error:?}") };
        let heard = stderr == "waiting";
        assert!(heard || stderr.is_empty() && limit < GENEROUS, "{limit:?}: {error}");
        assert_eq!(CniError::from(error).code, ErrorCode::TryAgain);
        if heard {
            break;
        }
        limit *= 2;
    }
    for process in ["child", "grandchild"] {
        await_end(&directory, process);
    }
    // It was waited for: its id is nobody's.
    assert!(!Path::new(&format!("/proc/{}", directory.read("child").trim())).exists());
}

/// As Debian's dhcp plugin may: what it left running has the pipes still.
#[test]
fn a_server_that_a_plugin_leaves_is_not_waited_for() {
    let directory = Directory::new();
    let answer = directory.add("sleep 1000 & echo $! >server; echo '{}'").unwrap();
    assert_eq!(answer, Some(json!({})));
    assert!(alive(&directory, "server"));
    let pid: u32 = directory.read("server").trim().parse().unwrap();
    let status = Command::new("kill").arg(pid.to_string()).status().unwrap();
    assert!(status.success());
}

#[test]
fn configurations_and_lists_are_read_with_the_path_of_what_is_wrong() {
    let single = chain(json!({ "type": "bridge", "bridge": "b0" })).unwrap();
    assert_eq!((single.name(), single.version()), (&network(), SpecVersion::V1_0_0));
    let own = json!({ "name": "own", "cniVersion": "0.4.0", "plugins": [{ "type": "a" }, { "type": "b" }] });
    let own = chain(own).unwrap();
    assert_eq!((own.name().as_str(), own.version()), ("own", SpecVersion::V0_4_0));
    assert_eq!(chain(json!({ "type": "a", "cniVersion": "0.3.0" })).unwrap().version(), SpecVersion::V0_3_1);
    for (value, says) in [
        (json!("bridge"), "networks[0].delegate: "),
        (json!({}), "networks[0].delegate.type: missing"),
        (json!({ "type": 1 }), "networks[0].delegate.type: 1"),
        (json!({ "plugins": [] }), "networks[0].delegate.plugins: an empty list"),
        (json!({ "plugins": [{ "type": "a" }, {}] }), "networks[0].delegate.plugins[1].type: missing"),
        (json!({ "plugins": {} }), "networks[0].delegate.plugins: "),
        (json!({ "type": "a", "cniVersion": "0.2.0" }), "networks[0].delegate.cniVersion: "),
        (json!({ "type": "a", "cniVersion": "0.3" }), "networks[0].delegate.cniVersion: "),
        (json!({ "type": "a", "name": "a/b" }), "networks[0].delegate.name: "),
        (json!({ "type": "a", "disableCheck": 1 }), "networks[0].delegate.disableCheck: "),
    ] {
        let error = chain(value).unwrap_err();
        assert!(error.starts_with(says), "{error}");
    }
}

/// Notes what it was called for, and with what, in files of its own; adds its name to the result.
const NOTES: &str = r#"name=$(basename $0); conf=$(cat); echo "$CNI_COMMAND $name" >>order; echo "$conf" >$name.$CNI_COMMAND
[ -e fail-$name-$CNI_COMMAND ] && { echo '{"code": 200, "msg": "'$name' was told to"}'; exit 1; }
[ $CNI_COMMAND = ADD ] && echo '{"cniVersion": "1.1.0", "interfaces": [{"name": "'$name'"}], "theirs": {"kept": true}}'
exit 0"#;

#[test]
fn a_list_is_added_in_order_and_deleted_in_reverse_with_results_handed_on() {
    let directory = scripted(&[("a", NOTES), ("b", NOTES), ("c", NOTES)]);
    let plugins = directory.plugins(GENEROUS);
    let list = chain(json!({
        "cniVersion": "1.1.0", "name": "list",
        "plugins": [{ "type": "a" }, { "type": "b", "capabilities": { "mac": true } }, { "type": "c", "own": 1 }],
    }))
    .unwrap();
    let capabilities = Map::from_iter([("mac".to_owned(), json!("02:00:00:00:00:01"))]);
    let mut heard = Vec::new();
    let result = list.add(&plugins, &call(), &capabilities, |progress| {
        heard.push(match progress {
            Progress::Started(group) if group > 1 => json!("starts"),
            Progress::Started(_) => json!("no group"),
            Progress::Told(result) => result["interfaces"][0]["name"].clone(),
        });
        Ok(())
    });
    let result = result.unwrap();
    assert_eq!(heard, ["starts", "a", "starts", "b", "starts", "c"]);
    assert_eq!((&result["interfaces"][0]["name"], &result["theirs"]["kept"]), (&json!("c"), &json!(true)));
    let conf = |file: &str| serde_json::from_str::<Value>(&directory.read(file)).unwrap();
    assert_eq!(conf("a.ADD"), json!({ "type": "a", "name": "list", "cniVersion": "1.1.0" }));
    assert_eq!(conf("b.ADD")["runtimeConfig"], json!({ "mac": "02:00:00:00:00:01" }));
    assert_eq!(conf("c.ADD")["prevResult"]["interfaces"][0]["name"], "b");
    assert_eq!(conf("c.ADD")["prevResult"]["theirs"]["kept"], true);
    assert!(conf("c.ADD").get("runtimeConfig").is_none());

    assert_eq!(list.check(&plugins, &call(), &capabilities, &result), []);
    assert_eq!(conf("a.CHECK")["prevResult"], result, "the last one's result");
    list.status(&plugins, &call()).unwrap();
    let valid = json!([{ "containerID": "c1", "ifname": "net1" }]);
    assert_eq!(list.gc(&plugins, &call(), &valid), []);
    assert_eq!(conf("b.GC")["cni.dev/valid-attachments"], valid);
    fs::write(directory.path().join("fail-b-DEL"), "").unwrap();
    let errors = list.del(&plugins, &call(), &capabilities, Some(&result));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].message.contains("b was told to"), "{}", errors[0]);
    let order: Vec<_> = directory.read("order").lines().map(str::to_owned).collect();
    let expected = [
        "ADD a", "ADD b", "ADD c", "CHECK a", "CHECK b", "CHECK c", "STATUS a", "STATUS b", "STATUS c", "GC a", "GC b",
        "GC c", "DEL c", "DEL b", "DEL a",
    ];
    assert_eq!(order, expected);
}

#[test]
fn verbs_that_a_version_lacks_are_not_called() {
    for (version, verbs) in
        [("0.3.1", ["DEL"].as_slice()), ("1.0.0", &["CHECK", "DEL"]), ("1.1.0", &["CHECK", "STATUS", "GC", "DEL"])]
    {
        let directory = scripted(&[("a", NOTES)]);
        let plugins = directory.plugins(GENEROUS);
        let one = chain(json!({ "cniVersion": version, "type": "a" })).unwrap();
        one.check(&plugins, &call(), &Map::new(), &json!({}));
        one.status(&plugins, &call()).unwrap();
        one.gc(&plugins, &call(), &json!([]));
        one.del(&plugins, &call(), &Map::new(), Some(&json!({ "cniVersion": version })));
        let order = directory.read("order");
        assert_eq!(order.lines().map(|l| l.trim_end_matches(" a")).collect::<Vec<_>>(), verbs, "{version}");
        // libcni gives DEL a result since 0.4.0.
        assert_eq!(directory.read("a.DEL").contains("prevResult"), version > "0.3.1");
    }
}

#[test]
fn a_failing_list_stops_and_a_result_that_is_none_is_refused() {
    let directory = scripted(&[("a", NOTES), ("b", NOTES)]);
    fs::write(directory.path().join("fail-a-ADD"), "").unwrap();
    let list = chain(json!({ "plugins": [{ "type": "a" }, { "type": "b" }] })).unwrap();
    let error = list.add(&directory.plugins(GENEROUS), &call(), &Map::new(), |_| Ok(())).unwrap_err();
    assert_eq!((error.code.number(), directory.read("order").as_str()), (200, "ADD a\n"));
    for answer in
        [r#"{"cniVersion": "9.9.9"}"#, r#"{"ips": {}}"#, r#"{"ips": ["10.0.0.1/24"]}"#, r#"{"cniVersion": 1}"#]
    {
        let directory = scripted(&[("a", &format!("echo '{answer}'"))]);
        let one = chain(json!({ "type": "a" })).unwrap();
        let error = one.add(&directory.plugins(GENEROUS), &call(), &Map::new(), |_| Ok(())).unwrap_err();
        assert!(error.message.contains("no CNI result"), "{error}");
    }
    // A plugin that is already rid of the container has done its part.
    let directory = scripted(&[("a", "echo '{\"code\": 3, \"msg\": \"unknown\"}'; exit 1")]);
    let one = chain(json!({ "type": "a" })).unwrap();
    assert_eq!(one.del(&directory.plugins(GENEROUS), &call(), &Map::new(), None), []);
}

/// Go's plugins refuse a result of no version (`types/100`, `NewResult`).
#[test]
fn a_result_without_its_version_is_handed_on_in_that_of_the_configuration() {
    for answer in ["{}", r#"{"cniVersion": ""}"#, r#"{"cniVersion": null}"#, r#"{"cniVersion": "0.3.0"}"#] {
        let directory = scripted(&[("a", &format!("echo '{answer}'")), ("b", NOTES)]);
        let plugins = directory.plugins(GENEROUS);
        let list = chain(json!({ "cniVersion": "0.4.0", "plugins": [{ "type": "a" }, { "type": "b" }] })).unwrap();
        let mut heard = Vec::new();
        list.add(&plugins, &call(), &Map::new(), |progress| {
            if let Progress::Told(result) = progress {
                heard.push(result["cniVersion"].clone());
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(heard, ["0.4.0", "1.1.0"], "what a plugin says itself stays");
        let conf: Value = serde_json::from_str(&directory.read("b.ADD")).unwrap();
        assert_eq!(conf["prevResult"]["cniVersion"], "0.4.0", "{answer}");
    }
}

#[test]
fn arguments_of_the_runtime_go_before_those_of_the_configuration() {
    let list = json!({ "plugins": [
        { "type": "a", "args": { "cni": { "labels": [], "own": 1 } } }, { "type": "b", "args": 3 },
        { "type": "c", "args": { "com.example": { "vlan": 7 } } },
    ] });
    let mut list = chain(list).unwrap();
    let before = list.clone();
    list.give_args(&Map::new());
    assert_eq!(list, before);
    let labels = json!({ "labels": [{ "key": "app", "value": "db" }] });
    list.give_args(labels.as_object().unwrap());
    assert_eq!(json!(list)["plugins"][0]["args"]["cni"], json!({ "labels": labels["labels"], "own": 1 }));
    assert_eq!(json!(list)["plugins"][1]["args"]["cni"], labels);
    assert_eq!(json!(list)["plugins"][2]["args"], json!({ "com.example": { "vlan": 7 }, "cni": labels }));
    assert!(!list.asks_us());
    for ours in [json!({ "type": "dcenet" }), json!({ "type": "bridge", "ipam": { "type": "dcenet" } })] {
        assert!(chain(json!({ "plugins": [{ "type": "a" }, ours] })).unwrap().asks_us());
    }
}

#[test]
fn nothing_is_done_before_the_group_is_noted_and_what_is_left_of_it_can_be_ended() {
    // As Go's plugins do: it acts when it has read its configuration.
    let directory = scripted(&[("a", "cat >/dev/null; touch ran; echo '{}'")]);
    let plugins = directory.plugins(GENEROUS);
    let one = chain(json!({ "type": "a" })).unwrap();
    let error =
        one.add(&plugins, &call(), &Map::new(), |_| Err(CniError::new(ErrorCode::Io, "disk full"))).unwrap_err();
    assert!(error.message.contains("disk full"), "{error}");
    assert!(!directory.path().join("ran").exists());

    directory.install("a", "cat >/dev/null; sleep 1000 & echo $! >grandchild; echo '{}'");
    let mut group = 0;
    one.add(&plugins, &call(), &Map::new(), |progress| {
        if let Progress::Started(started) = progress {
            group = started;
        }
        Ok(())
    })
    .unwrap();
    assert!(alive(&directory, "grandchild"));
    // Another container's is let be.
    Plugins::end_group(group, &"other".parse().unwrap()).unwrap();
    assert!(alive(&directory, "grandchild"));
    Plugins::end_group(group, &"c1".parse().unwrap()).unwrap();
    assert!(!alive(&directory, "grandchild"));
    Plugins::end_group(group, &"c1".parse().unwrap()).unwrap();
}
