//! Passwords, certificates, and what is said about wrong ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dcenet_ipam::IpamConfig;
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::store::etcd::{EtcdConfig, EtcdStore};
use dcenet_ipam::store::{Change, Outcome, Store, StoreError, Watch};
use pollster::block_on;

use super::{SOON, can_run, commit, memory_dir, open, put, read};

fn refused(config: &EtcdConfig) -> String {
    EtcdStore::open(config).unwrap_err().to_string()
}

#[test]
fn a_wrong_configuration_is_refused_with_field_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).unwrap();
        Some(dir.path().join(name))
    };
    let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let (ca, text, absent) = (file("ca", pem), file("text", "hello"), Some(dir.path().join("absent")));
    let key = file("key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let base = |endpoint: &str| EtcdConfig { endpoints: vec![endpoint.to_owned()], ..Default::default() };
    let plain = || base("http://127.0.0.1:1");
    let tls = || EtcdConfig { ca: ca.clone(), ..base("https://127.0.0.1:1") };
    let cases: &[(EtcdConfig, &[&str])] = &[
        (EtcdConfig::default(), &["ipam.store.endpoints", "name at least one"]),
        (base("127.0.0.1:2379"), &["ipam.store.endpoints[0]", "127.0.0.1:2379", "write http://HOST:PORT"]),
        (base("ftp://h:1"), &["ipam.store.endpoints[0]", "neither http nor https"]),
        (base("http://h:1/x"), &["ipam.store.endpoints[0]", "not a host and a port"]),
        (base("https://h:1"), &["ipam.store.endpoints[0]", "no CA certificate"]),
        (EtcdConfig { ca: ca.clone(), ..plain() }, &["ipam.store.endpoints[0]", "would not use them"]),
        (EtcdConfig { ca: absent.clone(), ..tls() }, &["ipam.store.ca", "absent", "No such file"]),
        (EtcdConfig { ca: text.clone(), ..tls() }, &["ipam.store.ca", "text", "certificate in PEM form"]),
        (EtcdConfig { cert: ca.clone(), ..tls() }, &["ipam.store.key", "ca", "stands alone"]),
        (EtcdConfig { key: key.clone(), cert: text.clone(), ..tls() }, &["ipam.store.cert", "text"]),
        (EtcdConfig { key: ca.clone(), cert: ca.clone(), ..tls() }, &["ipam.store.key", "no private key in PEM"]),
        (EtcdConfig { key: key.clone(), cert: ca.clone(), ..tls() }, &["key", "ca"]),
        (EtcdConfig { key, ..plain() }, &["ipam.store.key", "without ipam.store.ca"]),
        (EtcdConfig { username: Some("u".into()), ..plain() }, &["ipam.store.username", "passwordFile"]),
        (EtcdConfig { password_file: text.clone(), ..plain() }, &["ipam.store.passwordFile", "username"]),
        (
            EtcdConfig { username: Some("u".into()), password_file: absent, ..plain() },
            &["ipam.store.passwordFile", "absent"],
        ),
        (EtcdConfig { prefix: Some(String::new()), ..plain() }, &["ipam.store.prefix", "/dcenet/ipam/"]),
        (EtcdConfig { max_operations: Some(3), ..plain() }, &["ipam.store.maxOperations", "at least"]),
        (EtcdConfig { timeout: Some(Duration::ZERO), ..plain() }, &["ipam.store.timeout", "at least"]),
    ];
    for (config, expected) in cases {
        let error = refused(config);
        assert!(expected.iter().all(|part| error.contains(part)), "{config:?}: {error}, expected {expected:?}");
    }
    let json = r#"{ "store": { "kind": "etcd", "endpoints": ["http://h:1"], "passwordfile": "x" }, "pools": [] }"#;
    let error = serde_json::from_str::<IpamConfig>(json).unwrap_err().to_string();
    assert!(error.contains("passwordfile") && error.contains("passwordFile"), "{error}");
    let json = r#"{ "store": { "kind": "etcd", "endpoints": ["http://h:1"], "timeout": "2s", "passwordFile": "p",
        "username": "u", "prefix": "/x/" }, "pools": [] }"#;
    let config: IpamConfig = serde_json::from_str(json).unwrap();
    assert_eq!(serde_json::from_value::<IpamConfig>(serde_json::to_value(&config).unwrap()).unwrap(), config);
}

/// No such member: an error that can be tried again, and names it.
#[test]
fn nobody_at_home_is_an_error_and_no_unknown_outcome() {
    let config = EtcdConfig {
        endpoints: vec!["http://127.0.0.1:1".to_owned(), "http://127.0.0.2:1".to_owned()],
        timeout: Some(Duration::from_millis(300)),
        ..Default::default()
    };
    let store = open(&config);
    let error = block_on(store.commit(&put("a", "1"))).unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(text) if text.contains("127.0.0.")), "{error}");
    assert!(matches!(block_on(store.read(&[b"a".to_vec()])), Err(StoreError::Unavailable(_))));
    assert!(matches!(block_on(store.watch(b"a", 0)).map(drop), Err(StoreError::Unavailable(_))));
}

#[test]
fn users_are_let_in_by_password_and_no_further_than_their_role() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    // Tokens that expire while the store is open.
    let cluster = Cluster::start_with(1, dir.path(), "http", &["--auth-token-ttl", "2"]);
    let password = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).unwrap();
        Some(dir.path().join(name))
    };
    let user = |name: &str, file: Option<PathBuf>| EtcdConfig {
        username: Some(name.to_owned()),
        password_file: file,
        ..cluster.config()
    };
    guard_by_password(&cluster);
    let good = user("ipam", password("good", "secret-7\n"));
    let store = open(&good);
    let mut watch = block_on(store.watch(b"", 0)).unwrap();
    let revision = commit(&*store, &put("a", "1"));
    let denied = |config: &EtcdConfig| {
        let store = open(config);
        for error in
            [block_on(store.commit(&put("a", "2"))).unwrap_err(), block_on(store.scan(b"", None, 1)).unwrap_err()]
        {
            assert!(matches!(error, StoreError::Denied(_)), "{error:?}");
            let text = error.to_string();
            assert!(!text.contains("secret"), "the password is nobody's business: {text}");
        }
    };
    denied(&cluster.config());
    denied(&user("ipam", password("wrong", "secret-8")));
    denied(&user("nobody", password("other", "secret-9")));
    denied(&EtcdConfig { prefix: Some("/elsewhere/".into()), ..good });
    // Longer than a token lives without use.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(read(&*store, "a").map(|e| e.version), Some(revision));
    assert_eq!(block_on(watch.next(super::SOON)).unwrap().map(|c| c.revision()), Some(revision));
}

/// From now on the user `ipam` with the password `secret-7` may do what it likes below the prefix, and nobody else may
/// do anything but `root` with the password `root`.
fn guard_by_password(cluster: &Cluster) {
    for arguments in [
        &["user", "add", "root:root"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "ipam:secret-7"],
        &["role", "add", "ipam"],
        &["role", "grant-permission", "ipam", "readwrite", "/dcenet/ipam/", "--prefix"],
        &["user", "grant-role", "ipam", "ipam"],
        &["auth", "enable"],
    ] {
        cluster.etcdctl(arguments);
    }
}

fn as_root(cluster: &Cluster, arguments: &[&str]) {
    cluster.etcdctl(&[&["--user", "root:root"], arguments].concat());
}

/// What a watch tells up to and with a revision: each at most once, in order, and errors only of being let in.
fn told_up_to(watch: &mut dyn Watch, last: u64) -> Vec<u64> {
    let deadline = Instant::now() + SOON;
    let mut told: Vec<u64> = Vec::new();
    while told.last().is_none_or(|newest| *newest < last) {
        assert!(Instant::now() < deadline, "{last} was not told after {told:?}");
        match block_on(watch.next(Duration::from_secs(5))) {
            Ok(Some(Change::Writes { revision, .. })) => told.push(revision),
            Ok(Some(gap)) => panic!("{gap:?} after {told:?}, and nothing was compacted"),
            Ok(None) | Err(StoreError::Denied(_) | StoreError::Unavailable(_)) => {}
            Err(error) => panic!("{error} after {told:?}"),
        }
    }
    told
}

#[test]
fn a_role_that_is_revoked_and_granted_again_stops_and_resumes_what_is_open() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    guard_by_password(&cluster);
    fs::write(dir.path().join("password"), "secret-7").unwrap();
    let config = EtcdConfig {
        username: Some("ipam".to_owned()),
        password_file: Some(dir.path().join("password")),
        ..cluster.config()
    };
    let store = open(&config);
    let mut watch = block_on(store.watch(b"", 0)).unwrap();
    let mut made = vec![commit(&*store, &put("a", "0"))];
    assert_eq!(told_up_to(&mut *watch, made[0]), made);
    for round in 1..=3 {
        as_root(&cluster, &["user", "revoke-role", "ipam", "ipam"]);
        // Denied, and not applied: neither unknown nor a fault of the caller, however often it is tried.
        for _ in 0..2 {
            let refused = block_on(store.commit(&put("a", "refused")));
            assert!(matches!(refused, Err(StoreError::Denied(_))), "round {round}: {refused:?}");
            let refused = block_on(store.read(&[b"a".to_vec()]));
            assert!(matches!(refused, Err(StoreError::Denied(_))), "round {round}: {refused:?}");
        }
        let refused = block_on(store.watch(b"", made[0])).map(drop);
        assert!(matches!(refused, Err(StoreError::Denied(_))), "round {round}: {refused:?}");
        // Written by another meanwhile.
        as_root(&cluster, &["put", "/dcenet/ipam/k/b", &format!("by root {round}")]);
        as_root(&cluster, &["user", "grant-role", "ipam", "ipam"]);
        let by_root = read(&*store, "b").expect("it may be read again").version;
        made.push(by_root);
        made.push(commit(&*store, &put("a", &round.to_string())));
        assert_eq!(read(&*store, "a").unwrap().value, round.to_string().into_bytes());
        let last = *made.last().unwrap();
        assert_eq!(told_up_to(&mut *watch, last), made[made.len() - 2..], "round {round}");
        let mut late = block_on(store.watch(b"", made[0])).unwrap();
        assert_eq!(told_up_to(&mut *late, last), made[1..], "round {round}");
    }
    assert!(cluster_holds(&cluster, b"by root 3") && !cluster_holds(&cluster, b"refused"));
}

/// Whether any value below the prefix is this, as etcdctl reads it.
fn cluster_holds(cluster: &Cluster, value: &[u8]) -> bool {
    let text = cluster.etcdctl(&["--user", "root:root", "get", "--prefix", "/dcenet/ipam/k/", "--print-value-only"]);
    text.lines().any(|line| line.as_bytes() == value)
}

#[test]
fn a_user_stays_let_in_while_leaders_change() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let mut cluster = Cluster::start(3, dir.path());
    guard_by_password(&cluster);
    fs::write(dir.path().join("password"), "secret-7").unwrap();
    fs::write(dir.path().join("wrong"), "secret-8").unwrap();
    let user = |file: &str| EtcdConfig {
        username: Some("ipam".to_owned()),
        password_file: Some(dir.path().join(file)),
        timeout: Some(Duration::from_secs(20)),
        ..cluster.config()
    };
    let (store, wrong) = (open(&user("password")), user("wrong"));
    let mut watch = block_on(store.watch(b"n", 0)).unwrap();
    // Sent again as it is until it is known; a user that is let in is never denied.
    let increment = |store: &dyn Store, number: usize| -> u64 {
        let (batch, deadline) = (put("n", &number.to_string()), Instant::now() + SOON);
        loop {
            match block_on(store.commit(&batch)) {
                Ok(Outcome::Committed { revision }) => return revision,
                Ok(Outcome::Unknown { .. }) | Err(StoreError::Unavailable(_)) => {}
                other => panic!("commit {number}: {other:?}"),
            }
            assert!(Instant::now() < deadline, "commit {number}");
        }
    };
    let mut made = vec![increment(&*store, 0)];
    let mut leaders = Vec::new();
    for round in 0..3 {
        let deadline = Instant::now() + SOON;
        let leader = loop {
            assert!(Instant::now() < deadline, "there is no leader");
            match cluster.leader() {
                Some(leader) => break leader,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        cluster.kill(leader);
        for _ in 0..5 {
            made.push(increment(&*store, made.len()));
        }
        let next = cluster.leader();
        assert!(next.is_some_and(|next| next != leader), "round {round}: {next:?} after {leader}");
        leaders.push(leader);
        // Tokens are in a member's memory: it has none when it is back.
        cluster.restart(leader);
        assert!(cluster.wait());
        made.push(increment(&*store, made.len()));
        let denied = block_on(open(&wrong).read(&[b"n".to_vec()]));
        assert!(matches!(denied, Err(StoreError::Denied(_))), "round {round}: {denied:?}");
    }
    assert_eq!(told_up_to(&mut *watch, *made.last().unwrap()), made, "{leaders:?} were killed");
    assert_eq!(read(&*store, "n").unwrap().value, (made.len() - 1).to_string().into_bytes());
}

/// A certificate for 127.0.0.1, signed by an authority of the same directory, or the authority itself.
pub(super) fn certificate(dir: &Path, name: &str, authority: Option<&str>) -> (PathBuf, PathBuf) {
    let path = |file: String| dir.join(file);
    let (cert, key) = (path(format!("{name}.pem")), path(format!("{name}.key")));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    command.args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"]).arg("-keyout").arg(&key);
    if let Some(authority) = authority {
        command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
        command.arg("-CA").arg(path(format!("{authority}.pem"))).arg("-CAkey").arg(path(format!("{authority}.key")));
    }
    let output = command.arg("-out").arg(&cert).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (cert, key)
}

#[test]
fn servers_and_clients_know_each_other_by_certificate() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let (ca, _) = certificate(dir.path(), "ca", None);
    let (other_ca, _) = certificate(dir.path(), "other-ca", None);
    let (cert, key) = certificate(dir.path(), "server", Some("ca"));
    let (client_cert, client_key) = certificate(dir.path(), "client", Some("ca"));
    let (false_cert, false_key) = certificate(dir.path(), "false-client", Some("other-ca"));
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let (ca_text, cert_text, key_text) = (text(&ca), text(&cert), text(&key));
    let arguments =
        ["--cert-file", &cert_text, "--key-file", &key_text, "--client-cert-auth", "--trusted-ca-file", &ca_text];
    let cluster = Cluster::start_with(1, dir.path(), "https", &arguments);
    let base = EtcdConfig { timeout: Some(Duration::from_secs(5)), ca: Some(ca), ..cluster.config() };
    let good = EtcdConfig {
        cert: Some(client_cert),
        key: Some(client_key),
        timeout: Some(Duration::from_secs(60)),
        ..base.clone()
    };
    let store = open(&good);
    let revision = commit(&*store, &put("a", "1"));
    assert_eq!(read(&*store, "a").map(|e| e.version), Some(revision));
    let refused = [
        // The server is not who the authority says.
        EtcdConfig { ca: Some(other_ca), timeout: base.timeout, ..good },
        // The server does not know the client.
        base.clone(),
        EtcdConfig { cert: Some(false_cert), key: Some(false_key), ..base },
    ];
    for config in refused {
        let outcome = block_on(open(&config).read(&[b"a".to_vec()]));
        assert!(matches!(outcome, Err(StoreError::Unavailable(_))), "{outcome:?}");
    }
}
