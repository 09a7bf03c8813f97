//! The daemon `dcenetd` of a node: it owns the node's policy state, takes back what gone pods held, and tells Prometheus,
//! files and collectors what goes on. README.md beside it is for operators.

mod config;
mod daemon;
mod fabric;
mod flows;
mod functions;
mod http;
mod issued;
mod kept;
mod kubelet;
mod lock;
mod metrics;
mod names;
mod policies;
mod reclaim;
mod server;
mod standing;
mod store;
mod systemd;
mod threads;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use config::{Config, ConfigError, LogConfig, LogFormat, LogLevel, TrustConfig};
use tracing::level_filters::LevelFilter;

/// Owns the network policy of this node, enters routes to other nodes, takes back addresses of pods that are gone, serves
/// calls of the plugin, tells the kubelet of virtual functions, and serves metrics and flow logs.
///
/// Exit codes: 0 after SIGTERM or SIGINT, or where --check finds nothing wrong; 1 where it cannot begin or go on, as where
/// the configuration cannot be read; 2 where arguments or configuration are wrong. Verdicts and routes stay in force when it
/// ends; only --uninstall removes them.
#[derive(Debug, Parser)]
#[command(name = "dcenetd", version)]
struct Options {
    /// The configuration, a JSON object.
    #[arg(long, value_name = "FILE", default_value = "/etc/dcenet/dcenetd.json")]
    config: PathBuf,
    /// Only tell whether configuration and policies are right.
    #[arg(long, conflicts_with = "uninstall")]
    check: bool,
    /// Remove all policy from this host, and all routes to other nodes: afterwards pods are subject to none, and reach none.
    /// No daemon may run.
    #[arg(long)]
    uninstall: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let config = match Config::load(&options.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("dcenetd: {error}");
            return match error {
                // Its disk may come later, or whoever writes it be about to put it there.
                ConfigError::Unreadable { .. } => ExitCode::FAILURE,
                ConfigError::Wrong(_) => ExitCode::from(WRONG),
            };
        }
    };
    if options.check {
        return check(&options, &config);
    }
    log_to_stderr(config.log);
    let outcome = if options.uninstall {
        daemon::uninstall(&config)
    } else {
        daemon::run(&config, std::env::var_os("NOTIFY_SOCKET"))
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot go on");
            ExitCode::FAILURE
        }
    }
}

/// Arguments or configuration are wrong; clap ends with the same.
const WRONG: u8 = 2;

fn check(options: &Options, config: &Config) -> ExitCode {
    match read(config) {
        Ok(set) => {
            for note in set.iter().flat_map(|set| policies::notes(&set.documents, config.dns.is_some())) {
                println!("{note}");
            }
            println!("{}: nothing is wrong", options.config.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("dcenetd: {error}");
            ExitCode::from(WRONG)
        }
    }
}

/// The policies as the daemon would take them, of which nothing is noted.
fn read(config: &Config) -> Result<Option<policies::Set>, Box<dyn Error>> {
    let Some(policies) = &config.policies else { return Ok(None) };
    let trust = policies.trust.as_ref().map(TrustConfig::read).transpose()?;
    let set = policies::read(&policies.directories(), trust.as_ref()).0?;
    if let Some(trust) = &policies.trust {
        policies::accepted(&config.state_dir)?.check(&set.bundles, &trust.sets)?;
    }
    Ok(Some(set))
}

fn log_to_stderr(config: LogConfig) {
    let level = match config.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let lines = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}
