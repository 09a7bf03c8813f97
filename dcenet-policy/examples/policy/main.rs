//! What policies amount to, from plain Kubernetes objects: `cargo run -p dcenet-policy --features bundle --example policy -- --help`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let status = cli::run(std::env::args_os(), &mut std::io::stdout().lock(), &mut std::io::stderr().lock());
    ExitCode::from(status)
}
