//! Passwords and certificates that are replaced while the store is open, and nodes that share it.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::store::StoreError;
use dcenet_ipam::store::etcd::EtcdConfig;
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

use super::secure::certificate;
use super::{can_run, commit, memory_dir, open, put, read};

fn change_password(cluster: &Cluster, user: &str, password: &str) {
    let mut etcdctl = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &cluster.endpoint(0), "--user", "root:root"])
        .args(["user", "passwd", user, "--interactive=false"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    writeln!(etcdctl.stdin.take().unwrap(), "{password}").unwrap();
    assert!(etcdctl.wait().unwrap().success());
}

#[test]
fn a_password_is_changed_without_a_restart() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start_with(1, dir.path(), "http", &[]);
    for arguments in [
        &["user", "add", "root:root"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "ipam:first"],
        &["role", "add", "ipam"],
        &["role", "grant-permission", "ipam", "readwrite", "/dcenet/ipam/", "--prefix"],
        &["user", "grant-role", "ipam", "ipam"],
        &["auth", "enable"],
    ] {
        cluster.etcdctl(arguments);
    }
    let file = dir.path().join("password");
    fs::write(&file, "first\n").unwrap();
    let store = open(&EtcdConfig {
        username: Some("ipam".to_owned()),
        password_file: Some(file.clone()),
        timeout: Some(Duration::from_secs(8)),
        ..cluster.config()
    });
    let revision = commit(&*store, &put("a", "1"));

    // The cluster's half of the rotation alone locks out: tokens of the old password end with it.
    change_password(&cluster, "ipam", "second");
    let error = block_on(store.read(&[b"a".to_vec()])).unwrap_err();
    assert!(matches!(&error, StoreError::Denied(text) if text.contains("passwordFile")), "{error:?}");
    // A file that is away for a moment is waited for, as long as a call may take.
    fs::remove_file(&file).unwrap();
    let error = block_on(store.read(&[b"a".to_vec()])).unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(text) if text.contains("passwordFile")), "{error:?}");
    fs::write(&file, "second\n").unwrap();
    assert_eq!(read(&*store, "a").map(|e| e.version), Some(revision));
    assert!(commit(&*store, &put("a", "2")) > revision);
}

#[test]
fn certificates_are_replaced_without_a_restart() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let at = |name: &str| dir.path().join(name);
    for authority in ["old", "new"] {
        certificate(dir.path(), authority, None);
        certificate(dir.path(), &format!("server-{authority}"), Some(authority));
        certificate(dir.path(), &format!("client-{authority}"), Some(authority));
    }
    // What server and client use by name; both sides know both authorities while one follows the other.
    let install = |authority: &str| {
        for side in ["server", "client"] {
            for kind in ["pem", "key"] {
                fs::copy(at(&format!("{side}-{authority}.{kind}")), at(&format!("{side}.{kind}"))).unwrap();
            }
        }
        fs::copy(at(&format!("{authority}.pem")), at("ca.pem")).unwrap();
    };
    install("old");
    let path = |name: &str| at(name).to_str().unwrap().to_owned();
    let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
    let arguments = ["--cert-file", &cert, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let mut cluster = Cluster::start_with(1, dir.path(), "https", &arguments);
    let store = open(&EtcdConfig {
        ca: Some(at("ca.pem")),
        cert: Some(at("client.pem")),
        key: Some(at("client.key")),
        timeout: Some(Duration::from_secs(60)),
        ..cluster.config()
    });
    let revision = commit(&*store, &put("a", "1"));

    // The old ones are of no use to anybody from now on.
    install("new");
    cluster.kill(0);
    cluster.restart(0);
    assert_eq!(read(&*store, "a").map(|e| e.version), Some(revision));
    assert!(commit(&*store, &put("a", "2")) > revision);
}

fn ipam(cluster: &Cluster) -> Ipam {
    let config: IpamConfig =
        serde_json::from_str(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#).unwrap();
    Ipam::new(&config, open(&cluster.config())).unwrap()
}

/// A runtime that lists what it runs must not end what another node's runtime runs.
#[test]
fn what_one_node_does_not_list_is_not_stale_on_another() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start_with(1, dir.path(), "http", &[]);
    let on = |name: &str| ipam(&cluster).on_node(name.parse().unwrap(), Default::default());
    let lease = |ipam: &Ipam, container: &str| {
        let key = serde_json::json!({ "network": "net", "container": container, "ifname": "eth0" });
        block_on(ipam.lease(&LeaseRequest::new(serde_json::from_value(key).unwrap()))).unwrap();
    };
    let (one, two, nameless) = (on("n1"), on("n2"), ipam(&cluster));
    for (ipam, container) in [(&one, "alive"), (&one, "gone"), (&two, "other"), (&nameless, "nobody-s")] {
        lease(ipam, container);
    }
    let network = "net".parse().unwrap();
    let valid = [("alive".parse().unwrap(), "eth0".parse().unwrap())];
    let released: Vec<String> =
        block_on(one.retain(&network, &valid)).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(released, ["net/gone/eth0"]);
    let error = block_on(nameless.retain(&network, &valid)).unwrap_err();
    assert!(matches!(&error, LeaseError::Invalid { field, .. } if field == "ipam.node"), "{error}");
    let left = |ipam: &Ipam| block_on(ipam.bindings(None)).unwrap().len();
    assert_eq!(left(&one), 3);
    // With the node left out of the question, the same list would have ended what runs elsewhere.
    assert_eq!(block_on(one.retain_since(&network, &valid, u64::MAX)).unwrap().len(), 2);
    assert_eq!(left(&one), 1);
}
