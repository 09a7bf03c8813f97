//! A TCP connection that goes on while policy changes.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dcenet_core::netns::NetNs;

use crate::traffic::PORT;

/// Sends numbers and checks that each comes back, in order, until it is dropped.
pub struct Stream {
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Stream {
    /// Connects.
    pub fn open(from: &NetNs, to: IpAddr) -> Result<Self, Box<dyn std::error::Error>> {
        let limit = Duration::from_secs(2);
        let mut stream = from.run(|| TcpStream::connect_timeout(&SocketAddr::new(to, PORT), limit))??;
        stream.set_nodelay(true)?;
        // Short, so that the thread looks whether it is to stop; a late answer is waited for again.
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        let (answered, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (answered.clone(), stop.clone());
        let thread = std::thread::spawn(move || talk(&mut stream, &count, &ended));
        Ok(Self { answered, stop, thread: Some(thread) })
    }

    /// How many numbers have come back.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends it.
    ///
    /// # Errors
    /// If the connection broke, or a wrong number came back.
    pub fn close(mut self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            _ => Err(io::Error::other("the stream's thread panicked")),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn talk(stream: &mut TcpStream, answered: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&number.to_be_bytes())?;
        let (mut answer, mut length) = ([0; 8], 0);
        while length < 8 {
            match stream.read(&mut answer[length..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(more) => length += more,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if stop.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if answer != number.to_be_bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "another number came back"));
        }
        number += 1;
        answered.store(number, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
