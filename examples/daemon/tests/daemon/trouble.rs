//! Clients that mean no good.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use dcenet_core::test_support::{Rung, require};
use serde_json::json;

use crate::common::*;

#[test]
fn clients_of_the_metrics_neither_kill_nor_keep_the_daemon() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let socket = node.host.run_dir().join("made/metrics.sock");
    node.config["metrics"]["listen"] = json!(format!("unix:{}", socket.display()));
    let daemon = node.start();
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let ask = |request: &[u8]| {
        let mut stream = connect();
        stream.write_all(request).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let before = daemon.holds();
    for length in ["9000000000000000000", "18446744073709551615", "99999999999999999999"] {
        let answer = ask(format!("GET /metrics HTTP/1.1\r\nContent-Length: {length}\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("# EOF\n"), "{answer}");
    }
    // A line that never ends is read up to its limit.
    let mut endless = connect();
    let sent = (0..1000).take_while(|_| endless.write_all(&[b'a'; 4096]).is_ok()).count();
    let mut answer = [0; 12];
    endless.read_exact(&mut answer).unwrap();
    assert!(sent > 0 && &answer == b"HTTP/1.1 400" || &answer == b"HTTP/1.1 431", "{answer:?}");

    let mut stalled: Vec<UnixStream> = (0..40).map(|_| connect()).collect();
    for stream in stalled.iter_mut().step_by(2) {
        // Whoever had to go by now cannot be written to.
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost:");
    }
    assert_eq!(node.samples()[r#"dcenet_ipam_addresses{space="default",pool="v4",state="bound"}"#], 0.0);
    let after = daemon.holds();
    assert!(after.0 <= before.0 + 16 && after.1 == before.1, "{before:?} {after:?}");
    assert!(daemon.stop().success(), "in spite of them");
    assert!(!socket.exists(), "it goes with the daemon");
}
