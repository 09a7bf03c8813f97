//! The plugin's end.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, sendmsg, socket_with,
};

use super::{ACCEPTED, ALLOWED, DECLINED, GO, MAGIC, VARIABLES, VERSION, check_peer, identity, length, number, shared};
use crate::cni::{CniError, ErrorCode, NetConf};
use crate::sysctl::ALLOW_LIST;

/// How long a daemon may take to accept a call. It has done nothing by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to do what it accepted: longer than an ADD may wait for verdicts.
const WORK: Duration = Duration::from_secs(660);
/// A reason is for people.
const MOST_REASON: u32 = 1 << 16;
/// A result grows with addresses and routes.
const MOST_REPLY: u32 = 64 << 20;

/// What came of handing a call over.
pub(in crate::cni) enum Outcome {
    /// It was done or failed; what is to be printed.
    Answered { stdout: Vec<u8>, success: bool },
    /// Nobody took it, and nothing was done.
    NotTaken { reason: String },
}

/// Hands a call to the daemon behind a socket.
///
/// # Errors
/// Code 11 where it was accepted and nobody knows what was done.
pub(in crate::cni) fn pass(
    socket: &Path,
    environment: &dyn Fn(&str) -> Option<OsString>,
    stdin: &[u8],
    conf: &NetConf,
) -> Result<Outcome, CniError> {
    let mut stream = match offer(socket, environment, stdin, conf) {
        Ok(Ok(stream)) => stream,
        Ok(Err(reason)) => return Ok(Outcome::NotTaken { reason }),
        Err(error) => return Ok(Outcome::NotTaken { reason: error.to_string() }),
    };
    finish(&mut stream).map_err(|error| {
        let message = format!("the daemon at {} took the call and gave no answer: {error}", socket.display());
        CniError::new(ErrorCode::TryAgain, message)
    })
}

/// Sends the call; the connection where it was accepted, or the reason why not.
fn offer(
    socket: &Path,
    environment: &dyn Fn(&str) -> Option<OsString>,
    stdin: &[u8],
    conf: &NetConf,
) -> io::Result<Result<UnixStream, String>> {
    let descriptor = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // It bounds connect(2) too, which waits where a frozen daemon's queue is full (unix(7)).
    set_socket_timeout(&descriptor, Timeout::Send, Some(PATIENCE))?;
    set_socket_timeout(&descriptor, Timeout::Recv, Some(PATIENCE))?;
    connect(&descriptor, &SocketAddrUnix::new(socket)?)?;
    check_peer(&descriptor)?;
    let mut stream = UnixStream::from(descriptor);

    let mut variables = Vec::new();
    let mut tell = |name: &str, value: &[u8]| variables.extend([name.as_bytes(), b"=", value, b"\0"].concat());
    for (name, value) in VARIABLES.iter().filter_map(|name| Some((name, environment(name)?))) {
        tell(name, value.as_bytes());
    }
    for (name, path, _) in shared(conf) {
        tell(name, identity(path)?.as_bytes());
    }
    if environment("CNI_COMMAND").is_some_and(|verb| verb == "ADD") {
        // What it is that cannot be looked at is not what the daemon sees; most calls do not ask.
        let list = identity(Path::new(ALLOW_LIST)).unwrap_or_else(|error| error.to_string());
        tell(ALLOWED, list.as_bytes());
    }
    let header = [MAGIC, VERSION.to_be_bytes(), length(&variables)?, length(stdin)?].concat();
    // A path that cannot be opened is the daemon's to judge: DEL does without it.
    let netns = environment("CNI_NETNS").filter(|path| !path.is_empty()).and_then(|path| File::open(path).ok());
    let descriptors = netns.as_ref().map(|netns| [netns.as_fd()]);
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = sendmsg(&stream, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL)?;
    stream.write_all(header.get(sent..).unwrap_or_default())?;
    stream.write_all(&variables)?;
    stream.write_all(stdin)?;

    match read_byte(&mut stream)? {
        ACCEPTED => Ok(Ok(stream)),
        DECLINED => {
            let reason = read_counted(&mut stream, MOST_REASON)?;
            Ok(Err(String::from_utf8_lossy(&reason).into_owned()))
        }
        other => Err(io::Error::other(format!("it does not speak our protocol, but says {other:#x}"))),
    }
}

fn finish(stream: &mut UnixStream) -> io::Result<Outcome> {
    stream.write_all(&[GO])?;
    stream.set_read_timeout(Some(WORK))?;
    let failed = read_byte(stream)?;
    let stdout = read_counted(stream, MOST_REPLY)?;
    Ok(Outcome::Answered { stdout, success: failed == 0 })
}

fn read_byte(stream: &mut UnixStream) -> io::Result<u8> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn read_counted(stream: &mut UnixStream, most: u32) -> io::Result<Vec<u8>> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    let length = number(&bytes, 0);
    if length > most {
        return Err(io::Error::other(format!("{length} bytes are to follow, more than the {most} that are read")));
    }
    let mut content = Vec::new();
    stream.take(length.into()).read_to_end(&mut content)?;
    if content.len() == length as usize { Ok(content) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
