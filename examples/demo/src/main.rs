//! The main job of dcenet before your eyes: a host and its pods as network namespaces, pods added through the CNI
//! binary with fixed and dynamic addresses, real traffic between them, and nothing left behind.

mod matrix;
mod owner;
mod plugin;
mod report;
mod stage;
mod story;
mod stream;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Parser;
use report::Report;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Shows the main job of dcenet in network namespaces of its own. Needs root; changes nothing else on the machine.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The CNI plugin to execute.
    #[arg(long, value_name = "PATH", default_value = "target/release/dcenet")]
    plugin: PathBuf,
    /// Print one JSON object instead of lines for people.
    #[arg(long)]
    json: bool,
    /// Leave the stage standing, to look around in; the next run clears it.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let begin = Instant::now();
    let mut report = Report::new(options.json);
    let interrupted = Arc::new(AtomicBool::new(false));
    let registered = [SIGINT, SIGTERM].map(|s| signal_hook::flag::register(s, interrupted.clone()));
    let outcome = match registered.into_iter().collect::<Result<Vec<_>, _>>() {
        Ok(_) => run(&options, &mut report, &interrupted),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = &outcome {
        report.holds("the demo runs to its end", false, error);
    }
    report.finish(begin.elapsed().as_secs_f64());
    match (outcome, report.ok()) {
        (Ok(()), true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run(options: &Options, report: &mut Report, interrupted: &AtomicBool) -> Result<(), Box<dyn std::error::Error>> {
    let plugin = options.plugin.canonicalize().map_err(|e| format!("--plugin {}: {e}", options.plugin.display()))?;
    let place = stage::Place::take()?;
    let before = story::Machine::look()?;
    let stage = stage::Stage::set_up(place)?;
    let check_interrupt = || match interrupted.load(Ordering::Relaxed) {
        true => Err("interrupted"),
        false => Ok(()),
    };
    let told = story::tell(&stage, plugin, options.keep, report, &check_interrupt);
    if options.keep {
        report.note(format!("--keep: the stage stands in {}", stage.directory("").display()));
        return told;
    }
    report.step("Everything is removed");
    let struck = story::strike(stage, &before, report);
    told.and(struck)
}
