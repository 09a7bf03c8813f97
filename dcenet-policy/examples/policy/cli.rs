//! From arguments to answers.

#[path = "bundles.rs"]
mod bundles;
#[path = "../shared/files.rs"]
mod files;

use std::error::Error;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use dcenet_policy::analysis::{Thresholds, Way, access, diff, findings};
use dcenet_policy::compiler::Scope;
use dcenet_policy::model::{Cluster, PodId, Time};
use dcenet_policy::reach::{Evaluator, Probe, reach};
use dcenet_policy::render::{Omission, networkpolicy, nftables};
use dcenet_policy::sources::kubernetes::Note;
use serde::Serialize;

/// Reads Kubernetes objects, as the example `reach` does, and tells what their policies amount to.
///
/// Rules with a schedule are taken as of now, and listed.
///
/// Exit status: 0 where there is nothing to tell or all was rendered; 3 with findings, changes, rules with a schedule in
/// either, or omissions of a rendering; 2 for bad input or usage; 1 where something else fails.
#[derive(Debug, Parser)]
#[command(name = "policy", version)]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Rules that do nothing, contradict another, or open too much.
    Analyse {
        #[command(flatten)]
        input: Input,
        /// From which length of an IPv4 prefix on a block is too wide.
        #[arg(long, value_name = "LENGTH", default_value_t = 0)]
        v4: u8,
        /// From which length of an IPv6 prefix on a block is too wide.
        #[arg(long, value_name = "LENGTH", default_value_t = 0)]
        v6: u8,
        /// From how many ports of one protocol on a rule is too wide.
        #[arg(long, value_name = "COUNT", default_value_t = 65_536)]
        ports: u32,
    },
    /// What changes if the policies of one directory take the place of another's.
    Diff {
        /// A directory or file with all objects, as they are.
        #[arg(long, value_name = "DIR")]
        before: PathBuf,
        /// The same, as they shall be.
        #[arg(long, value_name = "DIR")]
        after: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Who can reach a pod, or with --from what it can reach.
    Who {
        #[command(flatten)]
        input: Input,
        /// The pod, as NAMESPACE/NAME.
        #[arg(long, value_name = "POD")]
        pod: String,
        /// Ask for what the pod can reach.
        #[arg(long)]
        from: bool,
    },
    /// The policies for another enforcer, on stdout; what it does not do as written on stderr.
    Render {
        #[command(flatten)]
        input: Input,
        /// For whom.
        #[arg(long = "for", value_enum)]
        enforcer: Enforcer,
        /// For nftables, the pods of this node only.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
    },
    /// All objects as one bundle, numbered and signed, on stdout.
    Sign {
        /// A directory or file with all objects.
        #[arg(long, value_name = "DIR")]
        resources: PathBuf,
        /// The name of the set: what has the same name takes its place.
        #[arg(long)]
        name: String,
        /// Which of its issues it is; larger than that of the last one.
        #[arg(long, value_name = "NUMBER")]
        generation: u64,
        /// A private key of Ed25519 to sign with, as PEM of PKCS #8. May be repeated.
        #[arg(long = "key", value_name = "FILE", required = true)]
        keys: Vec<PathBuf>,
    },
    /// What a bundle is, and which of the trusted keys have signed it.
    Verify {
        /// The bundle.
        bundle: PathBuf,
        /// A public key that is trusted, as PEM. May be repeated.
        #[arg(long = "trust", value_name = "FILE", required = true)]
        keys: Vec<PathBuf>,
        /// How many of them must have signed it.
        #[arg(long, value_name = "COUNT", default_value_t = 1)]
        threshold: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Who reaches whom, as a matrix.
    Matrix {
        /// A directory or file with all objects.
        #[arg(long, value_name = "DIR")]
        resources: PathBuf,
        /// What opens a connection: tcp/80, udp/dns, sctp/7777 or icmp. May be repeated.
        #[arg(long = "probe", value_name = "PROBE", required = true)]
        probes: Vec<Probe>,
        /// How it is printed.
        #[arg(short, long, value_enum, default_value = "text")]
        output: Picture,
    },
}

#[derive(Debug, Args)]
struct Input {
    /// A directory or file with all objects.
    #[arg(long, value_name = "DIR")]
    resources: PathBuf,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Output {
    /// How the answer is printed.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Picture {
    Text,
    Json,
    Svg,
    Html,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Enforcer {
    /// A script for `nft -f`.
    Nftables,
    /// NetworkPolicy and ClusterNetworkPolicy objects.
    Kubernetes,
}

const BAD_INPUT: u8 = 2;
const SOMETHING: u8 = 3;

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
    let told = carry_out(options.verb, out, err).and_then(|status| Ok(out.flush().map(|()| status)?));
    told.unwrap_or_else(|error| {
        // Where stderr is gone as well, the status is all that can be told.
        let _ = writeln!(err, "policy: {error}");
        if error.is::<io::Error>() { 1 } else { BAD_INPUT }
    })
}

fn carry_out(verb: Verb, out: &mut dyn Write, err: &mut dyn Write) -> Result<u8, Box<dyn Error>> {
    // Once, for over an edge two clusters would differ by it.
    let now = files::now();
    match verb {
        Verb::Analyse { input, v4, v6, ports } => {
            let (cluster, _) = cluster(&input.resources, now, err)?;
            let found = findings(&cluster, &Thresholds { v4, v6, ports })?;
            print(&found, &input.output, out)?;
            Ok(status(found.findings.is_empty() && found.scheduled.is_empty()))
        }
        Verb::Diff { before, after, output } => {
            let (before, after) = (cluster(&before, now, err)?.0, cluster(&after, now, err)?.0);
            let told = diff(&before, &after)?;
            print(&told, &output, out)?;
            Ok(status(told.changes.is_empty() && told.scheduled.is_empty() && told.named.is_empty()))
        }
        Verb::Who { input, pod, from } => {
            let (cluster, _) = cluster(&input.resources, now, err)?;
            let name = pod.split_once('/').ok_or_else(|| format!("--pod {pod}: write NAMESPACE/NAME"))?;
            let way = if from { Way::From } else { Way::To };
            print(&access(&cluster, &PodId::new(name.0, name.1), way)?, &input.output, out)?;
            Ok(0)
        }
        Verb::Sign { resources, name, generation, keys } => {
            let text = bundles::sign(&resources, name, generation, &keys, err)?;
            writeln!(out, "{text}")?;
            Ok(0)
        }
        Verb::Verify { bundle, keys, threshold, output } => {
            print(&bundles::verify(&bundle, &keys, threshold)?, &output, out)?;
            Ok(0)
        }
        Verb::Render { input, enforcer, node } => {
            let (cluster, _) = cluster(&input.resources, now, err)?;
            let (text, omitted) = match (enforcer, node) {
                (Enforcer::Nftables, node) => {
                    let rendered = nftables::render(&cluster, &node.map_or(Scope::Cluster, Scope::Node))?;
                    (rendered.script, rendered.omitted)
                }
                (Enforcer::Kubernetes, None) => {
                    let rendered = networkpolicy::render(&cluster);
                    (rendered.text(), rendered.omitted)
                }
                (Enforcer::Kubernetes, Some(_)) => {
                    return Err("--node: objects are the whole cluster's; remove it, or render --for nftables".into());
                }
            };
            if input.output.output == Format::Json {
                let answer = Rendered { version: 1, text: &text, omitted: &omitted };
                writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
            } else {
                omitted.iter().try_for_each(|omission| writeln!(err, "policy: not as written: {omission}"))?;
                write!(out, "{text}")?;
            }
            Ok(status(omitted.is_empty()))
        }
        Verb::Matrix { resources, probes, output } => {
            let (cluster, notes) = cluster(&resources, now, err)?;
            let mut report = reach(&cluster, &probes, &mut Evaluator::new(&cluster))?;
            report.notes = notes;
            match output {
                Picture::Text => write!(out, "{}", report.matrix_text())?,
                Picture::Json => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
                Picture::Svg => write!(out, "{}", report.matrix_svg())?,
                Picture::Html => write!(out, "{}", report.matrix_html())?,
            }
            Ok(0)
        }
    }
}

#[derive(Serialize)]
struct Rendered<'a> {
    version: u32,
    text: &'a str,
    omitted: &'a [Omission],
}

fn status(nothing: bool) -> u8 {
    if nothing { 0 } else { SOMETHING }
}

/// As of a time: rules with schedules are there or not.
fn cluster(resources: &Path, time: Option<Time>, err: &mut dyn Write) -> Result<(Cluster, Vec<Note>), Box<dyn Error>> {
    let (documents, mut notes) = files::read(resources)?;
    notes.extend(documents.notes());
    notes.iter().try_for_each(|note| writeln!(err, "policy: {note}"))?;
    Ok((Cluster { time, ..documents.into_cluster() }, notes))
}

fn print(answer: &(impl Serialize + Display), output: &Output, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    match output.output {
        Format::Text => write!(out, "{answer}")?,
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(answer)?)?,
    }
    Ok(())
}
