//! The side of those who attach endpoints: a CNI binary, which lives for milliseconds and compiles nothing.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dcenet_core::model::{AttachmentKey, IfIndex};
use dcenet_core::provider::{Endpoint, PolicyError, PolicySink};
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, Owner};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

use super::config::{DefaultVerdict, Limit, PolicyConfig};
use super::node::default_pin;
use super::protocol::{self, ProtocolError, Reply, Request};

/// Puts devices under the pinned default programs, and talks to the owner of the policy state.
///
/// It needs nothing but the pins: whether the owner lives makes no difference to [`PolicySink::attach`].
///
/// # Minimum kernel version
/// 4.13; what the pinned programs need was checked by the owner.
#[derive(Debug)]
pub struct PinnedDefault<A = ClsactAttacher> {
    pins: Pins,
    socket: PathBuf,
    default: DefaultVerdict,
    attacher: A,
}

/// Why the client cannot do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There are no default programs, so no owner has been here since the machine started.
    #[error("no policy owner has prepared this host (no program {pin} in {}); start it and try again", directory.display())]
    NotPrepared {
        /// The missing pin.
        pin: &'static str,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// Nobody listens on the owner's socket.
    #[error("the policy owner does not run (socket {}: {source}); the default stands until it does", socket.display())]
    NoOwner {
        /// The socket.
        socket: PathBuf,
        /// What connecting to it gave.
        #[source]
        source: io::Error,
    },
    /// The owner ended, or fell silent, before it answered.
    #[error("the policy owner did not answer: {0}")]
    NoAnswer(#[source] ProtocolError),
    /// The owner answers that the endpoint's own verdicts are not in force.
    #[error("the default stands: {reason}")]
    Waiting {
        /// What it waits for, or what failed.
        reason: String,
    },
    /// The owner did not take the request.
    #[error("the policy owner refuses: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// Another attachment's program is on the device.
    #[error("the device carries the policy of attachment {label}; detach that first")]
    OtherAttachment {
        /// The label there.
        label: String,
    },
}

impl ClientError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::OtherAttachment { .. })
    }
}

impl PinnedDefault {
    /// A client for the owner with this run directory. Nothing is opened yet.
    pub fn new(config: &PolicyConfig, run_dir: &Path) -> Self {
        Self::with_attacher(config, run_dir, ClsactAttacher)
    }
}

impl<A: Attacher> PinnedDefault<A> {
    /// As [`PinnedDefault::new`], attaching in another way.
    pub fn with_attacher(config: &PolicyConfig, run_dir: &Path, attacher: A) -> Self {
        let (pins, socket) = (Pins::at(&config.pins), protocol::socket_path(run_dir));
        Self { pins, socket, default: config.default, attacher }
    }

    fn attach_default(&self, endpoint: &Endpoint, direction: Direction) -> Result<(), PolicyError> {
        let doing = || format!("put the default policy on {} ({direction:?})", endpoint.ifname);
        let label = endpoint.attachment.id().to_string();
        let hook = Hook { device: endpoint.ifindex, direction };
        match self.attacher.attached(hook).map_err(failed(doing()))?.map(|a| a.owner) {
            // A repeated call: what the owner has put there since is not for us to replace.
            Some(Owner::Ours(there)) if there == label => return Ok(()),
            Some(Owner::Ours(label)) => return Err(refused(doing(), ClientError::OtherAttachment { label })),
            Some(Owner::Foreign(_)) | None => {}
        }
        let pin = default_pin(self.default, direction);
        let Some(fd) = self.pins.get(pin).map_err(failed(doing()))? else {
            let directory = self.pins.directory().to_owned();
            return Err(refused(doing(), ClientError::NotPrepared { pin, directory }));
        };
        let program = Program::from_fd(fd).map_err(failed(doing()))?;
        self.attacher.attach(hook, &program, &label).map(drop).map_err(failed(doing()))
    }

    fn ask(&self, request: &Request, limit: Duration) -> Result<Reply, ClientError> {
        let no_owner = |source| ClientError::NoOwner { socket: self.socket.clone(), source };
        let mut stream = UnixStream::connect(&self.socket).map_err(no_owner)?;
        // A timeout of zero would be none.
        let limit = Some(limit.max(Duration::from_millis(1)));
        stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit)).map_err(no_owner)?;
        protocol::send(&mut stream, request).map_err(ClientError::NoAnswer)?;
        match protocol::receive(&mut stream).map_err(ClientError::NoAnswer)? {
            Some(Reply::Refused { reason }) => Err(ClientError::Refused { reason }),
            Some(reply) => Ok(reply),
            None => Err(ClientError::NoAnswer(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
        }
    }

    /// Tells the owner something that it finds out by itself when it starts.
    fn tell(&self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request, NOTE_LIMIT) {
            Ok(_) => Ok(()),
            Err(error @ ClientError::Refused { .. }) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "the policy owner was not told");
                Ok(())
            }
        }
    }
}

impl<A: Attacher> PolicySink for PinnedDefault<A> {
    fn attach(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Err(error) = self.attach_default(endpoint, direction) {
                // Half a policy would be worse than none to whoever looks at the device.
                if let Err(left) = self.remove(endpoint.ifindex, &endpoint.attachment) {
                    tracing::warn!(device = %endpoint.ifname, error = %left, "default programs stay on the device");
                }
                return Err(error);
            }
        }
        let request = Request::Attached { endpoint: Box::new(endpoint.clone()), default: self.default };
        self.tell(&request).map_err(|e| refused(format!("tell the policy owner of {}", endpoint.attachment), e))
    }

    fn await_enforced(&self, endpoint: &Endpoint, limit: Duration) -> Result<(), PolicyError> {
        let attachment = endpoint.attachment.clone();
        let begun = Instant::now();
        let request = Request::Await { attachment: attachment.clone(), limit: Limit::saturating(limit) };
        let doing = || format!("await policy for {attachment}");
        let timed_out = || PolicyError::TimedOut { attachment: attachment.clone(), limit };
        // The owner keeps the limit; the margin is for its answer's way here.
        match self.ask(&request, limit + ANSWER_MARGIN) {
            Ok(Reply::Enforced { generation }) => {
                tracing::debug!(%attachment, generation, waited = ?begun.elapsed(), "policy enforced");
                Ok(())
            }
            Ok(Reply::Waiting { reason }) => Err(refused(doing(), ClientError::Waiting { reason })),
            Ok(Reply::Noted | Reply::Refused { .. }) => {
                Err(refused(doing(), ClientError::Refused { reason: "an answer to another question".to_owned() }))
            }
            Err(ClientError::NoAnswer(ProtocolError::Io(e)))
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                Err(timed_out())
            }
            Err(error) => Err(refused(doing(), error)),
        }
    }

    fn missing(&self, endpoint: &Endpoint) -> Result<Option<String>, PolicyError> {
        let label = endpoint.attachment.id().to_string();
        for direction in [Direction::Ingress, Direction::Egress] {
            let doing = || format!("look at the policy on {} ({direction:?})", endpoint.ifname);
            let hook = Hook { device: endpoint.ifindex, direction };
            let there = self.attacher.attached(hook).map_err(failed(doing()))?;
            if there.is_none_or(|a| a.owner != Owner::Ours(label.clone())) {
                return Ok(Some(format!("no policy is on {} ({direction:?})", endpoint.ifname)));
            }
        }
        Ok(None)
    }

    fn ready(&self) -> Result<(), PolicyError> {
        for direction in [Direction::Ingress, Direction::Egress] {
            let doing = || "look for the default policy".to_owned();
            let pin = default_pin(self.default, direction);
            if self.pins.get(pin).map_err(failed(doing()))?.is_none() {
                let directory = self.pins.directory().to_owned();
                return Err(failed(doing())(ClientError::NotPrepared { pin, directory }));
            }
        }
        Ok(())
    }

    fn detach(&self, attachment: &AttachmentKey) -> Result<(), PolicyError> {
        let doing = || format!("take policy off {attachment}");
        let name = attachment.id().host_ifname();
        // Through a socket of this thread's namespace, as attaching does.
        let index = UnixStream::pair()
            .map_err(failed(doing()))
            .map(|(socket, _)| rustix::net::netdevice::name_to_index(socket, name.as_str()).ok());
        if let Some(index) = index?.and_then(IfIndex::new) {
            self.remove(index, attachment).map_err(failed(doing()))?;
        }
        self.tell(&Request::Gone { attachment: attachment.clone() }).map_err(|e| refused(doing(), e))
    }
}

impl<A: Attacher> PinnedDefault<A> {
    fn remove(&self, device: IfIndex, attachment: &AttachmentKey) -> Result<(), dcenet_ebpf::attach::AttachError> {
        let label = attachment.id().to_string();
        for direction in [Direction::Ingress, Direction::Egress] {
            let hook = Hook { device, direction };
            let ours = self.attacher.attached(hook)?.is_some_and(|a| a.owner == Owner::Ours(label.clone()));
            if ours {
                self.attacher.detach(hook)?;
            }
        }
        Ok(())
    }
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(doing: String) -> impl FnOnce(E) -> PolicyError {
    move |error| PolicyError::Failed { doing, source: error.into() }
}

fn refused(doing: String, error: ClientError) -> PolicyError {
    let retryable = error.is_retryable();
    let source = error.into();
    if retryable { PolicyError::NotReady { doing, source } } else { PolicyError::Failed { doing, source } }
}

/// For an answer that the owner gives without waiting for anything.
const NOTE_LIMIT: Duration = Duration::from_secs(2);
const ANSWER_MARGIN: Duration = Duration::from_millis(100);
