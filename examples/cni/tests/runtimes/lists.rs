//! Lists of our plugin and Debian's, by the sequence of a runtime with libcni: cached results, CHECK, GC and STATUS.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use dcenet_core::test_support::{Rung, require_with};
use serde_json::{Value, json};

use crate::common::{Node, Pod, elements, has_nft};
use crate::libcni::{self, Runtime};
use crate::{has, without_surprises};

const PLUGINS: &str = "/usr/lib/cni";
const LONG: Duration = Duration::from_secs(30);

fn is_here() -> bool {
    has(&[("/usr/lib/cni/bridge", "containernetworking-plugins"), ("/usr/sbin/iptables", "iptables")]) && has_nft()
}

/// A node whose one pool has IPv4 addresses, which are free as soon as they are released.
fn node() -> Node {
    let mut node = Node::new();
    node.config["ipam"]["pools"] = json!([{ "name": "v4", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1" }]);
    node.config["ipam"]["routes"] = json!([{ "dst": "0.0.0.0/0" }]);
    node.config["ipam"]["cooldown"] = json!("0s");
    without_surprises(&node.host);
    node
}

fn list(version: &str, plugins: &[Value]) -> Value {
    json!({ "cniVersion": version, "name": "shop", "plugins": plugins })
}

/// What attachments leave, of whatever plugin. Debian's rules for mapped ports are chains of their own for each pod.
fn traces(node: &Node, runtime: &Runtime<'_>) -> BTreeSet<String> {
    let mut traces: BTreeSet<String> = node.host.state().lines().map(str::to_owned).collect();
    traces.extend(elements(node));
    traces.extend(node.host.records());
    traces.extend(node.store());
    traces.extend(runtime.cached());
    let rules = node.host.root().sh("iptables -t nat -S");
    traces.extend(rules.lines().filter(|l| l.contains("CNI-DN-")).map(str::to_owned));
    let held = std::fs::read_dir(node.host.directory().join("host-local/shop")).into_iter().flatten().flatten();
    traces.extend(held.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with("10.")));
    traces
}

fn call(node: &Node, to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    node.host.root().run(|| TcpStream::connect_timeout(&to, LONG)).unwrap_or_else(|e| panic!("{to}: {e}"));
}

fn warm(node: &Node, runtime: &Runtime<'_>) {
    let first = node.pod("first");
    runtime.add(&first).unwrap();
    runtime.del(&first).unwrap();
}

fn mapped() -> Value {
    json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }])
}

#[test]
fn debians_plugins_go_behind_ours() {
    if !is_here() {
        return;
    }
    let node = node();
    let plugins = [
        node.config.clone(),
        // Where it keeps what the device had before is `/run/cni/tuning` otherwise, which is everybody's.
        json!({
            "type": "tuning", "dataDir": node.host.directory().join("tuning"),
            "sysctl": { "net.core.somaxconn": "500" }, "mtu": 1400,
        }),
        json!({ "type": "bandwidth", "ingressRate": 800_000_000, "ingressBurst": 80_000_000 }),
        json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }),
    ];
    let mut runtime = Runtime::new(&node.host, list("1.0.0", &plugins));
    runtime.capabilities.insert("portMappings".to_owned(), mapped());
    warm(&node, &runtime);
    let before = traces(&node, &runtime);
    let pod = node.pod("web");
    let result = runtime.add(&pod).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.20.0.3/24", "{result}");
    assert!(node.host.directory().join("tuning").is_dir());
    assert_eq!(pod.netns.sh("cat /proc/sys/net/core/somaxconn").trim(), "500");
    let listener = pod.netns.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    call(&node, "10.20.0.3:80");
    call(&node, "127.0.0.1:8080");
    drop(listener);
    // Theirs changed the device: ours calls what it made right, whoever went on from there. The last of theirs looks for
    // what it did among the rules of the other family, where it did nothing.
    let failure = runtime.check(&pod).unwrap_err();
    assert_eq!(failure.plugin, "portmap", "{failure:?}");
    assert!(failure.error["msg"].as_str().unwrap().contains("could not check ipv6 dnat"), "{failure:?}");
    // The twin: what ours made is amiss, and ours tells.
    pod.netns.sh("ip addr del 10.20.0.3/24 dev eth0");
    let failure = runtime.check(&pod).unwrap_err();
    assert_eq!((failure.plugin.as_str(), &failure.error["code"]), ("dcenet", &json!(120)), "{failure:?}");
    runtime.del(&pod).unwrap();
    assert_eq!(traces(&node, &runtime), before);
    // Once more, without anything kept, and without the namespace.
    pod.remove_namespace();
    runtime.del(&pod).unwrap();
    assert_eq!(traces(&node, &runtime), before);
}

#[test]
fn ours_goes_between_debians() {
    if !is_here() {
        return;
    }
    let node = node();
    let theirs = json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": node.host.directory().join("host-local"),
            "ranges": [[{ "subnet": "10.20.0.0/24", "gateway": "10.20.0.1" }]], "routes": [{ "dst": "0.0.0.0/0" }],
        },
    });
    let mut ours = node.config.clone();
    for key in ["link", "ipam"] {
        ours.as_object_mut().unwrap().remove(key);
    }
    ours["nat"] = json!({ "masquerade": true });
    ours["capabilities"] = json!({ "portMappings": true });
    let tuning = json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } });
    let mut runtime = Runtime::new(&node.host, list("1.0.0", &[theirs, ours, tuning]));
    runtime.capabilities.insert("portMappings".to_owned(), mapped());
    warm(&node, &runtime);
    let before = traces(&node, &runtime);
    let pod = node.pod("web");
    let result = runtime.add(&pod).unwrap();
    let listener = pod.netns.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    call(&node, "127.0.0.1:8080");
    drop(listener);
    runtime.check(&pod).unwrap();
    assert!(result["ips"][0]["address"].as_str().unwrap().starts_with("10.20.0."), "{result}");
    // The twin: the translation is gone, and ours tells.
    node.host.root().sh("nft delete table inet dcenet");
    assert_eq!(runtime.check(&pod).unwrap_err().plugin, "dcenet");
    runtime.del(&pod).unwrap();
    // The table comes back with the next pod.
    warm(&node, &runtime);
    assert_eq!(traces(&node, &runtime), before);
}

/// With 1.1.0 a runtime collects what it lost: by DEL of what it still has on file, and by GC of each plugin.
#[test]
fn gc_collects_what_is_on_file_and_what_is_not() {
    if !is_here() {
        return;
    }
    let mut node = node();
    node.config["nat"] = json!({ "masquerade": true });
    let runtime = Runtime::new(&node.host, list("1.1.0", std::slice::from_ref(&node.config)));
    runtime.status().unwrap();
    let before_any = node.store();
    let [alive, on_file, forgotten] = ["alive", "file", "forgotten"].map(|name| node.pod(name));
    runtime.add(&alive).unwrap();
    let before = traces(&node, &runtime);
    for pod in [&on_file, &forgotten] {
        runtime.add(pod).unwrap();
        pod.remove_namespace();
    }
    runtime.forget(&forgotten);
    // Nobody collects: all but the devices stays.
    let left = traces(&node, &runtime).difference(&before).count();
    assert!(left >= 5, "{left}");
    let failures = runtime.gc(&[&alive], &[&on_file, &forgotten]);
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(traces(&node, &runtime), before);
    runtime.check(&alive).unwrap();
    runtime.del(&alive).unwrap();
    assert_eq!(node.store(), before_any);
    // Nothing can be added where no state can be kept, and STATUS says so.
    std::fs::remove_dir_all(node.host.directory().join("state")).unwrap();
    std::fs::write(node.host.directory().join("state"), "").unwrap();
    let failure = runtime.status().unwrap_err();
    assert_eq!(failure.error["code"], 50, "{failure:?}");
}

/// Debian's plugins, 1.1.1, refuse 1.1.0. A list of both fails at theirs, and DEL with it before it comes to ours; what ours made is
/// collected.
#[test]
fn what_a_refusing_plugin_leaves_of_ours_is_collected() {
    if !is_here() {
        return;
    }
    let node = node();
    if !refuses(&node, "tuning", "1.1.0") {
        return;
    }
    warm_alone(&node);
    let tuning = json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } });
    let runtime = Runtime::new(&node.host, list("1.1.0", &[node.config.clone(), tuning]));
    let before = traces(&node, &runtime);
    let pod: Pod = node.pod("web");
    let failure = runtime.add(&pod).unwrap_err();
    assert_eq!((failure.plugin.as_str(), &failure.error["code"]), ("tuning", &json!(1)), "{failure:?}");
    assert_eq!(runtime.del(&pod).unwrap_err().plugin, "tuning");
    assert_ne!(traces(&node, &runtime), before);
    let kept = node.pod("kept");
    let failures = runtime.gc(&[&kept], &[]);
    assert_eq!(failures.iter().map(|f| f.plugin.as_str()).collect::<Vec<_>>(), ["tuning"], "{failures:?}");
    assert_eq!(traces(&node, &runtime), before);
}

/// Whether one of theirs does not know a version of the specification, by its own word (CNI 1.1.0, section 4, "VERSION").
fn refuses(node: &Node, plugin: &str, version: &str) -> bool {
    let program = Path::new(PLUGINS).join(plugin);
    let about = json!({ "cniVersion": "1.0.0" });
    let answer = libcni::run(&node.host, &program, PLUGINS, "VERSION", None, &[], &about).unwrap();
    let known = answer["supportedVersions"].as_array().unwrap_or_else(|| panic!("{answer}"));
    require_with(Rung::Services, || {
        let knows = known.iter().any(|known| known == version);
        knows.then(|| format!("{} knows {version}: install one that does not, as 1.1.1", program.display()))
    })
}

fn warm_alone(node: &Node) {
    warm(node, &Runtime::new(&node.host, list("1.1.0", std::slice::from_ref(&node.config))));
}
