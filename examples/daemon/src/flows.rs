//! Who is told of flows: a file, a collector, and the counters for Prometheus.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter};
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dcenet_policy::enforcer::flows::ipfix::{IpfixConfig, IpfixExporter};
use dcenet_policy::enforcer::flows::prometheus::FlowMetrics;
use dcenet_policy::enforcer::flows::{Flow, FlowReader, FlowSink, JsonLines, Losses};

use crate::config::FlowsConfig;

/// A file of JSON lines that can be rotated, and may be on a disk that is full.
#[derive(Debug)]
struct FlowFile {
    path: PathBuf,
    lines: Option<JsonLines<BufWriter<File>>>,
    reopen: Arc<AtomicBool>,
    /// Flows that the file does not have, and of which it is told when it can be written again.
    missed: u64,
}

impl FlowFile {
    fn open(path: &Path, reopen: Arc<AtomicBool>) -> io::Result<Self> {
        let lines = Some(append_to(path)?);
        Ok(Self { path: path.to_owned(), lines, reopen, missed: 0 })
    }

    /// Tries once, and tells of what did not work the first time.
    fn write(&mut self, write: impl FnOnce(&mut JsonLines<BufWriter<File>>) -> io::Result<()>) {
        if self.reopen.swap(false, Ordering::AcqRel) || self.lines.is_none() {
            let written = self.lines.take().map_or(Ok(()), |mut lines| lines.flush());
            self.settle(written);
            match append_to(&self.path) {
                Ok(lines) => self.lines = Some(lines),
                Err(error) => {
                    self.settle(Err(error));
                    return;
                }
            }
        }
        let Some(lines) = &mut self.lines else { return };
        let written = write(lines);
        self.settle(written);
    }

    fn settle(&mut self, written: io::Result<()>) {
        match written {
            Ok(()) if self.missed > 0 => {
                tracing::info!(path = %self.path.display(), missed = self.missed, "flows are written again");
                self.missed = 0;
            }
            Ok(()) => {}
            Err(error) => {
                if self.missed == 0 {
                    tracing::warn!(path = %self.path.display(), %error, "flows are not written");
                }
                self.missed = self.missed.saturating_add(1);
                // What is in the buffer cannot be written either, and would be tried again for ever.
                self.lines = None;
            }
        }
    }
}

fn append_to(path: &Path) -> io::Result<JsonLines<BufWriter<File>>> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    Ok(JsonLines(BufWriter::new(file)))
}

/// Hands each flow to all of them: one that fails takes nothing from the others.
struct Everybody {
    file: Option<FlowFile>,
    collector: Option<IpfixExporter>,
    metrics: FlowMetrics,
}

impl FlowSink for Everybody {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write(|lines| lines.flow(flow));
        }
        if let Some(collector) = &mut self.collector {
            collector.flow(flow)?;
        }
        self.metrics.flow(flow)
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write(|lines| lines.lost(losses));
        }
        if let Some(collector) = &mut self.collector {
            collector.lost(losses)?;
        }
        self.metrics.lost(losses)
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write(FlowSink::flush);
        }
        if let Some(collector) = &mut self.collector {
            collector.flush()?;
        }
        self.metrics.flush()
    }
}

/// A thread that reads flows until it is dropped.
#[derive(Debug)]
pub struct Flows {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flows {
    /// Begins to read. The file is opened anew when `reopen` becomes true.
    ///
    /// # Errors
    /// Where the file cannot be opened, or no socket leads to the collector.
    pub fn start(
        mut reader: FlowReader,
        config: Option<&FlowsConfig>,
        metrics: FlowMetrics,
        reopen: Arc<AtomicBool>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let path = config.and_then(|c| c.file.as_ref());
        let file = path.map(|path| FlowFile::open(path, reopen).map_err(|e| format!("flows.file: {path:?}: {e}")));
        let collector = config.and_then(|c| c.ipfix.as_ref()).map(|section| {
            let any: std::net::IpAddr = if section.collector.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0)).and_then(|s| s.connect(section.collector).map(|()| s));
            let socket = socket.map_err(|e| format!("flows.ipfix.collector: {}: {e}", section.collector))?;
            let mut config = IpfixConfig::default();
            config.observation_domain = section.observation_domain;
            IpfixExporter::new(socket, config).map_err(|e| format!("flows.ipfix: {e}"))
        });
        let mut everybody = Everybody { file: file.transpose()?, collector: collector.transpose()?, metrics };
        reader.report_every(config.and_then(|c| c.active).map(|period| period.0));
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let read = move || {
            loop {
                // Once more after the end was asked for, so that what is there is told.
                let last = stopping.load(Ordering::Acquire);
                if let Err(error) = read_once(&mut reader, &mut everybody, last) {
                    tracing::warn!(%error, "flows cannot be read");
                    std::thread::sleep(PAUSE);
                }
                if last {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("dcenetd-flows".into()).spawn(read)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn read_once(
    reader: &mut FlowReader,
    everybody: &mut Everybody,
    last: bool,
) -> Result<(), dcenet_policy::enforcer::EnforcerError> {
    if !last {
        reader.wait(PAUSE)?;
    }
    reader.drain(everybody).map(drop)
}

/// How long the thread waits before it looks whether it is to end.
const PAUSE: Duration = Duration::from_millis(250);

impl Drop for Flows {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reads flows panicked");
        }
    }
}
