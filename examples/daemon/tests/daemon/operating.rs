//! What an operator meets: options, configuration, metrics, flow logs.

use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;

use dcenet_core::test_support::{Rung, require};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::*;

#[test]
fn options_and_exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("dcenetd.json");
    let run = |arguments: &[&str]| {
        let output = dcenetd().args(arguments).arg("--config").arg(&config).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, stdout, _) = run(&["--help"]);
    assert!(code == Some(0) && stdout.contains("--check") && stdout.contains("Exit codes"), "{stdout}");
    let (code, stdout, _) = run(&["--version"]);
    assert_eq!((code, stdout.as_str()), (Some(0), concat!("dcenetd ", env!("CARGO_PKG_VERSION"), "\n")));
    assert_eq!(run(&["--no-such-option"]).0, Some(2));
    // What cannot be read now may be there when the service manager tries again.
    for option in [&["--check"][..], &[]] {
        let (code, _, stderr) = run(option);
        assert!(code == Some(1) && stderr.contains("dcenetd.json"), "{stderr}");
    }

    fs::write(&config, r#"{ "policy": { "defualt": "deny" } }"#).unwrap();
    for option in [&["--check"][..], &[]] {
        let (code, _, stderr) = run(option);
        assert!(code == Some(2) && stderr.contains("policy.defualt: unknown field"), "{stderr}");
        assert!(stderr.contains("did you mean `default`?"), "{stderr}");
    }

    let policies = directory.path().join("policies");
    fs::write(&config, json!({ "policy": {}, "policies": { "directory": policies } }).to_string()).unwrap();
    let (code, _, stderr) = run(&["--check"]);
    assert!(code == Some(2) && stderr.contains("policies"), "{stderr}");
    fs::create_dir(&policies).unwrap();
    fs::write(policies.join("db.yaml"), DB).unwrap();
    let (code, stdout, _) = run(&["--check"]);
    assert!(code == Some(0) && stdout.contains("nothing is wrong"), "{stdout}");
    fs::write(policies.join("db.yaml"), DB.replace("shop }", "shop, nmae: x }")).unwrap();
    let (code, _, stderr) = run(&["--check"]);
    let told = "db.yaml:4: document 0: metadata.nmae: unknown field; did you mean \"name\"?";
    assert!(code == Some(2) && stderr.contains(told), "{stderr}");
}

/// The configuration that operators are shown, with directories of the test's.
#[test]
fn the_configuration_of_the_documentation_works() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    let text = include_str!("../../README.md");
    let block = text.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a configuration");
    let directory = node.host.directory().display().to_string();
    let block = block
        .replace("/run/dcenet/bpf", &node.pins().display().to_string())
        .replace("/run/dcenet", &node.host.run_dir().display().to_string())
        .replace("/var/lib/dcenet", &format!("{directory}/state"))
        .replace("/var/log/dcenet", &directory)
        .replace("/etc/dcenet/policies", &node.policies().display().to_string());
    node.config = serde_json::from_str(&block).unwrap();
    node.put_policy("db.yaml", DB);
    let output = node.run("--check");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let daemon = node.start();
    let listen = node.config["metrics"]["listen"].as_str().unwrap().to_owned();
    let [status, _, body] = node.host.root().run(|| http_get(TcpStream::connect(listen).unwrap(), "/metrics"));
    assert!(status.ends_with("200 OK"), "{status}");
    assert_eq!(samples_of(&body)["dcenet_daemon_policies_current"], 1.0);
    assert!(daemon.stop().success());
}

#[test]
fn flows_are_counted_logged_rotated_and_sent() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.put_policy("db.yaml", DB);
    let collector = node.host.root().run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    collector.set_read_timeout(Some(PATIENCE)).unwrap();
    let file = node.host.directory().join("flows.json");
    node.config["flows"] =
        json!({ "file": file, "ipfix": { "collector": collector.local_addr().unwrap(), "observationDomain": 7 } });
    let daemon = node.start();
    for socket in ["metrics.sock", "policy.sock"] {
        let mode = fs::metadata(node.host.run_dir().join(socket)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
    let denied_to = |line: &Value| line["kind"] == "denied" && line["peer"]["workload"] == "shop/scan";
    let admitted = |line: &Value| line["kind"] == "new" && line["peer"]["workload"] == "shop/web";
    eventually("both are logged", || {
        let lines = json_lines(&file);
        lines.iter().any(denied_to) && lines.iter().any(admitted)
    });

    let samples = node.samples();
    let sum = |wanted: &[&str]| -> f64 {
        let of = |series: &&String| wanted.iter().all(|part| series.contains(part));
        samples.keys().filter(of).map(|series| samples[series]).sum()
    };
    assert_eq!(samples[r#"dcenet_ipam_addresses{space="default",pool="v4",state="bound"}"#], 3.0);
    assert_eq!(samples[r#"dcenet_daemon_endpoints{phase="enforced"}"#], 3.0);
    assert!(sum(&["dcenet_policy_flow_events_total", r#"kind="denied""#]) >= 1.0, "{samples:?}");
    assert!(sum(&["dcenet_policy_reason_packets_total", r#"reason="denied""#]) >= 1.0, "{samples:?}");
    assert!(node.get("/")[0].ends_with("404 Not Found"));

    // As logrotate does it.
    let rotated = node.host.directory().join("flows.json.1");
    fs::rename(&file, &rotated).unwrap();
    daemon.send(Signal::HUP);
    eventually("it is opened anew, flow or none", || file.exists());
    let (web, before) = (&web, json_lines(&rotated).len());
    assert!(talks(web, &db, true));
    eventually("the new file", || {
        // The signal may have come after a flow was written; the next one finds the new file.
        talks(web, &db, true) && json_lines(&file).iter().any(admitted)
    });
    assert!(json_lines(&rotated).len() >= before);

    let mut message = [0; 2048];
    let length = collector.recv(&mut message).unwrap();
    let number = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    assert_eq!((number(0), usize::from(number(2))), (10, length), "version and length, RFC 7011, section 3.1");
    assert_eq!(message[12..16], 7_u32.to_be_bytes(), "the observation domain");
}
