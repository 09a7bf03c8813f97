//! One call of the plugin, from environment and stdin to stdout and exit code.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tracing::{Instrument as _, Span};

use super::config::version_of;
use super::networks::{self, Networks};
use super::verbs::{Call, journal};
use super::{CniError, ErrorCode, Invocation, NetConf, Role, SpecVersion, TraceParent, Verb};
use crate::engine::Removals;
use crate::model::AttachmentKey;
use crate::provider::{AddressSource, DeviceSource, PolicySink};

/// What a binary composes: who hands out addresses and who decides about traffic, by the configuration.
pub trait Backends {
    /// The source of addresses that the section `ipam` asks for; `None` where there is no such section.
    ///
    /// # Errors
    /// Where the section is wrong, or asks for what this binary does not have.
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError>;

    /// What the section `policy` asks for; `None` where there is no such section, and then nothing is attached.
    ///
    /// # Errors
    /// As for `addresses`.
    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError>;

    /// Who takes policy off pods of other plugins that had it by a former configuration; asked where there is no section `policy`.
    /// Nobody by default: then an ADD without the section is refused for them until DEL.
    fn former_policy(&self, conf: &NetConf) -> Option<Arc<dyn PolicySink>> {
        let _ = conf;
        None
    }

    /// Who hands out devices of the host, for links that are made of such, and takes them back; `None` where this binary has nobody.
    /// Asked whatever the section `link` says, for the attachment may have been made by another. An error fails every verb: what
    /// is wrong with a section is better told when a device is asked for.
    ///
    /// # Errors
    /// As for `addresses`.
    fn devices(&self, conf: &NetConf) -> Result<Option<Arc<dyn DeviceSource>>, CniError> {
        let _ = conf;
        Ok(None)
    }

    /// Whether a call can be served here although the configuration names a daemon, which does not take it: where the store
    /// is shared by processes. Where the daemon alone has the addresses, calls wait for it.
    ///
    /// # Errors
    /// As for `addresses`.
    fn stands_alone(&self, conf: &NetConf) -> Result<bool, CniError> {
        let _ = conf;
        Ok(true)
    }

    /// With whose deletions the call's are done together, where several calls are served at a time.
    fn removals(&self) -> Option<Arc<Removals>> {
        None
    }

    /// Whether somebody still waits for the answer. Asked once an ADD has its attachment to itself, and before it changes
    /// anything: a runtime that does not wait any more may have called DEL already, and nobody would remove what the ADD
    /// made. Then it fails with code 11.
    fn is_awaited(&self) -> bool {
        true
    }
}

/// Who puts devices under policy, and whether ADD waits for verdicts.
#[derive(Clone)]
pub struct PolicyChoice {
    /// Attaches the default and tells the owner.
    pub sink: Arc<dyn PolicySink>,
    /// How long ADD waits for the owner's verdicts before it fails; `None`: it does not wait.
    pub await_enforced: Option<Duration>,
}

impl std::fmt::Debug for PolicyChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyChoice").field("await_enforced", &self.await_enforced).finish_non_exhaustive()
    }
}

/// Serves one call, or has it served by the daemon that the configuration names (feature `node`, module `node`): reads the
/// environment through `environment` and the configuration from `stdin`, does what is
/// asked, and writes the result or the error object to `stdout`.
///
/// The calling thread must be in the host's network namespace, as a runtime starts a plugin. The future is ready when
/// the address source is; nothing else in it waits, and it blocks its thread for as long as the kernel takes.
pub async fn serve(
    environment: impl Fn(&str) -> Option<OsString>,
    stdin: &mut dyn Read,
    stdout: &mut dyn Write,
    backends: &dyn Backends,
) -> ExitCode {
    let mut input = Vec::new();
    let read = stdin.take(STDIN_LIMIT).read_to_end(&mut input).and_then(|length| match length as u64 {
        STDIN_LIMIT => Err(std::io::Error::other(format!("longer than {STDIN_LIMIT} bytes"))),
        _ => Ok(length),
    });
    let read = read.map(|_| input.as_slice());
    #[cfg(feature = "node")]
    let passed = match &read {
        Ok(input) => pass(&environment, input, backends).map_err(|error| failure(&error, input)),
        Err(_) => Ok(None),
    };
    #[cfg(not(feature = "node"))]
    let passed: Result<Option<(Vec<u8>, bool)>, String> = Ok(None);
    let (answer, success) = match passed {
        Ok(Some(answered)) => answered,
        Ok(None) => {
            let (text, success) = respond(environment, read, backends).await;
            (text.unwrap_or_default().into_bytes(), success)
        }
        Err(text) => (text.into_bytes(), false),
    };
    let exit = if success { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if !answer.is_empty()
        && let Err(error) = stdout.write_all(&answer).and_then(|()| stdout.flush())
    {
        // Nobody is left to tell; the runtime will DEL what it got no answer for.
        tracing::error!(%error, "cannot write the answer");
        return ExitCode::FAILURE;
    }
    exit
}

/// What is to be printed, and whether the call succeeded.
pub(super) async fn respond(
    environment: impl Fn(&str) -> Option<OsString>,
    stdin: std::io::Result<&[u8]>,
    backends: &dyn Backends,
) -> (Option<String>, bool) {
    let input = stdin.as_ref().map_or(&[][..], |input| *input);
    let mut span = Span::none();
    match answer(environment, stdin, backends, &mut span).await {
        Ok(text) => (text, true),
        Err(error) => (Some(span.in_scope(|| failure(&error, input))), false),
    }
}

pub(super) fn failure(error: &CniError, input: &[u8]) -> String {
    tracing::error!(%error, "failed");
    error.to_json(version_of(input).unwrap_or(SpecVersion::NEWEST))
}

/// Hands the call to the daemon that the configuration names. `None` where it names none, where the call is answered
/// without a configuration, or where it is to be served here.
#[cfg(feature = "node")]
fn pass(
    environment: &impl Fn(&str) -> Option<OsString>,
    stdin: &[u8],
    backends: &dyn Backends,
) -> Result<Option<(Vec<u8>, bool)>, CniError> {
    // What is wrong with either is told as by any call that is served here.
    let (Ok(invocation), Ok(conf)) = (Invocation::from_env(environment), NetConf::parse(stdin)) else {
        return Ok(None);
    };
    if invocation.verb == Verb::Version {
        return Ok(None);
    }
    let Some(socket) = conf.daemon()? else { return Ok(None) };
    match super::node::pass(&socket, environment, stdin, &conf)? {
        super::node::Outcome::Answered { stdout, success } => Ok(Some((stdout, success))),
        super::node::Outcome::NotTaken { reason } if backends.stands_alone(&conf)? => {
            tracing::info!(reason, "served without the daemon");
            Ok(None)
        }
        super::node::Outcome::NotTaken { reason } => Err(CniError::new(
            ErrorCode::TryAgain,
            format!("daemon: {}: {reason}; its addresses are in no store that this process shares", socket.display()),
        )),
    }
}

/// `span` becomes that of the call, once it is known what it is about.
async fn answer(
    environment: impl Fn(&str) -> Option<OsString>,
    stdin: std::io::Result<&[u8]>,
    backends: &dyn Backends,
    span: &mut Span,
) -> Result<Option<String>, CniError> {
    let invocation = Invocation::from_env(environment)?;
    if invocation.verb == Verb::Version {
        return Ok(Some(versions(stdin.unwrap_or_default())));
    }
    let stdin = stdin.map_err(|e| CniError::new(ErrorCode::Io, format!("the configuration cannot be read: {e}")))?;
    let conf = NetConf::parse(stdin)?;
    *span = tracing::info_span!(
        "call",
        verb = %invocation.verb,
        network = %conf.name,
        container = invocation.container.as_ref().map(tracing::field::display),
        ifname = invocation.ifname.as_ref().map(tracing::field::display),
        traceparent = invocation.trace.as_ref().map(TraceParent::as_str),
    );
    dispatch(&invocation, &conf, backends).instrument(span.clone()).await
}

/// Does what is asked.
async fn dispatch(
    invocation: &Invocation,
    conf: &NetConf,
    backends: &dyn Backends,
) -> Result<Option<String>, CniError> {
    #[cfg(not(feature = "node"))]
    if conf.daemon()?.is_some() {
        let message = "daemon: this build cannot hand calls over; build it with the feature node, or remove the key";
        return Err(CniError::new(ErrorCode::UnsupportedField, message.to_owned()));
    }
    let since = match invocation.verb {
        Verb::Check => SpecVersion::V0_4_0,
        Verb::Gc | Verb::Status => SpecVersion::V1_1_0,
        Verb::Add | Verb::Del | Verb::Version => SpecVersion::V0_3_1,
    };
    if conf.version < since {
        return Err(CniError::new(
            ErrorCode::IncompatibleVersion,
            format!("{:?} needs cniVersion {since} or later; the configuration says {}", invocation.verb, conf.version),
        ));
    }
    if conf.role == Role::Meta || is_left_of_several(invocation, conf)? {
        let several = Networks::new(invocation, conf, backends)?;
        return match invocation.verb {
            Verb::Add => several.add().await.map(Some),
            Verb::Check => several.check().await.map(|()| None),
            Verb::Del => several.del().await.map(|()| None),
            Verb::Gc => several.gc().await.map(|()| None),
            Verb::Status => several.status().await.map(|()| None),
            Verb::Version => unreachable!("answered above"),
        };
    }
    let call = Call::new(invocation, conf, backends)?;
    let done = match (invocation.verb, conf.role) {
        (Verb::Add, Role::Main) => return call.add().await.map(|result| Some(result.to_json(conf.version))),
        (Verb::Add, Role::Ipam) => {
            return call.lease_for_another().await.map(|result| Some(result.to_json(conf.version)));
        }
        (Verb::Add, Role::Chained) => return call.add_to_chain().await.map(Some),
        (Verb::Check, Role::Main | Role::Chained) => call.check().await,
        (Verb::Check, Role::Ipam) => call.check_for_another().await,
        (Verb::Del, Role::Main | Role::Chained) => call.del().await,
        (Verb::Del, Role::Ipam) => call.release_for_another().await,
        (Verb::Gc, Role::Main | Role::Chained) => call.gc().await,
        (Verb::Gc, Role::Ipam) => call.collect_for_another().await,
        (Verb::Status, Role::Main | Role::Chained) => call.status().await,
        (Verb::Status, Role::Ipam) => call.status_for_another().await,
        (Verb::Version, _) | (_, Role::Meta) => unreachable!("answered above"),
    };
    done.map(|()| None)
}

/// Whether what DEL or GC is to remove was attached as several networks, by a configuration that named more of them than
/// this one.
fn is_left_of_several(invocation: &Invocation, conf: &NetConf) -> Result<bool, CniError> {
    let key = match (invocation.verb, &invocation.container, &invocation.ifname) {
        _ if !matches!(conf.role, Role::Main | Role::Chained) => return Ok(false),
        (Verb::Gc, ..) => None,
        (Verb::Del, Some(container), Some(ifname)) => {
            Some(AttachmentKey { network: conf.name.clone(), container: container.clone(), ifname: ifname.clone() })
        }
        _ => return Ok(false),
    };
    networks::is_recorded(&conf.state_dir, &conf.name, key.as_ref()).map_err(journal)
}

/// The answer to VERSION, which needs neither configuration nor environment (CNI 1.1.0, section 5, "Version Success").
fn versions(stdin: &[u8]) -> String {
    let version = version_of(stdin).unwrap_or(SpecVersion::NEWEST).as_str();
    let served = SpecVersion::ALL.map(SpecVersion::as_str);
    serde_json::json!({ "cniVersion": version, "supportedVersions": served }).to_string()
}

/// Runtimes add every annotation of a pod to its configuration; Kubernetes bounds those to 256 KiB.
pub(super) const STDIN_LIMIT: u64 = 16 << 20;
