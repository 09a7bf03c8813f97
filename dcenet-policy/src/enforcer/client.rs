//! The side of those who attach endpoints: a CNI binary, which lives for milliseconds and compiles nothing.

mod lift;

use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dcenet_core::model::{AttachmentKey, IfIndex, IfName};
use dcenet_core::provider::{Endpoint, Enforcement, PolicyError, PolicySink};
use dcenet_ebpf::attach::{AttachError, Attacher, ClsactAttacher, Direction, Hook, Owner};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::netdevice::name_to_index;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::config::{Ahead, DefaultVerdict, Limit, PolicyConfig, Require};
use super::guard;
use super::inside::{Inside, is_of, on_device};
use super::node::default_pin;
use super::protocol::{self, ProtocolError, Reply, Request, Stranger};

/// Puts devices under the pinned default programs, and talks to the owner of the policy state.
///
/// It needs nothing but the pins: whether the owner lives makes no difference to [`PolicySink::attach`].
///
/// On a device that lives in a pod the default that denies drops everything until the owner has taken note of the endpoint, also
/// what a pod asks and tells its neighbours, for it does not know the pod's addresses before.
///
/// # Minimum kernel version
/// 4.13, and 6.6 for devices that live in pods; what the pinned programs need was checked by the owner.
#[derive(Debug)]
pub struct PinnedDefault<A = ClsactAttacher> {
    pins: Pins,
    inside: Inside,
    socket: PathBuf,
    default: DefaultVerdict,
    require: Require,
    known: Vec<Ahead>,
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
    /// The owner has too much to do to take the request now.
    #[error("the policy owner is busy: {reason}")]
    Busy {
        /// With what.
        reason: String,
    },
    /// Another attachment's program is on the device.
    #[error("the device carries the policy of attachment {label}; detach that first")]
    OtherAttachment {
        /// The label there.
        label: String,
    },
    /// A device has several addresses of one family, and programs know one of each.
    #[error(
        "device {device} has the addresses {} of one family, and policy knows one of each family in a pod's interface; give it \
         one, or take the policy section out",
        join(addresses)
    )]
    SeveralAddresses {
        /// The device.
        device: IfName,
        /// Those of the family.
        addresses: Vec<IpAddr>,
    },
    /// The configuration wants a guard, and there is none.
    #[error(
        "policy.require \"guarded\": no guard is on the parent of device {device}, which lives in the pod ({enforcement:?}): {reason}. It \
         takes a macvlan and Linux 6.13; use one, a bridge or veth, or say \"any\""
    )]
    Unguarded {
        /// The device.
        device: IfName,
        /// What the owner says that it holds.
        enforcement: Enforcement,
        /// Why no more.
        reason: String,
    },
    /// The pod could pass its policy by, and the configuration wants one that it cannot.
    #[error(
        "policy.require \"full\": device {device} lives in the pod, which can pass its policy by with CAP_NET_RAW or \
         CAP_NET_ADMIN; use a bridge, veth or netkit, or say \"any\""
    )]
    Bypassable {
        /// The device.
        device: IfName,
    },
}

impl ClientError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        !matches!(
            self,
            Self::Refused { .. }
                | Self::OtherAttachment { .. }
                | Self::SeveralAddresses { .. }
                | Self::Bypassable { .. }
                | Self::Unguarded { .. }
        )
    }

    /// Whether nobody listens: the socket is not there, or what is left of one.
    fn is_absence(&self) -> bool {
        let kind = |e: &io::Error| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        matches!(self, Self::NoOwner { source, .. } if kind(source))
    }

    /// Whether the owner closed the connection.
    fn is_hang_up(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let kind = |e: &io::Error| matches!(e.kind(), BrokenPipe | ConnectionReset | UnexpectedEof);
        matches!(self, Self::NoAnswer(ProtocolError::Io(source)) if kind(source))
    }
}

/// A second address of a family would be taken for another pod's: what it sends dropped as spoofed, what it is sent as meant for
/// others.
fn one_of_each_family(endpoint: &Endpoint) -> Result<(), ClientError> {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = endpoint.addresses.iter().partition(|address| address.is_ipv4());
    match [v4, v6].into_iter().find(|addresses| addresses.len() > 1) {
        Some(addresses) => Err(ClientError::SeveralAddresses { device: endpoint.ifname.clone(), addresses }),
        None => Ok(()),
    }
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
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
        let inside = Inside::new(pins.clone());
        let (default, require, known) = (config.default, config.require, config.ahead.clone());
        Self { pins, inside, socket, default, require, known, attacher }
    }

    /// What holds programs where the endpoint's device is.
    fn attacher(&self, endpoint: &Endpoint) -> &dyn Attacher {
        if endpoint.place.is_host() { &self.attacher } else { self.inside.attacher() }
    }

    /// The hooks of the endpoint's device that do not carry a program of it.
    fn bare_hooks(&self, endpoint: &Endpoint) -> Result<Vec<Hook>, PolicyError> {
        let mut bare = Vec::new();
        for direction in BOTH {
            let hook = Hook { device: endpoint.ifindex, direction };
            let attached = self.attacher(endpoint).attached(hook).map_err(unattached(putting(endpoint)))?;
            match attached.map(|a| a.owner) {
                // A repeated call: what the owner has put there since is not for us to replace.
                Some(Owner::Ours(there)) if is_of(&there, endpoint.attachment.id()) => {}
                Some(Owner::Ours(label)) => {
                    return Err(refused(putting(endpoint), ClientError::OtherAttachment { label }));
                }
                Some(Owner::Foreign(_)) | None => bare.push(hook),
            }
        }
        Ok(bare)
    }

    fn open_default(&self, endpoint: &Endpoint, direction: Direction) -> Result<Program, PolicyError> {
        let at_host = on_device(direction, &endpoint.place);
        let pin = default_pin(self.default, at_host, endpoint.place.is_host());
        let Some(fd) = self.pins.get(pin).map_err(failed(putting(endpoint)))? else {
            let directory = self.pins.directory().to_owned();
            return Err(refused(putting(endpoint), ClientError::NotPrepared { pin, directory }));
        };
        Program::from_fd(fd).map_err(failed(putting(endpoint)))
    }

    /// Whether only a guard on its parent makes it what the configuration wants.
    fn needs_guard(&self, endpoint: &Endpoint) -> bool {
        self.require == Require::Guarded && !self.require.is_met_by(endpoint.enforcement())
    }

    /// Asks the owner whether there is a guard, and what is ahead of it.
    fn guarded(&self, endpoint: &Endpoint) -> Result<Vec<Stranger>, ClientError> {
        match self.ask(&Request::Enforcement { attachment: endpoint.attachment.clone() }, NOTE_LIMIT)? {
            Reply::Holds { enforcement, ahead, .. } if self.require.is_met_by(enforcement) => Ok(ahead),
            Reply::Holds { enforcement, reason, .. } => {
                let reason = reason.unwrap_or_else(|| "it was attached without one".to_owned());
                Err(ClientError::Unguarded { device: endpoint.ifname.clone(), enforcement, reason })
            }
            _ => Err(ClientError::Refused { reason: "an answer to another question".to_owned() }),
        }
    }

    fn ask(&self, request: &Request, limit: Duration) -> Result<Reply, ClientError> {
        let no_owner = |source| ClientError::NoOwner { socket: self.socket.clone(), source };
        let begun = Instant::now();
        let connected = gated("connect to the policy owner", || connect(&self.socket, limit.max(SHORTEST)));
        let mut stream = connected.map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => {
                let text = format!("it takes no connections, waited {limit:?}");
                ClientError::NoAnswer(io::Error::new(io::ErrorKind::TimedOut, text).into())
            }
            _ => no_owner(source),
        })?;
        let left = Some(limit.saturating_sub(begun.elapsed()).max(SHORTEST));
        stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left)).map_err(no_owner)?;
        let sent =
            gated("ask the policy owner", || protocol::send(&mut stream, request)).map_err(ClientError::NoAnswer);
        // An owner with too many connections answers and closes without waiting for the question.
        let sent = match sent {
            Err(error) if !error.is_hang_up() => return Err(error),
            sent => sent,
        };
        let answer = gated("hear the policy owner", || protocol::receive(&mut stream)).map_err(ClientError::NoAnswer);
        let answer = match (sent, answer) {
            (_, Ok(Some(reply))) => Some(reply),
            (sent, answer) => sent.and(answer)?,
        };
        match answer {
            Some(Reply::Refused { reason }) => Err(ClientError::Refused { reason }),
            Some(Reply::Busy { reason }) => Err(ClientError::Busy { reason }),
            Some(reply) => Ok(reply),
            None => Err(ClientError::NoAnswer(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
        }
    }

    /// Tells the owner something that it finds out by itself when it starts: nobody listening is no error, unless the owner
    /// is `needed`. An owner that lives and is not told is one, for it would go on deciding by what is no longer true.
    fn tell(&self, request: &Request, needed: bool) -> Result<(), ClientError> {
        let told = match self.ask(request, NOTE_LIMIT) {
            // An owner that ended in the middle, or another by now.
            Err(error) if error.is_hang_up() => self.ask(request, NOTE_LIMIT),
            told => told,
        };
        match told {
            Ok(_) => Ok(()),
            Err(error) if error.is_absence() && !needed => {
                tracing::debug!(%error, "the policy owner was not told");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl<A: Attacher> PolicySink for PinnedDefault<A> {
    fn attach(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        one_of_each_family(endpoint).map_err(|e| refused(putting(endpoint), e))?;
        let needs_guard = self.needs_guard(endpoint);
        if !needs_guard && !self.require.is_met_by(endpoint.enforcement()) {
            let device = endpoint.ifname.clone();
            return Err(refused(putting(endpoint), ClientError::Bypassable { device }));
        }
        let bare = self.bare_hooks(endpoint)?;
        let defaults: Vec<Program> =
            bare.iter().map(|hook| self.open_default(endpoint, hook.direction)).collect::<Result<_, _>>()?;
        let label = endpoint.attachment.id().to_string();
        for (hook, program) in bare.iter().zip(&defaults) {
            if let Err(error) = self.attacher(endpoint).attach(*hook, program, &label) {
                // Half a policy would be worse than none to whoever looks at the device. What was there before stays.
                if let Err(left) = remove(self.attacher(endpoint), &bare, &endpoint.attachment) {
                    tracing::warn!(device = %endpoint.ifname, error = %left, "default programs stay on the device");
                }
                return Err(unattached(putting(endpoint))(error));
            }
        }
        let endpoint_told = Box::new(endpoint.clone());
        let request = Request::Attached { endpoint: endpoint_told, default: self.default, guarded: needs_guard };
        let telling = || format!("tell the policy owner of {}", endpoint.attachment);
        let told = self.tell(&request, needs_guard).map_err(|e| refused(telling(), e));
        if !needs_guard {
            return told;
        }
        told.and_then(|()| self.guarded(endpoint).map(drop).map_err(|e| refused(putting(endpoint), e))).inspect_err(|_| {
            // A repeated call: the pod runs, and what it has is not this call's to take.
            if bare.len() < BOTH.len() {
                return;
            }
            if let Err(left) = remove(self.attacher(endpoint), &bare, &endpoint.attachment) {
                tracing::warn!(device = %endpoint.ifname, error = %left, "default programs stay on the device");
            }
            if let Err(left) = self.tell(&Request::Gone { attachment: endpoint.attachment.clone() }, false) {
                tracing::warn!(attachment = %endpoint.attachment, error = %left, "the policy owner takes it for attached");
            }
        })
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
            Ok(Reply::Noted | Reply::Holds { .. } | Reply::Refused { .. } | Reply::Busy { .. }) => {
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
        let id = endpoint.attachment.id();
        let attacher = self.attacher(endpoint);
        for direction in BOTH {
            let doing = || format!("look at the policy on {} ({direction:?})", endpoint.ifname);
            let hook = Hook { device: endpoint.ifindex, direction };
            let there = attacher.attached(hook).map_err(failed(doing()))?;
            if there.is_none_or(|a| !matches!(a.owner, Owner::Ours(label) if is_of(&label, id))) {
                return Ok(Some(format!("no policy is on {} ({direction:?})", endpoint.ifname)));
            }
            let mut ahead = attacher.before(hook).map_err(failed(doing()))?;
            ahead.retain(|attached| !self.known.iter().any(|known| known.is(attached)));
            if !ahead.is_empty() {
                let list: Vec<_> = ahead.iter().map(ToString::to_string).collect();
                return Ok(Some(format!(
                    "packets of {} ({direction:?}) meet {} before policy, and pass it by where that answers TC_ACT_OK or XDP_TX, or \
                     redirects; remove it, give it a later place, or name it in policy.ahead",
                    endpoint.ifname,
                    list.join(", ")
                )));
            }
        }
        if self.needs_guard(endpoint) {
            let doing = || format!("ask for the guard of {}", endpoint.ifname);
            return match self.guarded(endpoint) {
                Ok(mut ahead) => {
                    let is_known = |stranger: &Stranger| {
                        self.known.iter().any(|known| known.names(stranger.name.as_deref(), stranger.tag))
                    };
                    ahead.retain(|stranger| !is_known(stranger));
                    let list: Vec<_> = ahead.iter().map(|stranger| stranger.text.as_str()).collect();
                    Ok((!list.is_empty()).then(|| {
                        format!(
                            "frames of {} meet {} on its parent before the guard, and pass it by where that answers TC_ACT_OK or \
                             XDP_TX, or redirects; remove it, give it a later place, or name it in policy.ahead",
                            endpoint.ifname,
                            list.join(", ")
                        )
                    }))
                }
                Err(error @ ClientError::Unguarded { .. }) => Ok(Some(error.to_string())),
                // The guard does not need its owner.
                Err(error) if error.is_absence() => {
                    let holds = guard::is_pinned(&self.pins, endpoint).map_err(failed(doing()))?;
                    Ok((!holds).then(|| format!("no guard is on the parent of {}, and {error}", endpoint.ifname)))
                }
                Err(error) => Err(refused(doing(), error)),
            };
        }
        Ok(None)
    }

    fn answers(&self, attachment: &AttachmentKey, awaited: bool) -> Result<(), PolicyError> {
        // Whatever it answers, it answers.
        let request = Request::Await { attachment: attachment.clone(), limit: Limit::saturating(Duration::ZERO) };
        match self.tell(&request, awaited) {
            Err(ClientError::Refused { .. }) => Ok(()),
            // There may never have been one, which says more.
            Err(error) if error.is_absence() => {
                self.ready()?;
                Err(refused(format!("ask the policy owner about {attachment}"), error))
            }
            told => told.map_err(|e| refused(format!("ask the policy owner about {attachment}"), e)),
        }
    }

    fn ready(&self) -> Result<(), PolicyError> {
        for direction in BOTH {
            let doing = || "look for the default policy".to_owned();
            let pin = default_pin(self.default, direction, true);
            if self.pins.get(pin).map_err(failed(doing()))?.is_none() {
                let directory = self.pins.directory().to_owned();
                return Err(refused(doing(), ClientError::NotPrepared { pin, directory }));
            }
        }
        Ok(())
    }

    fn detach(&self, attachment: &AttachmentKey) -> Result<(), PolicyError> {
        let doing = || format!("take policy off {attachment}");
        let name = attachment.id().host_ifname();
        // Through a socket of this thread's namespace, as attaching does.
        let (socket, _) = UnixStream::pair().map_err(failed(doing()))?;
        let index = gated("look up the device", || name_to_index(socket, name.as_str()).map_err(io::Error::from));
        let index = match index {
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => None,
            index => IfIndex::new(index.map_err(failed(doing()))?),
        };
        if let Some(device) = index {
            let hooks = BOTH.map(|direction| Hook { device, direction });
            remove(&self.attacher, &hooks, attachment).map_err(failed(doing()))?;
        }
        self.inside.forget(attachment.id()).map_err(failed(doing()))?;
        let living = self.inside.shut(&self.pins, attachment.id()).map_err(failed(doing()))?;
        if living > 0 {
            // Its namespace may end in the background, or be out of reach; the owner removes the pins when it has.
            tracing::debug!(%attachment, living, "its device in the pod lives, and is shut until it is gone");
        }
        self.tell(&Request::Gone { attachment: attachment.clone() }, false).map_err(|e| refused(doing(), e))
    }

    fn lift(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        self.lift_from(endpoint)
    }
}

fn remove(attacher: &dyn Attacher, hooks: &[Hook], attachment: &AttachmentKey) -> Result<(), AttachError> {
    let is_ours = |owner: &Owner| matches!(owner, Owner::Ours(label) if is_of(label, attachment.id()));
    for hook in hooks {
        if attacher.attached(*hook)?.is_some_and(|a| is_ours(&a.owner)) {
            attacher.detach(*hook)?;
        }
    }
    Ok(())
}

/// Connects within a limit; [`io::ErrorKind::WouldBlock`] where the owner's queue of connections stays full that long.
///
/// `connect(2)` on a Unix socket waits for room in the queue for as long as `SO_SNDTIMEO` says, and for ever without it:
/// net/unix/af_unix.c, `unix_stream_connect`.
fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    retry_on_intr(|| net::connect(&socket, &address))?;
    Ok(socket.into())
}

fn putting(endpoint: &Endpoint) -> String {
    format!("put the default policy on {}", endpoint.ifname)
}

/// Makes a call, unless a test wants it to fail.
#[cfg(not(feature = "fault-injection"))]
fn gated<T, E>(_call: &str, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    make()
}

#[cfg(feature = "fault-injection")]
fn gated<T, E: From<io::Error>>(call: &str, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let mut outcome = None;
    dcenet_core::test_support::through_gate(call, || {
        outcome = Some(make());
        Ok(())
    })?;
    outcome.expect("a call that passes the gate was made")
}

/// What could not be done to a hook; a kernel without tcx is named.
fn unattached(doing: String) -> impl FnOnce(AttachError) -> PolicyError {
    move |error| match error {
        AttachError::Unsupported { feature } => PolicyError::Unsupported(format!(
            "{doing}: policy on a device that lives in a pod needs {feature}; use a bridge or veth, or drop the policy section"
        )),
        error => failed(doing)(error),
    }
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(doing: String) -> impl FnOnce(E) -> PolicyError {
    move |error| {
        let source: Box<dyn std::error::Error + Send + Sync> = error.into();
        let is_busy = source.downcast_ref::<AttachError>().is_some_and(AttachError::is_busy);
        if is_busy { PolicyError::NotReady { doing, source } } else { PolicyError::Failed { doing, source } }
    }
}

fn refused(doing: String, error: ClientError) -> PolicyError {
    let retryable = error.is_retryable();
    let source = error.into();
    if retryable { PolicyError::NotReady { doing, source } } else { PolicyError::Failed { doing, source } }
}

const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];
/// For an answer that the owner gives without waiting for anything.
const NOTE_LIMIT: Duration = Duration::from_secs(2);
const ANSWER_MARGIN: Duration = Duration::from_millis(100);
/// A timeout of zero would be none.
const SHORTEST: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use dcenet_core::provider::Place;

    use super::*;

    #[test]
    fn a_second_address_of_a_family_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let config = PolicyConfig { pins: directory.path().join("bpf"), ..PolicyConfig::default() };
        let sink = PinnedDefault::new(&config, directory.path());
        let put = |addresses: &[&str]| {
            let endpoint = Endpoint {
                attachment: AttachmentKey {
                    network: "shop".parse().unwrap(),
                    container: "c1".parse().unwrap(),
                    ifname: "eth0".parse().unwrap(),
                },
                ifindex: IfIndex::new(u32::MAX >> 1).unwrap(),
                ifname: "dc0".parse().unwrap(),
                place: Place::Host,
                link_local: None,
                mac: dcenet_core::model::MacAddr::new([2, 0, 0, 0, 0, 1]),
                addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
                workload: None,
                labels: Default::default(),
            };
            sink.attach(&endpoint).unwrap_err().to_string()
        };
        for several in [["10.0.0.1", "fd00::1", "10.0.0.2"], ["10.0.0.1", "fd00::1", "fd00::2"]] {
            let told = put(&several);
            assert!(told.contains("of one family") && told.contains(several[2]), "{told}");
        }
        let one_of_each = put(&["10.0.0.1", "fd00::1"]);
        assert!(!one_of_each.contains("of one family"), "{one_of_each}");
    }

    /// What a client makes of telling the owner that an attachment is gone; `owner` hangs up on each connection that it
    /// takes, and takes `connections`.
    fn tell_an_owner_that_hangs_up(connections: usize) -> Result<(), PolicyError> {
        let directory = tempfile::tempdir().unwrap();
        let config = PolicyConfig { pins: directory.path().join("bpf"), ..PolicyConfig::default() };
        let sink = PinnedDefault::new(&config, directory.path());
        let path = protocol::socket_path(directory.path());
        let listener = UnixListener::bind(&path).unwrap();
        let key = AttachmentKey {
            network: "shop".parse().unwrap(),
            container: "c1".parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        };
        std::thread::scope(|scope| {
            let socket = path.clone();
            scope.spawn(move || {
                for n in 1..=connections {
                    let taken = listener.accept().unwrap();
                    if n == connections {
                        std::fs::remove_file(&socket).unwrap();
                    }
                    drop(taken);
                }
                drop(listener);
            });
            let told = sink.detach(&key);
            // Whatever it still waits for.
            while UnixStream::connect(&path).is_ok() {}
            told
        })
    }

    #[test]
    fn an_owner_that_ends_while_it_is_told_is_none() {
        tell_an_owner_that_hangs_up(1).unwrap();
    }

    #[test]
    fn an_owner_that_lives_and_does_not_hear_is_an_error_to_try_again() {
        let error = tell_an_owner_that_hangs_up(2).unwrap_err();
        assert!(matches!(error, PolicyError::NotReady { .. }), "{error}");
        assert!(error.to_string().contains("did not answer"), "{error}");
    }

    #[test]
    fn an_owner_that_takes_no_connections_is_waited_for_no_longer_than_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let config = PolicyConfig { pins: directory.path().join("bpf"), ..PolicyConfig::default() };
        let sink = PinnedDefault::new(&config, directory.path());
        let path = protocol::socket_path(directory.path());
        let listener = UnixListener::bind(&path).unwrap();
        net::listen(&listener, 0).unwrap();
        // A queue of 0 takes one: it is full where it is longer.
        let _queued = UnixStream::connect(&path).unwrap();
        let gone = Request::Gone {
            attachment: serde_json::from_str(r#"{"network": "shop", "container": "c1", "ifname": "eth0"}"#).unwrap(),
        };
        let (said, heard) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || said.send(sink.ask(&gone, Duration::from_millis(50))));
            let result = heard.recv_timeout(Duration::from_secs(60));
            // Wakes a client that waits without a limit.
            drop(listener);
            let error = result.expect("waits without a limit").unwrap_err();
            let silent =
                matches!(&error, ClientError::NoAnswer(ProtocolError::Io(e)) if e.kind() == io::ErrorKind::TimedOut);
            assert!(silent && error.is_retryable() && !error.is_absence(), "{error}");
        });
    }

    #[test]
    fn what_a_dead_owner_leaves_of_its_socket_is_no_owner() {
        let directory = tempfile::tempdir().unwrap();
        let config = PolicyConfig { pins: directory.path().join("bpf"), ..PolicyConfig::default() };
        let sink = PinnedDefault::new(&config, directory.path());
        let path = protocol::socket_path(directory.path());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let gone = Request::Await {
            attachment: serde_json::from_str(r#"{"network": "shop", "container": "c1", "ifname": "eth0"}"#).unwrap(),
            limit: Limit::MAX,
        };
        sink.tell(&gone, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        sink.tell(&gone, false).unwrap();
    }
}
