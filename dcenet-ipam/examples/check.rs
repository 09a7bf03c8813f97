//! Looks whether the records of a store fit together, and mends them if told to.
//!
//! ```text
//! cargo run -p dcenet-ipam --example check -- STORE [--repair] [--config FILE] [-o json|text]
//! ```
//!
//! `STORE` is the directory of a log, or what `ipam.store` says in a configuration, as JSON. `FILE` is a configuration
//! (that of a CNI network, or its `ipam` section), which tells which addresses are handed out and whether there is a
//! history; without it, neither is looked at. Nothing is changed without `--repair`, and
//! others may work on the store meanwhile.
//!
//! Ends with 0 where nothing is left to find, 1 where something is, 2 where the store could not be looked at.

#![expect(clippy::print_stderr, reason = "a tool for people")]

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use dcenet_ipam::audit::{Audit, Finding, Repaired};
use dcenet_ipam::config::StoreConfig;
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;
use serde_json::{Value, json};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments, &mut std::io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("check: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing is left to find.
pub(crate) fn run(arguments: &[String], out: &mut impl Write) -> Result<bool, Box<dyn Error>> {
    let asked = Asked::parse(arguments)?;
    let ipam = asked.open()?;
    let mut mended = Vec::new();
    let mut audit = block_on(ipam.check())?;
    // One call mends a record once: what rests on it is seen and mended by the next.
    for _ in 0..ROUNDS {
        if !asked.repair || audit.findings.iter().all(|finding| finding.remedy.is_none()) {
            break;
        }
        let outcomes = block_on(ipam.repair(&audit.findings))?;
        let done = outcomes.contains(&Repaired::Done);
        mended.extend(audit.findings.into_iter().zip(outcomes).filter(|(_, outcome)| *outcome == Repaired::Done));
        audit = block_on(ipam.check())?;
        if !done {
            break;
        }
    }
    let mended: Vec<Finding> = mended.into_iter().map(|(finding, _)| finding).collect();
    if asked.json {
        tell_json(out, &mended, &audit)?
    } else {
        tell(out, &mended, &audit)?
    }
    Ok(audit.findings.is_empty())
}

fn tell(out: &mut impl Write, mended: &[Finding], audit: &Audit) -> Result<(), Box<dyn Error>> {
    for finding in mended {
        writeln!(out, "mended: {finding}")?;
    }
    for finding in &audit.findings {
        writeln!(out, "{finding}")?;
    }
    let Audit { findings, records, revision, .. } = audit;
    writeln!(out, "{records} records at revision {revision}: {} mended, {} left", mended.len(), findings.len())?;
    Ok(())
}

fn tell_json(out: &mut impl Write, mended: &[Finding], audit: &Audit) -> Result<(), Box<dyn Error>> {
    let shown = |finding: &Finding| {
        json!({
            "severity": format!("{:?}", finding.severity()).to_lowercase(),
            "key": finding.key,
            "damage": finding.damage.to_string(),
            "remedy": finding.remedy,
        })
    };
    let of = |findings: &[Finding]| findings.iter().map(shown).collect::<Vec<Value>>();
    let all = json!({
        "records": audit.records,
        "revision": audit.revision,
        "mended": of(mended),
        "findings": of(&audit.findings),
    });
    writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    Ok(())
}

struct Asked {
    store: String,
    config: Option<String>,
    repair: bool,
    json: bool,
}

impl Asked {
    fn parse(arguments: &[String]) -> Result<Self, Box<dyn Error>> {
        let (mut store, mut config, mut repair, mut json) = (None, None, false, false);
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--repair" => repair = true,
                "--config" => config = Some(arguments.next().ok_or("--config: name a file")?.clone()),
                "-o" => match arguments.next().map(String::as_str) {
                    Some("json") => json = true,
                    Some("text") => json = false,
                    other => return Err(format!("-o: {}; write json or text", other.unwrap_or("nothing")).into()),
                },
                text if text.starts_with('-') => return Err(format!("{text} is no option; {USAGE}").into()),
                text if store.is_none() => store = Some(text.to_owned()),
                text => return Err(format!("{text} is one store too many; {USAGE}").into()),
            }
        }
        let store = store.ok_or_else(|| format!("no store; {USAGE}"))?;
        Ok(Self { store, config, repair, json })
    }

    fn open(&self) -> Result<Ipam, Box<dyn Error>> {
        let store = if self.store.starts_with('{') {
            serde_json::from_str(&self.store)?
        } else {
            let path = Path::new(&self.store);
            // Opening would make one.
            if !path.join("log").is_file() {
                return Err(format!("{}: there is no store here; name the directory with its log", self.store).into());
            }
            StoreConfig::Log { path: Some(path.to_owned()) }
        };
        let store = store.open(Path::new("."))?;
        let Some(file) = &self.config else { return Ok(Ipam::without_pools(store)?) };
        let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        let mut config: Value = serde_json::from_str(&text).map_err(|error| format!("{file}: {error}"))?;
        if let Some(section) = config.get_mut("ipam") {
            config = section.take();
        }
        let config: IpamConfig = serde_json::from_value(config).map_err(|error| format!("{file}: {error}"))?;
        Ok(Ipam::new(&config, store)?)
    }
}

const USAGE: &str = "write STORE [--repair] [--config FILE] [-o json|text]";
/// Checks after repairs.
const ROUNDS: usize = 8;
