//! Who reaches whom: expected, and observed with real traffic.

use std::net::IpAddr;

use dcenet_core::netns::NetNs;

use crate::report::Report;
use crate::traffic::{Kind, probe};

/// Somebody who sends, and is sent to.
pub struct Party<'a> {
    /// As the table names it.
    pub name: &'a str,
    /// Where it is.
    pub netns: &'a NetNs,
    /// One address of each family.
    pub addresses: Vec<IpAddr>,
}

/// What passes from one party to another: TCP, UDP, ICMP.
pub type Row = (&'static str, &'static str, [bool; 3]);

/// Sends every kind of traffic over both families for every row at once, and compares.
pub fn compare(parties: &[Party<'_>], rows: &[Row], report: &mut Report) -> Result<(), Box<dyn std::error::Error>> {
    let find = |name: &str| parties.iter().find(|p| p.name == name).ok_or_else(|| format!("nobody is called {name}"));
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (from, to, expected) in rows {
            let (from, to) = (find(from)?, find(to)?);
            let mut probes = Vec::new();
            for (kind, expected) in Kind::ALL.into_iter().zip(expected) {
                for address in &to.addresses {
                    let sender = scope.spawn(move || probe(from.netns, kind, *address).map_err(|e| e.to_string()));
                    probes.push((kind, *address, *expected, sender));
                }
            }
            running.push((from.name, to.name, probes));
        }
        for (from, to, probes) in running {
            let (mut expected, mut observed) = (Vec::new(), Vec::new());
            for (kind, address, wanted, sender) in probes {
                let passed = sender.join().map_err(|_| "a probe panicked")??;
                let label = format!("{}{}", kind.name(), if address.is_ipv4() { 4 } else { 6 });
                expected.push(cell(&label, wanted));
                observed.push(cell(&label, passed));
            }
            report.expect(format!("{from:<8} -> {to:<8}"), expected.join(" "), observed.join(" "));
        }
        Ok(())
    })
}

fn cell(label: &str, passes: bool) -> String {
    format!("{label} {}", if passes { "pass" } else { "drop" })
}
