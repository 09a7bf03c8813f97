//! Who is told of flows: a file, a collector, and the counters for Prometheus. What one of them cannot take is missing there
//! and nowhere else, and is tried again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_policy::enforcer::flows::ipfix::{IpfixConfig, IpfixExporter};
use dcenet_policy::enforcer::flows::prometheus::FlowMetrics;
use dcenet_policy::enforcer::flows::{Flow, FlowReader, FlowSink, JsonLines, Losses, Tee, TeeError};
use dcenet_policy::enforcer::{Enforcer, EnforcerError};
use rustix::fs::OFlags;

use crate::config::{FlowsConfig, IpfixSection};
use crate::threads::Threads;

/// How long the thread waits before it looks whether it is to end, or the file to be opened anew.
const PAUSE: Duration = Duration::from_millis(250);
/// How long what could not be opened is left alone.
const RETRY: Duration = Duration::from_secs(1);
/// How often it is told that something goes on failing.
const REMIND: Duration = Duration::from_secs(60);
/// How many bytes of lines are written at once.
const BUFFER: usize = 64 << 10;

/// Something that cannot always be opened.
#[derive(Debug)]
struct Retried<T> {
    open: Option<T>,
    /// When it was refused last, and why.
    refused: Option<(Instant, String)>,
}

impl<T> Retried<T> {
    const fn new() -> Self {
        Self { open: None, refused: None }
    }

    /// # Errors
    /// Why it cannot be opened, or could not a moment ago.
    fn get(&mut self, open: impl FnOnce() -> io::Result<T>) -> io::Result<&mut T> {
        let open = match self.open.take() {
            Some(open) => open,
            None => match &self.refused {
                Some((at, why)) if at.elapsed() < RETRY => return Err(io::Error::other(why.clone())),
                _ => open().inspect_err(|error| self.refused = Some((Instant::now(), error.to_string())))?,
            },
        };
        Ok(self.open.insert(open))
    }

    /// What was open is not to be used any more.
    fn refuse(&mut self, error: &io::Error) {
        *self = Self { open: None, refused: Some((Instant::now(), error.to_string())) };
    }
}

/// A file of JSON lines that can be rotated, and may be on a disk that is full. Its lines are whole, and those that it does
/// not have are counted in a later one.
#[derive(Debug)]
struct FlowFile {
    path: PathBuf,
    /// That it is to be opened anew.
    reopen: Arc<AtomicBool>,
    file: Retried<File>,
    /// Lines that are not written yet.
    lines: Vec<u8>,
    /// Where each of these ends, and what is lost with it.
    ends: Vec<(usize, Losses)>,
    /// What was lost, and is in no line yet.
    owed: Losses,
}

impl FlowFile {
    fn new(path: PathBuf, reopen: Arc<AtomicBool>) -> Self {
        let (lines, ends, owed) = Default::default();
        Self { path, reopen, file: Retried::new(), lines, ends, owed }
    }

    /// Opens it where that is due, and begins with what is owed.
    fn prepare(&mut self) -> io::Result<()> {
        if self.reopen.swap(false, Ordering::AcqRel) {
            // Whoever rotates wants the lines of before in the file of before; what that does not take is owed to the next.
            if self.file.open.is_some() {
                let _ = self.write();
            }
            self.file = Retried::new();
        }
        if self.file.open.is_none() {
            let mut unfinished = false;
            self.file.get(|| {
                let file = append_to(&self.path)?;
                unfinished = ends_within_a_line(&self.path, &file)?;
                Ok(file)
            })?;
            // Who died in the middle of a line left it without an end.
            if unfinished {
                self.lines.push(b'\n');
            }
        }
        if self.owed != Losses::default() {
            let owed = self.owed;
            self.append(owed, |lines| lines.lost(owed))?;
            self.owed = Losses::default();
        }
        Ok(())
    }

    /// Puts a line to the others, which make room first.
    fn append(
        &mut self,
        loss: Losses,
        line: impl FnOnce(&mut JsonLines<&mut Vec<u8>>) -> io::Result<()>,
    ) -> io::Result<()> {
        let before = self.lines.len();
        let appended = line(&mut JsonLines(&mut self.lines));
        match appended {
            Ok(()) => self.ends.push((self.lines.len(), loss)),
            Err(_) => self.lines.truncate(before),
        }
        appended
    }

    /// Writes all lines, or as many as there is room for.
    fn write(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file.open else { return Ok(()) };
        let (mut written, mut outcome) = (0, Ok(()));
        while outcome.is_ok() && written < self.lines.len() {
            match file.write(&self.lines[written..]) {
                Ok(0) => outcome = Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => outcome = Err(error),
            }
        }
        if let Err(error) = &outcome {
            let whole = self.ends.iter().map(|(end, _)| *end).filter(|end| *end <= written).max().unwrap_or_default();
            if let Err(error) = cut(file, written - whole) {
                // Then the next line begins with the end of this one.
                tracing::debug!(path = %self.path.display(), %error, "part of a line stays");
            }
            for (_, loss) in self.ends.iter().filter(|(end, _)| *end > written) {
                self.owed += *loss;
            }
            self.file.refuse(error);
        }
        self.lines.clear();
        self.ends.clear();
        outcome
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    // Of no meaning for files; of a pipe that nobody reads it makes an error.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(flags).open(path)
}

fn ends_within_a_line(path: &Path, file: &File) -> io::Result<bool> {
    let found = file.metadata()?;
    if !found.is_file() || found.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    File::open(path)?.read_exact_at(&mut last, found.len() - 1)?;
    Ok(last != *b"\n")
}

/// Takes the last bytes of a file away again.
fn cut(file: &File, bytes: usize) -> io::Result<()> {
    let found = file.metadata()?;
    match found.len().checked_sub(bytes as u64) {
        Some(length) if bytes > 0 && found.is_file() => file.set_len(length),
        _ => Ok(()),
    }
}

impl FlowSink for FlowFile {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.prepare()?;
        if self.lines.len() >= BUFFER {
            self.write()?;
        }
        let mut loss = Losses::default();
        loss.undelivered = 1;
        self.append(loss, |lines| lines.flow(flow))
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.prepare()?;
        self.append(losses, |lines| lines.lost(losses))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.prepare()?;
        self.write()
    }
}

/// An exporter whose collector no way may lead to for now.
#[derive(Debug)]
struct Collector {
    section: IpfixSection,
    exporter: Retried<IpfixExporter>,
}

impl Collector {
    fn exporter(&mut self) -> io::Result<&mut IpfixExporter> {
        let section = &self.section;
        self.exporter.get(|| {
            let any: IpAddr = if section.collector.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(section.collector)?;
            let mut config = IpfixConfig::default();
            config.observation_domain = section.observation_domain;
            IpfixExporter::new(socket, config).map_err(io::Error::other)
        })
    }
}

impl FlowSink for Collector {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.exporter()?.flow(flow)
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.exporter()?.lost(losses)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.exporter()?.flush()
    }
}

/// Hands flows to all of them, and tells of those that fail when they begin to, from time to time, and when they are
/// through with it. Itself it does not fail.
#[derive(Debug)]
struct Everybody {
    tee: Tee<'static>,
    /// Since when it was not told of those that fail.
    failing: BTreeMap<String, Instant>,
}

impl FlowSink for Everybody {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.tee.flow(flow)
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.tee.lost(losses)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Who works again hears of what he missed now, and not only when there is something more.
        self.tee.lost(Losses::default())?;
        let flushed = self.tee.flush();
        let failed = match &flushed {
            Ok(()) => &[],
            Err(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<TeeError>()) {
                Some(told) => told.failed(),
                None => return flushed,
            },
        };
        for (sink, error) in failed {
            if self.failing.get(sink).is_none_or(|at| at.elapsed() >= REMIND) {
                tracing::warn!(sink, %error, "flows are not delivered; it is tried again");
                self.failing.insert(sink.clone(), Instant::now());
            }
        }
        self.failing.retain(|sink, _| {
            let fails = failed.iter().any(|(name, _)| name == sink);
            if !fails {
                tracing::info!(sink, "flows are delivered again");
            }
            fails
        });
        Ok(())
    }
}

/// A thread that reads flows until it is dropped.
#[derive(Debug)]
pub struct Flows {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flows {
    /// Begins to read. The file is opened anew when `reopen` becomes true. Where it, the ring of events or a way to the
    /// collector is not there, that is told and tried again.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn start(
        enforcer: Arc<Enforcer>,
        config: Option<&FlowsConfig>,
        metrics: FlowMetrics,
        reopen: Arc<AtomicBool>,
        threads: &Threads,
    ) -> io::Result<Self> {
        let mut tee = Tee::new();
        if let Some(path) = config.and_then(|c| c.file.clone()) {
            tee = tee.with(format!("flows.file {}", path.display()), FlowFile::new(path, reopen));
        }
        if let Some(section) = config.and_then(|c| c.ipfix.clone()) {
            let name = format!("flows.ipfix.collector {}", section.collector);
            tee = tee.with(name, Collector { section, exporter: Retried::new() });
        }
        let mut everybody = Everybody { tee: tee.with("metrics", metrics), failing: BTreeMap::new() };
        let active = config.and_then(|c| c.active).map(|period| period.0);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let read = move || {
            let (mut reader, mut told) = (Retried::new(), None::<Instant>);
            loop {
                // Once more after the end was asked for, so that what is there is told.
                let last = stopping.load(Ordering::Acquire);
                match read_once(&enforcer, &mut reader, active, &mut everybody, last) {
                    Ok(()) => told = None,
                    Err(error) => {
                        if told.is_none_or(|at| at.elapsed() >= REMIND) {
                            tracing::warn!(%error, "flows cannot be read; it is tried again");
                            told = Some(Instant::now());
                        }
                        std::thread::sleep(PAUSE);
                    }
                }
                if last {
                    return;
                }
            }
        };
        Ok(Self { stop, thread: Some(threads.spawn("dcenetd-flows", read)?) })
    }
}

fn read_once(
    enforcer: &Enforcer,
    reader: &mut Retried<FlowReader>,
    active: Option<Duration>,
    everybody: &mut Everybody,
    last: bool,
) -> io::Result<()> {
    let failed = |error: EnforcerError| io::Error::other(error);
    let reader = reader.get(|| {
        let reader = enforcer.flows().map_err(failed)?;
        reader.report_every(active);
        Ok(reader)
    })?;
    if !last {
        reader.wait(PAUSE).map_err(failed)?;
    }
    reader.drain(everybody).map(drop).map_err(failed)
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reads flows panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use dcenet_core::test_support::{Rung, require};
    use dcenet_policy::enforcer::flows::conformance::{Shown, conforms, flows};
    use serde_json::Value;

    use super::*;

    fn file(path: &Path) -> FlowFile {
        FlowFile::new(path.to_owned(), Arc::default())
    }

    /// By what users read: lines, each of which must be whole.
    fn shown(path: &Path) -> Shown {
        let mut shown = Shown::default();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'), "the last line is whole");
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            match line.get("lost") {
                Some(lost) => {
                    shown.losses += lost.as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>()
                }
                None => shown.flows += 1,
            }
        }
        shown
    }

    #[test]
    fn a_file_of_flows_conforms() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.json");
        conforms(file(&path), |_| shown(&path));
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_tried_again_and_says_what_it_lacks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("later/flows.json");
        let (flow, mut everybody) = (&flows()[0], Everybody { tee: Tee::new(), failing: BTreeMap::new() });
        everybody.tee = everybody.tee.with("file", file(&path));
        for _ in 0..3 {
            everybody.flow(flow).unwrap();
        }
        everybody.flush().unwrap();
        assert_eq!(everybody.failing.keys().collect::<Vec<_>>(), ["file"]);
        fs::create_dir(path.parent().unwrap()).unwrap();
        std::thread::sleep(RETRY);
        everybody.flush().unwrap();
        assert_eq!(shown(&path), Shown { flows: 0, losses: 3 }, "without another flow");
        everybody.flow(flow).unwrap();
        everybody.flush().unwrap();
        assert_eq!(shown(&path), Shown { flows: 1, losses: 3 });
        assert!(everybody.failing.is_empty());
    }

    #[test]
    fn a_line_that_somebody_left_unfinished_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.json");
        fs::write(&path, "{\"kind\":\"ne").unwrap();
        let mut lines = file(&path);
        lines.flow(&flows()[0]).unwrap();
        lines.flush().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let (unfinished, ours) = text.split_once('\n').unwrap();
        assert_eq!(unfinished, "{\"kind\":\"ne");
        serde_json::from_str::<Value>(ours).unwrap();
    }

    #[test]
    fn rotation_puts_each_line_into_one_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let (path, rotated) = (directory.path().join("flows.json"), directory.path().join("flows.json.1"));
        let (flow, mut lines) = (&flows()[0], file(&path));
        lines.flow(flow).unwrap();
        lines.flush().unwrap();
        lines.flow(flow).unwrap();
        fs::rename(&path, &rotated).unwrap();
        lines.reopen.store(true, Ordering::Release);
        // Without another flow.
        lines.flush().unwrap();
        lines.flow(flow).unwrap();
        lines.flush().unwrap();
        assert_eq!((shown(&rotated).flows, shown(&path).flows), (2, 1));
    }

    /// A file system of two pages.
    struct Small(tempfile::TempDir);

    impl Small {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let mount =
                Command::new("mount").args(["-t", "tmpfs", "-o", "size=8k", "none"]).arg(directory.path()).status();
            assert!(mount.unwrap().success());
            Self(directory)
        }
    }

    impl Drop for Small {
        fn drop(&mut self) {
            let unmounted = Command::new("umount").arg(self.0.path()).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                eprintln!("{} stays mounted", self.0.path().display());
            }
        }
    }

    #[test]
    fn on_a_full_disk_lines_stay_whole_and_all_others_are_counted() {
        if !require(Rung::Netns) {
            return;
        }
        let (small, flow) = (Small::new(), &flows()[0]);
        let path = small.0.path().join("flows.json");
        let mut everybody = Everybody { tee: Tee::new().with("file", file(&path)), failing: BTreeMap::new() };
        let mut told = 0;
        let mut tell = |everybody: &mut Everybody, drains: u64| {
            for _ in 0..drains {
                for _ in 0..7 {
                    everybody.flow(flow).unwrap();
                }
                everybody.flush().unwrap();
            }
            told += 7 * drains;
            told
        };
        // Over several retries, each of which finds no room.
        for _ in 0..3 {
            tell(&mut everybody, 20);
            std::thread::sleep(RETRY);
        }
        let full = shown(&path);
        assert!(full.flows > 1 && full.flows < 420, "{full:?}");
        assert!(!everybody.failing.is_empty());

        let rotated = small.0.path().join("flows.json.1");
        fs::rename(&path, &rotated).unwrap();
        // As logrotate does it with `compress`: what was there is elsewhere.
        fs::write(&rotated, "").unwrap();
        std::thread::sleep(RETRY);
        let told = tell(&mut everybody, 1);
        everybody.flush().unwrap();
        let after = shown(&path);
        assert!(everybody.failing.is_empty() && after.flows > 0, "{after:?}");
        assert_eq!(full.flows + full.losses + after.flows + after.losses, told);
    }

    /// What the sink of the crate does there: were lines whole by themselves, the test above would show nothing.
    #[test]
    fn on_a_full_disk_a_plain_writer_leaves_half_a_line() {
        if !require(Rung::Netns) {
            return;
        }
        let small = Small::new();
        let path = small.0.path().join("flows.json");
        let mut plain = JsonLines(io::BufWriter::new(append_to(&path).unwrap()));
        let failed = (0..1000).find_map(|_| plain.flow(&flows()[0]).err());
        assert_eq!(failed.expect("the disk is full").kind(), io::ErrorKind::StorageFull);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() > 1 && !text.ends_with('\n'));
    }
}
