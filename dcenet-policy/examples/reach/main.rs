//! Who reaches whom in a cluster, from plain Kubernetes objects: `cargo run -p dcenet-policy --example reach -- --help`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let status = cli::run(std::env::args_os(), &mut std::io::stdout().lock(), &mut std::io::stderr().lock());
    ExitCode::from(status)
}
