//! The owner's end of the socket.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

use super::EnforcerError;
use super::protocol::{self, ProtocolError, Reply, Request, socket_path};

/// Answers requests.
pub(crate) trait Answer: Send + Sync + 'static {
    /// Answers one; a request to wait blocks the connection's thread until then.
    fn answer(&self, request: Request) -> Reply;

    /// Called after the reply has been sent.
    fn answered(&self);
}

/// How long a child may take from fork to exec on a loaded machine.
const INHERITED: Duration = Duration::from_secs(1);

/// Makes sure of being the only owner of a run directory, for as long as it lives.
#[derive(Debug)]
pub(crate) struct OwnerLock {
    _file: File,
    path: PathBuf,
}

impl OwnerLock {
    pub(crate) fn take(run_dir: &Path) -> Result<Self, EnforcerError> {
        let failed = |path: &Path, source| EnforcerError::File { path: path.to_owned(), source };
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(run_dir);
        made.map_err(|e| failed(run_dir, e))?;
        let path = run_dir.join("policy.lock");
        loop {
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            let file = file.map_err(|e| failed(&path, e))?;
            if !exclusive(&file).map_err(|e| failed(&path, e))? {
                return Err(EnforcerError::AnotherOwner { path });
            }
            // An owner that was uninstalled may have removed it in between.
            if file.metadata().map_err(|e| failed(&path, e))?.nlink() > 0 {
                return Ok(Self { _file: file, path });
            }
        }
    }

    /// Removes the file, when nothing of the owner's is left.
    pub(crate) fn remove(self) -> Result<(), EnforcerError> {
        remove(&self.path)
    }
}

/// Locks it, or returns false where somebody else keeps it locked.
///
/// A lock of flock(2) belongs to the open file, of which every child of its process has a copy from fork to exec: an
/// owner that is gone may seem to hold it while a neighbouring thread starts a program. So a lock that is held is asked
/// for again for a while.
fn exclusive(file: &File) -> io::Result<bool> {
    let until = Instant::now() + INHERITED;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

pub(crate) fn remove(path: &Path) -> Result<(), EnforcerError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(EnforcerError::File { path: path.to_owned(), source: e }),
        _ => Ok(()),
    }
}

/// Listens until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on the run directory's socket, in place of one that a dead owner has left.
    pub(crate) fn start(run_dir: &Path, service: Arc<dyn Answer>) -> Result<Self, EnforcerError> {
        Self::start_for(run_dir, service, MAX_CONNECTIONS)
    }

    /// As [`Server::start`], for so many connections at a time.
    fn start_for(run_dir: &Path, service: Arc<dyn Answer>, most: usize) -> Result<Self, EnforcerError> {
        let path = socket_path(run_dir);
        // Nobody finds the socket before it has its mode.
        let fresh = run_dir.join(format!("policy.sock,{}", std::process::id()));
        let failed = |source| EnforcerError::File { path: path.clone(), source };
        remove(&fresh)?;
        let listener = UnixListener::bind(&fresh).map_err(failed)?;
        let placed = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&fresh, &path))
            .map_err(failed);
        if let Err(error) = placed {
            remove(&fresh)?;
            return Err(error);
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = std::thread::Builder::new()
            .name("dcenet-policy-socket".into())
            .spawn(move || listen(&listener, &service, most, &stop))
            .map_err(failed)?;
        Ok(Self { path, stopping, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // A connection wakes the thread from accept(2).
        let woken = UnixStream::connect(&self.path);
        if woken.is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the policy socket's thread panicked");
        }
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "the policy socket stays");
        }
    }
}

fn listen(listener: &UnixListener, service: &Arc<dyn Answer>, most: usize, stopping: &AtomicBool) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if stopping.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the policy socket");
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if connections.fetch_add(1, Ordering::AcqRel) >= most {
            connections.fetch_sub(1, Ordering::AcqRel);
            turn_away(stream, &Reply::Busy { reason: format!("{most} connections are open already; try again") });
            continue;
        }
        let (service, count) = (Arc::clone(service), Arc::clone(&connections));
        let started =
            std::thread::Builder::new().name("dcenet-policy-client".into()).stack_size(STACK).spawn(move || {
                let _open = Open(count);
                if let Err(error) = serve(stream, &*service) {
                    tracing::debug!(%error, "a client of the policy socket");
                }
            });
        if let Err(error) = started {
            connections.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "no thread for a client of the policy socket");
        }
    }
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(mut stream: UnixStream, service: &dyn Answer) -> Result<(), ProtocolError> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let peer = socket_peercred(&stream).map_err(io::Error::from)?.uid;
    if !peer.is_root() && peer != geteuid() {
        let reason = "only root and the owner's own user may speak here".to_owned();
        turn_away(stream, &Reply::Refused { reason });
        return Ok(());
    }
    loop {
        let reply = match protocol::receive::<Request>(&mut stream) {
            Ok(None) => return Ok(()),
            Ok(Some(Request::Gone { attachment })) if has_hung_up(&stream)? => {
                tracing::debug!(%attachment, "whoever said that it is gone has not waited for the answer; left as it is");
                return Ok(());
            }
            Ok(Some(request)) => service.answer(request),
            Err(error @ (ProtocolError::Version { .. } | ProtocolError::Malformed(_))) => {
                Reply::Refused { reason: error.to_string() }
            }
            Err(error @ ProtocolError::TooLong { .. }) => {
                turn_away(stream, &Reply::Refused { reason: error.to_string() });
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let sent = protocol::send(&mut stream, &reply);
        service.answered();
        sent?;
    }
}

/// Whether the client has closed the connection.
fn has_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    retry_on_intr(|| poll(&mut polled, Some(&now)))?;
    Ok(polled[0].revents().contains(PollFlags::HUP))
}

fn turn_away(mut stream: UnixStream, reply: &Reply) {
    let sent = stream
        .set_write_timeout(Some(SILENCE))
        .map_err(ProtocolError::from)
        .and_then(|()| protocol::send(&mut stream, reply));
    if let Err(error) = sent {
        tracing::debug!(%error, ?reply, "a refused client of the policy socket is gone");
    }
}

/// A node starts at most some hundred pods at once, and each waits on one.
const MAX_CONNECTIONS: usize = 1024;
const STACK: usize = 512 * 1024;
/// A client that says nothing for this long is forgotten.
const SILENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use dcenet_core::model::AttachmentKey;
    use dcenet_core::provider::{PolicyError, PolicySink};

    use super::*;
    use crate::enforcer::config::Limit;
    use crate::enforcer::{PinnedDefault, PolicyConfig};

    #[derive(Default)]
    struct Notes(AtomicUsize);

    impl Answer for Notes {
        fn answer(&self, _: Request) -> Reply {
            self.0.fetch_add(1, Ordering::AcqRel);
            Reply::Noted
        }

        fn answered(&self) {}
    }

    fn key() -> AttachmentKey {
        AttachmentKey {
            network: "shop".parse().unwrap(),
            container: "c1".parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        }
    }

    #[test]
    fn what_a_client_did_not_wait_for_is_not_gone() {
        let gone = Request::Gone { attachment: key() };
        let asks = Request::Await { attachment: key(), limit: Limit::saturating(Duration::ZERO) };
        for (request, waits, answered) in [(&gone, true, 1), (&gone, false, 0), (&asks, false, 1)] {
            let (mut client, owner) = UnixStream::pair().unwrap();
            protocol::send(&mut client, request).unwrap();
            let client = Some(client).filter(|_| waits);
            let notes = Notes::default();
            std::thread::scope(|scope| {
                let told = scope.spawn(|| drop(serve(owner, &notes)));
                if let Some(mut client) = client {
                    client.set_read_timeout(Some(SILENCE)).unwrap();
                    assert!(matches!(protocol::receive(&mut client), Ok(Some(Reply::Noted))));
                }
                told.join().unwrap();
            });
            assert_eq!(notes.0.load(Ordering::Acquire), answered, "{request:?}");
        }
    }

    #[test]
    fn one_connection_too_many_is_told_to_try_again() {
        let told = |most| {
            let directory = tempfile::tempdir().unwrap();
            let config = PolicyConfig { pins: directory.path().join("bpf"), ..PolicyConfig::default() };
            let _server = Server::start_for(directory.path(), Arc::<Notes>::default(), most).unwrap();
            PinnedDefault::new(&config, directory.path()).detach(&key())
        };
        told(1).unwrap();
        // Whether the answer comes before the question is sent or after it is a matter of chance.
        for _ in 0..100 {
            let error = told(0).unwrap_err();
            assert!(matches!(error, PolicyError::NotReady { .. }), "{error}");
            assert!(error.to_string().contains("try again"), "{error}");
        }
    }

    #[test]
    fn a_lock_that_only_a_starting_child_still_holds_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let lock = OwnerLock::take(directory.path()).unwrap();
        // A descriptor that shares the open file, as the copy of a child does.
        let copy = lock._file.try_clone().unwrap();
        drop(lock);
        let refused = OwnerLock::take(directory.path());
        assert!(matches!(refused, Err(EnforcerError::AnotherOwner { .. })), "{refused:?}");

        let exec = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(copy);
        });
        OwnerLock::take(directory.path()).unwrap();
        exec.join().unwrap();
    }
}
