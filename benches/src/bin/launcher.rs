//! Starts a program, and tells the greatest resident set of it and its children: `launcher REPORT PROGRAM [ARGUMENT]...`
//!
//! The report is that figure and the launcher's own, in KiB. `ru_maxrss` of getrusage(2) survives execve(2): it counts
//! what the process was before (fs/exec.c, `exec_mmap`), which for a program started by a benchmark is the benchmark.
//! This launcher is smaller than what it starts, or the two figures are the same and the first says nothing.

use std::ffi::OsString;
use std::io::{self, Error};
use std::process::{Command, ExitCode};

use wait4::Wait4;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(report), Some(program)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: launcher REPORT PROGRAM [ARGUMENT]...");
        return ExitCode::from(2);
    };
    match launch(&report, &program, arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("launcher: {}: {error}", program.display());
            ExitCode::FAILURE
        }
    }
}

fn launch(report: &OsString, program: &OsString, arguments: impl Iterator<Item = OsString>) -> io::Result<ExitCode> {
    let own = own_peak()?;
    let used = Command::new(program).args(arguments).spawn()?.wait4()?;
    std::fs::write(report, format!("{} {own}\n", used.rusage.maxrss / 1024))?;
    let code = used.status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// `VmHWM` in KiB (proc_pid_status(5)).
fn own_peak() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")?.trim().parse().ok());
    value.ok_or_else(|| Error::other("/proc/self/status has no VmHWM"))
}
