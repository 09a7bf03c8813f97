//! The daemon's end.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

use super::queue::{Place, Queue};
use super::{
    ACCEPTED, ALLOWED, DECLINED, GO, HEADER, MAGIC, SHARED, VARIABLES, VERSION, check_peer, identity, length, number,
    shared,
};
use crate::cni::serve::{PolicyChoice, STDIN_LIMIT, failure, respond};
use crate::cni::{Backends, CniError, ErrorCode, NetConf, Role};
use crate::engine::Removals;
use crate::provider::{AddressSource, DeviceSource, PolicySink};
use crate::sysctl::ALLOW_LIST;

/// How long a plugin may be silent before its call has begun: it has nothing to wait for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a call waits for those before it about the same attachment. Longer than one that never begins is in the way.
const TURN: Duration = Duration::from_secs(10);
/// More than the system lets a program be given (execve(2), "Limits on size of arguments and environment").
const MOST_ENVIRONMENT: u32 = 8 << 20;

/// Serves calls of plugins until it is dropped, which waits for those under way.
#[derive(Debug)]
pub struct Server {
    socket: Arc<Socket>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Socket {
    path: PathBuf,
    /// Device and inode of the file, by which it is known again.
    file: (u64, u64),
    listener: UnixListener,
    queue: Arc<Queue>,
    removals: Arc<Removals>,
    stopping: AtomicBool,
}

impl Server {
    /// Listens on a socket of mode 0600, in the place of one that a dead server left, and serves so many calls at a time.
    ///
    /// Whoever may be started twice makes sure beforehand that no other server lives: its socket would be replaced as well.
    /// The calling thread must be in the host's network namespace. `backends` are asked by several threads at once; where
    /// their sources of addresses share one store that groups commits, the calls share its flushes.
    ///
    /// # Errors
    /// Where the socket cannot be made, or a thread.
    pub fn start(path: &Path, workers: NonZeroUsize, backends: Arc<dyn Backends + Send + Sync>) -> io::Result<Self> {
        let mut this = Self { socket: Arc::new(listen(path)?), workers: Vec::new() };
        for n in 0..workers.get() {
            let (socket, backends) = (Arc::clone(&this.socket), Arc::clone(&backends));
            let work = move || work(&socket, &*backends);
            this.workers.push(std::thread::Builder::new().name(format!("dcenet-node-{n}")).spawn(work)?);
        }
        Ok(this)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Socket { path, file, listener, stopping, .. } = &*self.socket;
        stopping.store(true, Ordering::Release);
        // All threads wake from accept(2), and whoever connects is refused (`unix_accept`, `unix_stream_connect` in
        // net/unix/af_unix.c). The path may lead to another's socket by now.
        if let Err(error) = rustix::net::shutdown(listener, rustix::net::Shutdown::Read) {
            tracing::warn!(%error, "threads of the node server stay");
            return;
        }
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("a thread of the node server panicked");
            }
        }
        match fs::symlink_metadata(path) {
            Ok(found) if (found.dev(), found.ino()) == *file => {
                if let Err(error) = fs::remove_file(path) {
                    tracing::warn!(%error, "the node server's socket stays");
                }
            }
            Ok(_) => tracing::warn!(path = %path.display(), "another's socket is in the place of the node server's"),
            Err(error) => tracing::warn!(%error, "the node server's socket is gone"),
        }
    }
}

/// Nobody finds the socket before it has its mode.
fn listen(path: &Path) -> io::Result<Socket> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(",{}", std::process::id()));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    let place = || -> io::Result<(u64, u64)> {
        fs::set_permissions(&fresh, Permissions::from_mode(0o600))?;
        let made = fs::symlink_metadata(&fresh)?;
        fs::rename(&fresh, path)?;
        Ok((made.dev(), made.ino()))
    };
    let file = place().inspect_err(|_| {
        // What went wrong is told; the file is nobody's, and the next start removes it.
        let _ = fs::remove_file(&fresh);
    })?;
    let stopping = AtomicBool::new(false);
    Ok(Socket { path: path.to_owned(), file, listener, queue: Arc::default(), removals: Arc::default(), stopping })
}

fn work(socket: &Socket, backends: &dyn Backends) {
    loop {
        let accepted = socket.listener.accept();
        if socket.stopping.load(Ordering::Acquire) {
            return;
        }
        let outcome = match accepted {
            Ok((stream, _)) => serve_one(stream, backends, socket),
            Err(error) => {
                // Out of descriptors, as a rule: others give some back.
                std::thread::sleep(Duration::from_millis(10));
                Err(error)
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a plugin left");
        }
    }
}

/// A call as it came.
struct Request {
    environment: Vec<(Vec<u8>, Vec<u8>)>,
    stdin: Vec<u8>,
    netns: Option<File>,
}

impl Request {
    fn get(&self, name: &str) -> Option<OsString> {
        let found = self.environment.iter().find(|(known, _)| known == name.as_bytes());
        found.map(|(_, value)| OsString::from_vec(value.clone()))
    }

    /// Its place among the calls about the same attachment; `None` where it is about none.
    fn queue(&self, queue: &Arc<Queue>) -> Option<Place> {
        let subject = (self.get("CNI_CONTAINERID")?, self.get("CNI_IFNAME")?);
        Some(queue.enter(subject))
    }
}

/// The backends of a call whose plugin may leave.
struct Attended<'a> {
    backends: &'a dyn Backends,
    plugin: &'a UnixStream,
    removals: &'a Arc<Removals>,
}

impl Backends for Attended<'_> {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        self.backends.addresses(conf)
    }

    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        self.backends.policy(conf)
    }

    fn former_policy(&self, conf: &NetConf) -> Option<Arc<dyn PolicySink>> {
        self.backends.former_policy(conf)
    }

    fn devices(&self, conf: &NetConf) -> Result<Option<Arc<dyn DeviceSource>>, CniError> {
        self.backends.devices(conf)
    }

    fn stands_alone(&self, conf: &NetConf) -> Result<bool, CniError> {
        self.backends.stands_alone(conf)
    }

    fn removals(&self) -> Option<Arc<Removals>> {
        Some(Arc::clone(self.removals))
    }

    /// A plugin that waits says nothing.
    fn is_awaited(&self) -> bool {
        let said = recv(self.plugin, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(said, Ok((1.., _)) | Err(Errno::AGAIN | Errno::INTR)) && self.backends.is_awaited()
    }
}

fn serve_one(mut stream: UnixStream, backends: &dyn Backends, socket: &Socket) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    check_peer(&stream)?;
    let request = match read(&mut stream)? {
        Ok(request) => request,
        Err(reason) => {
            tracing::warn!(reason, "a call was declined");
            stream.write_all(&[DECLINED])?;
            stream.write_all(&length(reason.as_bytes())?)?;
            stream.write_all(reason.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            // To close over what is not read would reset the connection, and the plugin would not hear the reason.
            let most = u64::from(MOST_ENVIRONMENT) + STDIN_LIMIT;
            return io::copy(&mut stream.take(most), &mut io::sink()).map(|_| ());
        }
    };
    // Before it is accepted: a plugin that leaves afterwards is followed by another about the same attachment.
    let place = request.queue(&socket.queue);
    stream.write_all(&[ACCEPTED])?;
    let mut go = [0];
    stream.read_exact(&mut go)?;
    if go != [GO] {
        return Err(io::Error::other("it did not say go"));
    }
    let (text, success) = if place.as_ref().is_none_or(|place| place.wait(TURN)) {
        let backends = Attended { backends, plugin: &stream, removals: &socket.removals };
        let call = || pollster::block_on(respond(|name| request.get(name), Ok(request.stdin.as_slice()), &backends));
        catch_unwind(AssertUnwindSafe(call)).map_err(|_| io::Error::other("the call panicked"))?
    } else {
        let message = "a call about this attachment that came before is still under way; try again";
        (Some(failure(&CniError::new(ErrorCode::TryAgain, message), &request.stdin)), false)
    };
    // Whoever hears the reply may call again at once.
    drop(place);
    let text = text.unwrap_or_default();
    stream.write_all(&[u8::from(!success)])?;
    stream.write_all(&length(text.as_bytes())?)?;
    stream.write_all(text.as_bytes())
}

/// Reads a call, or tells why it is declined.
fn read(stream: &mut UnixStream) -> io::Result<Result<Request, String>> {
    let mut header = [0; HEADER];
    let (had, netns) = receive(stream, &mut header)?;
    stream.read_exact(header.get_mut(had..).unwrap_or_default())?;
    if header[..4] != MAGIC {
        return Err(io::Error::other("it does not speak our protocol"));
    }
    let version = number(&header, 4);
    if version != VERSION {
        let reason = format!("the daemon speaks protocol {VERSION}, the plugin {version}; install both of one release");
        return Ok(Err(reason));
    }
    let (environment, stdin) = (number(&header, 8), number(&header, 12));
    if environment > MOST_ENVIRONMENT || u64::from(stdin) >= STDIN_LIMIT {
        return Ok(Err(format!("{environment} bytes of environment and {stdin} of configuration are too many")));
    }
    let (mut variables, mut input) = (vec![0; environment as usize], vec![0; stdin as usize]);
    stream.read_exact(&mut variables)?;
    stream.read_exact(&mut input)?;
    let mut named = Vec::new();
    for variable in variables.split(|byte| *byte == 0) {
        let Some(at) = variable.iter().position(|byte| *byte == b'=') else { continue };
        let (name, value) = (&variable[..at], &variable[at + 1..]);
        if VARIABLES.iter().chain(&SHARED).chain([&ALLOWED]).any(|known| known.as_bytes() == name) {
            named.push((name.to_vec(), value.to_vec()));
        }
    }
    let request = Request { environment: named, stdin: input, netns };
    Ok(match misled(&request)? {
        Some(reason) => Err(reason),
        None => Ok(request),
    })
}

/// Why a path or the host's namespace means something else here than for the plugin, if one does.
fn misled(request: &Request) -> io::Result<Option<String>> {
    if let Some(path) = request.get("CNI_NETNS").filter(|path| !path.is_empty()).map(PathBuf::from) {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = request.netns.as_ref().and_then(|netns| netns.metadata().ok()).map(identity);
        let here = fs::metadata(&path).ok().map(identity);
        if there != here {
            let path = path.display();
            return Ok(Some(format!("{path} is another file for the daemon; run it with the host's mounts")));
        }
    }
    // What is wrong with a configuration is told by the call itself.
    let Ok(conf) = NetConf::parse(&request.stdin) else { return Ok(None) };
    for (name, path, remedy) in shared(&conf) {
        let there = request.get(name).unwrap_or_default();
        if *there != *identity(path)? {
            let path = path.display();
            return Ok(Some(format!("{name}: {path} is another for the daemon than for the plugin; {remedy}")));
        }
    }
    Ok(mislisted(request, &conf))
}

/// Why a call that may make settings would be held to another list of those that the node allows, if it would.
fn mislisted(request: &Request, conf: &NetConf) -> Option<String> {
    // A call that takes away asks no list. One for several networks may find settings in definitions that it does not hold.
    let adds = request.get("CNI_COMMAND").is_some_and(|verb| verb == "ADD");
    let link = || conf.section::<serde_json::Value>("link").ok().flatten();
    let sets = || conf.role == Role::Meta || link().is_some_and(|link| link.get("sysctl").is_some());
    if !adds || !sets() {
        return None;
    }
    let Some(there) = request.get(ALLOWED) else {
        return Some(format!(
            "{ALLOWED}: the plugin does not tell it, for it is of an earlier release; install both of one"
        ));
    };
    match identity(Path::new(ALLOW_LIST)) {
        Ok(here) if *there == *here => None,
        Ok(_) => Some(format!(
            "{ALLOWED}: {ALLOW_LIST} is another for the daemon than for the plugin; mount it where the daemon runs, and start \
             the daemon anew when it was replaced"
        )),
        Err(error) => Some(format!("{ALLOWED}: the daemon cannot look at {ALLOW_LIST}: {error}; let it")),
    }
}

/// The first bytes, and the descriptor that comes with them.
fn receive(stream: &UnixStream, header: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(header)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut netns = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            netns = descriptors.map(File::from).next();
        }
    }
    Ok((received.bytes, netns))
}
