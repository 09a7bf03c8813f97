//! From arguments to the report.

#[path = "../shared/files.rs"]
mod files;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use dcenet_policy::model::Cluster;
use dcenet_policy::reach::{Evaluator, Probe, ReachError, Simulator, reach};

/// Reads Kubernetes objects and tells for every pair of pods whether policies allow each probe, and which rule decides.
///
/// Namespaces, Pods (addresses from status.podIP and podIPs), NetworkPolicies, ClusterNetworkPolicies,
/// AdminNetworkPolicies and BaselineAdminNetworkPolicies count; other kinds are named on stderr. Exit status: 0 with a report, 2 for bad input or usage, 1 where something else fails.
#[derive(Debug, Parser)]
#[command(name = "reach", version)]
struct Options {
    /// A directory, with those below it: all files .yaml, .yml and .json, in capitals too, in the order of their paths,
    /// hidden ones apart. Links to directories are not followed, and named on stderr. Or a single file.
    #[arg(long, value_name = "DIR")]
    resources: PathBuf,
    /// What opens a connection: tcp/80, udp/dns (the destination's name of a port), sctp/7777 or icmp. May be repeated.
    #[arg(long = "probe", value_name = "PROBE", required = true)]
    probes: Vec<Probe>,
    /// Who judges: the reference evaluator, or compiled programs on packets in the virtual machine.
    #[arg(long, value_enum, default_value = "evaluator")]
    engine: EngineName,
    /// How the report is printed.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum EngineName {
    Evaluator,
    Vm,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// A line for each pair.
    Text,
    /// One object; its shape is that of dcenet_policy::reach.
    Json,
}

/// Bad input or usage.
const BAD_INPUT: u8 = 2;

/// Runs the command and returns its exit status.
pub(crate) fn run(arguments: impl IntoIterator<Item = OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(error) => {
            // Help and version were asked for; all else is bad usage.
            let wanted = error.exit_code() == 0;
            let told = if wanted { write!(out, "{error}") } else { write!(err, "{error}") };
            return if wanted && told.is_ok() { 0 } else { BAD_INPUT };
        }
    };
    match report(&options, out, err) {
        Ok(()) => 0,
        Err(error) => {
            let is_ours = error.is::<io::Error>() || matches!(error.downcast_ref(), Some(ReachError::Defect { .. }));
            // Where stderr is gone as well, the status is all that can be told.
            let _ = writeln!(err, "reach: {error}");
            if is_ours { 1 } else { BAD_INPUT }
        }
    }
}

fn report(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let (documents, mut notes) = files::read(&options.resources)?;
    notes.extend(documents.notes());
    for note in &notes {
        writeln!(err, "reach: {note}")?;
    }
    let cluster = Cluster { time: files::now(), ..documents.into_cluster() };
    if cluster.pods.is_empty() {
        return Err(format!("{}: there is no pod with an address", options.resources.display()).into());
    }
    let mut report = match options.engine {
        EngineName::Evaluator => reach(&cluster, &options.probes, &mut Evaluator::new(&cluster))?,
        EngineName::Vm => reach(&cluster, &options.probes, &mut Simulator::new(&cluster)?)?,
    };
    report.notes = notes;
    match options.output {
        Output::Text => write!(out, "{report}")?,
        Output::Json => {
            let json = serde_json::to_string_pretty(&report)?;
            writeln!(out, "{json}")?;
        }
    }
    Ok(out.flush()?)
}
