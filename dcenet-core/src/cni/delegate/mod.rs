//! Running the plugins of others (CNI 1.1.0, section 4, "Plugin Delegation"; section 5 for what they answer).
//!
//! It is no [`LinkDriver`](crate::link::LinkDriver): a driver plans steps that the engine does and takes back, and what a
//! foreign program will do can neither be planned nor undone step by step. Its whole ADD is one thing to do, and its DEL
//! what takes it back.

mod addresses;
mod chain;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

pub use self::addresses::PluginAddresses;
pub use self::chain::{Chain, Progress};
use super::{CniError, ErrorCode, TraceParent, Verb};
use crate::model::{ContainerId, IfName, ParseError};
use crate::netlink::{Gate, gate};
use crate::sys;

/// The name of a plugin's program, as in `type`: no path (CNI 1.1.0, section 1, "Plugin configuration objects").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginName(String);

impl PluginName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of no program.
    pub(super) fn none() -> Self {
        Self(String::new())
    }
}

impl FromStr for PluginName {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        if s.is_empty() || matches!(s, "." | "..") || s.contains(['/', '\0']) {
            return Err(ParseError::new(
                "plugin type",
                s,
                "not the name of a program in CNI_PATH; give one without '/'",
            ));
        }
        Ok(Self(s.to_owned()))
    }
}

impl fmt::Display for PluginName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The environment of a plugin's call (CNI 1.1.0, section 2, "Parameters"), beside `CNI_COMMAND` and `CNI_PATH`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginCall {
    /// `CNI_CONTAINERID`.
    pub container: Option<ContainerId>,
    /// `CNI_NETNS`; absent where the namespace is gone.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`.
    pub ifname: Option<IfName>,
    /// `CNI_ARGS`.
    pub args: String,
    /// `CNI_NETNS_OVERRIDE`.
    pub netns_override: bool,
    /// `TRACEPARENT`, in place of that of this process.
    pub trace: Option<TraceParent>,
}

/// Where plugins are, and how long they may take.
#[derive(Debug, Clone)]
pub struct Plugins {
    path: String,
    limit: Duration,
}

impl Plugins {
    /// How long a plugin may take where nobody says otherwise. Runtimes give up after two to four minutes.
    pub const LIMIT: Duration = Duration::from_secs(60);

    /// `path` is the value of `CNI_PATH`: directories joined by `:`.
    pub fn new(path: &OsStr, limit: Duration) -> Self {
        Self { path: path.to_string_lossy().into_owned(), limit }
    }

    /// The program of a plugin: in the first directory that has an ordinary file of its name.
    ///
    /// # Errors
    /// [`DelegateError::NotFound`].
    pub fn find(&self, plugin: &PluginName) -> Result<PathBuf, DelegateError> {
        let directories = std::env::split_paths(&self.path).filter(|directory| directory.is_absolute());
        let mut programs = directories.map(|directory| directory.join(plugin.as_str()));
        programs
            .find(|program| !plugin.0.is_empty() && program.is_file())
            .ok_or_else(|| DelegateError::NotFound { plugin: plugin.clone(), path: self.path.clone() })
    }

    /// Runs a plugin as libcni does: the configuration on stdin, the call in the environment beside what this process has
    /// there, the answer from stdout. Within the time limit it ends with everything that it started in its process group.
    /// When this process's thread ends it is killed too, but not what it has started: see [`end_group`](Self::end_group).
    ///
    /// Returns what it answered: the result of ADD and VERSION, else nothing.
    ///
    /// # Errors
    /// Every way in which a program can fail to be a plugin; see [`DelegateError`].
    ///
    /// # Minimum kernel version
    /// 5.3 (`pidfd_open`).
    pub fn run(
        &self,
        plugin: &PluginName,
        verb: Verb,
        call: &PluginCall,
        conf: &Value,
    ) -> Result<Option<Value>, DelegateError> {
        self.run_noting(plugin, verb, call, conf, &mut |_| Ok(()))
    }

    /// As [`run`](Self::run); `noted` hears the process group before the plugin gets its configuration, and thus before it
    /// can have done anything.
    fn run_noting(
        &self,
        plugin: &PluginName,
        verb: Verb,
        call: &PluginCall,
        conf: &Value,
        noted: &mut dyn FnMut(u32) -> io::Result<()>,
    ) -> Result<Option<Value>, DelegateError> {
        let program = self.find(plugin)?;
        let span = tracing::debug_span!("delegate", %plugin, verb = verb.as_str());
        let _entered = span.enter();
        let mut command = Command::new(&program);
        // Nothing of our own call may be taken for theirs.
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_NETNS_OVERRIDE"] {
            command.env_remove(variable);
        }
        command.env("CNI_COMMAND", verb.as_str()).env("CNI_PATH", &self.path).env("CNI_ARGS", &call.args);
        if let Some(container) = &call.container {
            command.env("CNI_CONTAINERID", container.as_str());
        }
        // libcni sets it to nothing where there is none.
        command.env("CNI_NETNS", call.netns.as_deref().unwrap_or("".as_ref()));
        if let Some(ifname) = &call.ifname {
            command.env("CNI_IFNAME", ifname.as_str());
        }
        if call.netns_override {
            command.env("CNI_NETNS_OVERRIDE", "true");
        }
        if let Some(trace) = &call.trace {
            command.env("TRACEPARENT", trace.as_str());
        }
        let started = |source| DelegateError::Start { plugin: plugin.clone(), source };
        let said = match gate(&format!("run plugin {plugin} {}", verb.as_str())) {
            Gate::Pass => self.converse(&mut command, conf, noted),
            Gate::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            Gate::Lose => self
                .converse(&mut command, conf, noted)
                .and_then(|_| Err(io::Error::other("injected: outcome unknown"))),
            Gate::DieAfter => {
                // Whatever came of it: the process ends before it could tell.
                drop(self.converse(&mut command, conf, noted));
                std::process::abort()
            }
        };
        self.judge(plugin, verb, said.map_err(started)?)
    }

    /// Ends what is left of a plugin's process group whose caller was killed: an IPAM plugin that waits for its lock would
    /// take an address after everything was taken back. Of a group whose number is another's by now nothing is touched: what
    /// a plugin starts has the container's id in its environment. What empties its environment (`env -i`) is not known, and
    /// goes on.
    ///
    /// # Errors
    /// Where `/proc` cannot be read, or the environment of one of the group, and where a process outlives the signal for 10 s.
    pub fn end_group(group: u32, container: &ContainerId) -> io::Result<()> {
        let variable = format!("CNI_CONTAINERID={container}");
        let begin = Instant::now();
        loop {
            match members(group, &variable)? {
                Members::None => return Ok(()),
                // One that executes a program has no environment for a moment, which is long on a busy machine; one that never
                // has any is not known to be ours.
                Members::Unclear if begin.elapsed() > SETTLED => return Ok(()),
                Members::Unreadable(error) if begin.elapsed() > SETTLED => return Err(error),
                Members::Unclear | Members::Unreadable(_) => {}
                Members::Ours if begin.elapsed() > Duration::from_secs(10) => {
                    let message = format!("process group {group} does not end");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Members::Ours => match sys::kill_group(group) {
                    // The last one may have ended meanwhile.
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                    _ => {}
                },
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn converse(
        &self,
        command: &mut Command,
        conf: &Value,
        noted: &mut dyn FnMut(u32) -> io::Result<()>,
    ) -> io::Result<Said> {
        let mut input = VecDeque::from(serde_json::to_vec(conf)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        sys::die_with_this_thread(command);
        let mut child = Started(command.spawn()?);
        let ended = sys::process_fd(child.0.id())?;
        noted(child.0.id())?;
        let (mut stdin, stdout, stderr) = (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
        let (mut out, mut err) = (Stream::new(stdout), Stream::new(stderr));
        for end in [stdin.as_ref().map(AsFd::as_fd), out.fd(), err.fd()].into_iter().flatten() {
            sys::set_nonblocking(end)?;
        }
        let deadline = Instant::now() + self.limit;
        let cut = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Some(Cut::Deadline);
            }
            let watched = [
                Some((ended.as_fd(), libc::POLLIN)),
                stdin.as_ref().map(|s| (s.as_fd(), libc::POLLOUT)),
                out.fd().map(|fd| (fd, libc::POLLIN)),
                err.fd().map(|fd| (fd, libc::POLLIN)),
            ];
            let watched: Vec<_> = watched.into_iter().flatten().collect();
            let has_ended = sys::wait_any(&watched, left)?.first().copied().unwrap_or(false);
            if let Some(pipe) = &mut stdin
                && feed(pipe, &mut input)
            {
                stdin = None;
            }
            out.read(OUTPUT_LIMIT + 1)?;
            err.read(STDERR_LIMIT)?;
            if out.bytes.len() > OUTPUT_LIMIT {
                break Some(Cut::TooLong);
            }
            // Who else has its pipes, such as a server that it started, is not waited for: all that it wrote was read.
            if has_ended {
                break None;
            }
        };
        if cut.is_some() {
            child.kill_group();
        }
        let status = child.0.wait()?;
        Ok(Said { status, cut, stdout: out.bytes, stderr: String::from_utf8_lossy(&err.bytes).trim().to_owned() })
    }

    fn judge(&self, plugin: &PluginName, verb: Verb, said: Said) -> Result<Option<Value>, DelegateError> {
        let Said { status, cut, stdout, stderr } = said;
        let plugin = plugin.clone();
        match cut {
            Some(Cut::Deadline) => return Err(DelegateError::TimedOut { plugin, verb, limit: self.limit, stderr }),
            Some(Cut::TooLong) => return Err(DelegateError::TooLong { plugin, verb, stderr }),
            None => {}
        }
        let answer = serde_json::from_slice::<Value>(&stdout);
        if let Ok(answer) = &answer
            && let Ok(ErrorObject { code, msg, details }) = ErrorObject::deserialize(answer)
        {
            return Err(DelegateError::Refused { plugin, verb, code, msg, details, stderr });
        }
        if !status.success() {
            let said = if stderr.is_empty() { excerpt(&stdout) } else { stderr };
            return Err(DelegateError::Died { plugin, verb, status, said });
        }
        if !matches!(verb, Verb::Add | Verb::Version) {
            return Ok(None);
        }
        match answer {
            Ok(answer @ Value::Object(_)) => Ok(Some(answer)),
            _ if stdout.trim_ascii().is_empty() => Err(DelegateError::Empty { plugin, verb, stderr }),
            Ok(_) => {
                let (reason, excerpt) = ("not a JSON object".to_owned(), excerpt(&stdout));
                Err(DelegateError::Malformed { plugin, verb, reason, excerpt })
            }
            Err(error) => {
                let excerpt = excerpt(&stdout);
                Err(DelegateError::Malformed { plugin, verb, reason: error.to_string(), excerpt })
            }
        }
    }
}

/// How long a process may be without its environment while it executes a program.
const SETTLED: Duration = Duration::from_secs(5);

/// Who is in a process group, zombies left out.
enum Members {
    None,
    /// Processes without any environment.
    Unclear,
    /// The environment of one cannot be read.
    Unreadable(io::Error),
    /// One has the variable in its environment.
    Ours,
}

fn members(group: u32, variable: &str) -> io::Result<Members> {
    let mut members = Members::None;
    for entry in std::fs::read_dir("/proc")? {
        let directory = entry?.path();
        // Processes end while they are looked at, and what is no process has no such files.
        let Ok(stat) = std::fs::read_to_string(directory.join("stat")) else { continue };
        // State and group, the third and the fifth field (proc_pid_stat(5)); the second may hold anything but a later ')'.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (state, own) = (fields.next(), fields.nth(1).and_then(|field| field.parse::<u32>().ok()));
        if own != Some(group) || matches!(state, Some("Z" | "X")) {
            continue;
        }
        let environment = match std::fs::read(directory.join("environ")) {
            Ok(environment) => environment,
            // It ended meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(error) => {
                members = Members::Unreadable(error);
                continue;
            }
        };
        if environment.split(|byte| *byte == 0).any(|one| one == variable.as_bytes()) {
            return Ok(Members::Ours);
        }
        if environment.is_empty() && matches!(members, Members::None) {
            members = Members::Unclear;
        }
    }
    Ok(members)
}

/// A child that is never left unwaited for, nor alive.
struct Started(Child);

impl Started {
    /// Ends it with everything of its group. It was not waited for, so that its id is still its own.
    fn kill_group(&self) {
        if let Err(error) = sys::kill_group(self.0.id()) {
            tracing::debug!(%error, "cannot kill the plugin's process group");
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.kill_group();
            if let Err(error) = self.0.wait() {
                tracing::warn!(%error, "cannot wait for a plugin");
            }
        }
    }
}

struct Said {
    status: ExitStatus,
    cut: Option<Cut>,
    stdout: Vec<u8>,
    stderr: String,
}

/// Why a plugin was not heard to its end.
#[derive(Clone, Copy)]
enum Cut {
    Deadline,
    TooLong,
}

/// What comes through a pipe.
struct Stream<R> {
    pipe: Option<R>,
    bytes: Vec<u8>,
}

impl<R: Read + AsFd> Stream<R> {
    fn new(pipe: Option<R>) -> Self {
        Self { pipe, bytes: Vec::new() }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Reads what there is, and keeps `limit` bytes of it: the last ones.
    fn read(&mut self, limit: usize) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        let mut block = [0; 16 << 10];
        // A writer that never pauses must not keep us from looking at the clock.
        for _ in 0..64 {
            match pipe.read(&mut block) {
                Ok(0) => {
                    self.pipe = None;
                    return Ok(());
                }
                Ok(count) => {
                    self.bytes.extend_from_slice(&block[..count]);
                    let over = self.bytes.len().saturating_sub(limit);
                    self.bytes.drain(..over);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Writes what the pipe takes. Returns whether that is over: a plugin need not read its configuration.
fn feed(pipe: &mut impl Write, input: &mut VecDeque<u8>) -> bool {
    loop {
        let (front, _) = input.as_slices();
        if front.is_empty() {
            return true;
        }
        match pipe.write(front) {
            Ok(count) => drop(input.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}

/// The error object of a plugin (CNI 1.1.0, section 5, "Error"). Go's skeleton leaves `cniVersion` out.
#[derive(Deserialize)]
struct ErrorObject {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// A part of an answer that people can read.
fn excerpt(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(EXCERPT)];
    let more = if bytes.len() > EXCERPT { " ..." } else { "" };
    format!("{}{more}", String::from_utf8_lossy(cut).trim())
}

/// Far above any result, and far below what would harm the host.
const OUTPUT_LIMIT: usize = 1 << 20;
/// The last of it says why a program failed.
const STDERR_LIMIT: usize = 4 << 10;
const EXCERPT: usize = 200;

/// Why a plugin gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DelegateError {
    /// There is no such program.
    #[error("plugin {plugin} is in no directory of CNI_PATH ({path:?}); install it there, or correct `type`")]
    NotFound {
        /// The plugin.
        plugin: PluginName,
        /// `CNI_PATH`.
        path: String,
    },
    /// It could not be started or heard.
    #[error("plugin {plugin} cannot be run: {source}")]
    Start {
        /// The plugin.
        plugin: PluginName,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// It took too long, and was killed with everything that it started.
    #[error("plugin {plugin}: {verb} took longer than {limit:?}, and was killed{}", Also(stderr))]
    TimedOut {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// How long it had.
        limit: Duration,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// It answered with an error object.
    #[error("plugin {plugin}: {verb}: {msg} (its code {code}){}{}", Also(details), Also(stderr))]
    Refused {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// Its code.
        code: u32,
        /// Its message.
        msg: String,
        /// Its details.
        details: String,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// It failed without an error object.
    #[error("plugin {plugin}: {verb} ended with {status}{}", Also(said))]
    Died {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// How it ended.
        status: ExitStatus,
        /// What it said, to stderr or else to stdout.
        said: String,
    },
    /// Its answer has no end.
    #[error("plugin {plugin}: {verb}: wrote more than {OUTPUT_LIMIT} bytes to stdout, and was killed{}", Also(stderr))]
    TooLong {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// It succeeded and said nothing where a result is wanted.
    #[error("plugin {plugin}: {verb}: succeeded without a result on stdout{}", Also(stderr))]
    Empty {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// Its answer is no result.
    #[error("plugin {plugin}: {verb}: its answer is no CNI result: {reason}: {excerpt:?}")]
    Malformed {
        /// The plugin.
        plugin: PluginName,
        /// What it was to do.
        verb: Verb,
        /// What is wrong with it.
        reason: String,
        /// Its beginning.
        excerpt: String,
    },
}

impl DelegateError {
    /// Whether the plugin says that there is nothing to clean up (code 3, "Container unknown or does not exist").
    pub fn is_unknown_container(&self) -> bool {
        matches!(self, Self::Refused { code: 3, .. })
    }
}

impl From<DelegateError> for CniError {
    fn from(error: DelegateError) -> Self {
        let code = match &error {
            // Code 3 would have the runtime skip the DEL that the other networks need.
            DelegateError::Refused { code: 0 | 3, .. } => ErrorCode::Failed,
            DelegateError::Refused { code: 11, .. } | DelegateError::TimedOut { .. } => ErrorCode::TryAgain,
            DelegateError::Refused { code, .. } => ErrorCode::Delegated(*code),
            DelegateError::NotFound { .. } => ErrorCode::InvalidConfig,
            _ => ErrorCode::Failed,
        };
        Self::new(code, error.to_string())
    }
}

struct Also<'a>(&'a str);

impl fmt::Display for Also<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}
