use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use dcenet_core::test_support::{Rung, require};

use super::super::conformance::{Shown, conforms, flows};
use super::*;

/// A collector of its own: it knows only what RFC 7011 says, and the templates that it was sent.
#[derive(Default)]
struct Collector {
    templates: BTreeMap<u16, (bool, Vec<Field>)>,
    announced: usize,
    records: u32,
    flows: Vec<Record>,
    not_sent: u64,
    sizes: Vec<usize>,
}

/// Number, length and enterprise.
type Field = (u16, u16, u32);

/// Values by number and enterprise.
type Record = BTreeMap<(u16, u32), Vec<u8>>;

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn next(bytes: &mut &[u8], count: usize) -> u64 {
    number(take(bytes, count))
}

impl Collector {
    fn message(&mut self, mut bytes: &[u8]) {
        self.sizes.push(bytes.len());
        let length = bytes.len();
        assert_eq!((next(&mut bytes, 2), next(&mut bytes, 2)), (10, length as u64));
        let age = i64::try_from(next(&mut bytes, 4)).unwrap() - milliseconds(SystemTime::now()) as i64 / 1000;
        assert!((-60..=1).contains(&age), "{age}");
        assert_eq!(next(&mut bytes, 4), u64::from(self.records), "records before this message");
        assert_eq!(next(&mut bytes, 4), 77);
        while !bytes.is_empty() {
            let (set, length) = (next(&mut bytes, 2) as u16, next(&mut bytes, 2) as usize);
            let mut content = take(&mut bytes, length - 4);
            assert!(!content.is_empty());
            while !content.is_empty() {
                match set {
                    2 | 3 => self.template(set == 3, &mut content),
                    256.. => self.record(set, &mut content),
                    _ => panic!("set {set}"),
                }
            }
        }
    }

    fn template(&mut self, options: bool, content: &mut &[u8]) {
        let (id, count) = (next(content, 2) as u16, next(content, 2));
        assert!(!options || next(content, 2) == 1, "one field of scope");
        let fields = (0..count).map(|_| {
            let (number, length) = (next(content, 2) as u16, next(content, 2) as u16);
            let enterprise = if number & 0x8000 != 0 { next(content, 4) as u32 } else { 0 };
            (number & 0x7fff, length, enterprise)
        });
        let template = (options, fields.collect());
        if let Some(before) = self.templates.insert(id, template.clone()) {
            assert_eq!(before, template, "a template may not change under its number");
        }
        self.announced += 1;
    }

    fn record(&mut self, set: u16, content: &mut &[u8]) {
        let (options, fields) = self.templates.get(&set).expect("the template comes first");
        let mut record = Record::new();
        for (number, length, enterprise) in fields {
            let length = match *length {
                u16::MAX => match next(content, 1) {
                    255 => next(content, 2) as usize,
                    short => short as usize,
                },
                fixed => fixed.into(),
            };
            record.insert((*number, *enterprise), take(content, length).to_vec());
        }
        self.records += 1;
        if *options {
            assert_eq!(number(&record[&(144, 0)]), u64::from(std::process::id()));
            self.not_sent = number(&record[&(166, 0)]);
        } else {
            self.flows.push(record);
        }
    }

    /// Takes what has come by now; over the loopback interface that is all that was sent.
    fn listen(&mut self, socket: &UdpSocket) {
        let mut buffer = [0; 65_536];
        while let Ok(length) = socket.recv(&mut buffer) {
            self.message(&buffer[..length]);
        }
    }
}

fn bound() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

fn pair(config: IpfixConfig) -> (IpfixExporter, UdpSocket) {
    let (listening, port) = bound();
    listening.set_nonblocking(true).unwrap();
    (exporter(bound().0, port, config), listening)
}

/// An exporter to a port where nobody listens yet. Its own socket comes first, lest it get that port.
fn early(config: IpfixConfig) -> (IpfixExporter, u16) {
    let socket = bound().0;
    let port = bound().1;
    (exporter(socket, port, config), port)
}

fn exporter(socket: UdpSocket, port: u16, config: IpfixConfig) -> IpfixExporter {
    socket.connect(("127.0.0.1", port)).unwrap();
    IpfixExporter::new(socket, IpfixConfig { observation_domain: 77, ..config }).unwrap()
}

#[test]
fn the_exporter_conforms() {
    for most_bytes in [464, 1400] {
        for templates_every in [Duration::ZERO, Duration::from_secs(3600)] {
            let (exporter, listening) = pair(IpfixConfig { most_bytes, templates_every, ..IpfixConfig::default() });
            let collector = RefCell::new(Collector::default());
            conforms(exporter, |_| {
                let mut collector = collector.borrow_mut();
                collector.listen(&listening);
                Shown { flows: collector.flows.len() as u64, losses: collector.not_sent }
            });
            let Collector { announced, sizes, .. } = collector.into_inner();
            // Each flow and loss brings them anew, or the first alone.
            let expected = if templates_every.is_zero() { announced > 400 } else { announced == 7 };
            assert!(expected, "{announced}");
            // Messages are filled, and never beyond the limit, even by names of the greatest length.
            let longest = sizes.iter().max().copied().unwrap();
            assert!((usize::from(most_bytes) - 150..=most_bytes.into()).contains(&longest), "{sizes:?}");
        }
    }
}

#[test]
fn records_say_what_flows_do() {
    let (mut exporter, listening) = pair(IpfixConfig::default());
    let mut collector = Collector::default();
    let flows = flows();
    flows.iter().for_each(|flow| exporter.flow(flow).unwrap());
    exporter.flush().unwrap();
    collector.listen(&listening);
    assert_eq!(collector.flows.len(), flows.len());
    for (flow, record) in flows.iter().zip(&collector.flows) {
        let value = |element| record.get(&(element, 0)).map(|bytes| number(bytes));
        let (pod_first, device) =
            (flow.direction == Direction::Egress, flow.interface.map_or(0, |i| u64::from(i.get())));
        let (source, destination) = if pod_first { (&flow.pod, &flow.peer) } else { (&flow.peer, &flow.pod) };
        assert_eq!((value(7), value(11)), (Some(source.port.into()), Some(destination.port.into())));
        for (end, elements) in [(source, [8, 27]), (destination, [12, 28])] {
            let expected = match end.address {
                Some(IpAddr::V4(a)) => [Some(a.octets().to_vec()), None],
                Some(IpAddr::V6(a)) => [None, Some(a.octets().to_vec())],
                None => [None, None],
            };
            assert_eq!(elements.map(|e| record.get(&(e, 0)).cloned()), expected);
        }
        assert_eq!(value(4), Some(flow.protocol.0.into()));
        assert_eq!(value(6), Some(flow.tcp_flags.unwrap_or(0).into()));
        let icmp = flow.icmp.map_or(0, |(t, c)| u64::from(t) << 8 | u64::from(c));
        assert_eq!(value(32).or(value(139)), flow.pod.address.map(|_| icmp));
        let devices = if pod_first { (device, 0) } else { (0, device) };
        assert_eq!((value(10), value(14)), (Some(devices.0), Some(devices.1)));
        let (there, back) = if pod_first {
            ((flow.egress_packets, flow.egress_bytes), (flow.ingress_packets, flow.ingress_bytes))
        } else {
            ((flow.ingress_packets, flow.ingress_bytes), (flow.egress_packets, flow.egress_bytes))
        };
        let octets = |(packets, bytes): (u64, u64)| if bytes == u64::MAX { 0 } else { bytes - 14 * packets };
        let reversed = |element| record.get(&(element, 29_305)).map(|bytes| number(bytes));
        let counts = [value(86), value(85), reversed(86), reversed(85)];
        // Of records about one packet, collectors would add them up.
        let expected = [there.0, octets(there), back.0, octets(back)];
        assert_eq!(counts, expected.map(|count| counted(flow).then_some(count)));
        let name = flow.pod.workload.as_ref().map_or_else(String::new, ToString::to_string);
        assert_eq!(record[&(350, 0)], name.as_bytes());
        let (event, reason, initiator) = match flow.kind {
            FlowKind::New => (1, None, 1),
            FlowKind::Closed => (2, Some(3), 0),
            FlowKind::Ended => (2, Some(1), 1),
            FlowKind::Denied => (3, None, 1),
            FlowKind::Active => (5, Some(2), 1),
            FlowKind::Sampled => (5, None, 0),
        };
        assert_eq!((value(233), value(136), value(239)), (Some(event), reason, Some(initiator)));
        let status = match flow.reason {
            "allowed" => 64,
            "denied" => 129,
            _ => 128,
        };
        assert_eq!(value(89), Some(status));
        assert_eq!(value(152).is_some(), reason.is_none());
    }
    // The clock of flows is that of the machine, the one of records that of the day.
    let now = milliseconds(SystemTime::now());
    let up = clock_gettime(ClockId::Monotonic);
    let expected = now - (up.tv_sec as u64 * 1000 + up.tv_nsec as u64 / 1_000_000) + 5000;
    let told = number(&collector.flows[0][&(153, 0)]);
    assert!(told.abs_diff(expected) < 10_000, "{told} and {expected}");
}

fn counted(flow: &Flow) -> bool {
    matches!(flow.kind, FlowKind::Closed | FlowKind::Active | FlowKind::Ended)
}

#[test]
fn who_opened_a_flow_that_is_revoked_is_not_known() {
    let (mut exporter, listening) = pair(IpfixConfig::default());
    let denied = flows().into_iter().find(|f| f.reason == "denied").unwrap();
    let revoked = Flow { reason: "revoked", ..denied.clone() };
    [denied, revoked].iter().for_each(|flow| exporter.flow(flow).unwrap());
    exporter.flush().unwrap();
    let mut collector = Collector::default();
    collector.listen(&listening);
    let seen: Vec<_> = collector.flows.iter().map(|r| [89, 239].map(|element| number(&r[&(element, 0)]))).collect();
    assert_eq!(seen, [[129, 1], [129, 0]]);
}

#[test]
fn a_record_is_laid_out_byte_by_byte() {
    let closed = flows().into_iter().find(|f| f.kind == FlowKind::Closed).unwrap();
    let (set, record) = encode(&closed, UNIX_EPOCH + Duration::from_millis(1));
    let hex: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = [
        "0000000000001389",                 // flowEndMilliseconds: 5,001
        "03",                               // flowEndReason: detected
        "0a0000010a000002",                 // addresses
        "9c4001bb06",                       // ports, protocol
        "0000",                             // ICMP
        "0012",                             // TCP: SYN, ACK
        "0000000700000000",                 // interfaces
        "024000",                           // deleted, forwarded, either side
        "00000000000000030000000000000102", // 3 packets, 258 octets
        "000000000000000200000000000007b4", // 2 and 1,972
        "0873686f702f776562",               // "shop/web"
    ];
    assert_eq!((set, hex), (259, expected.concat()));
}

#[test]
fn what_a_collector_that_is_away_misses_is_counted_and_told() {
    let (mut exporter, port) = early(IpfixConfig { templates_every: Duration::ZERO, ..IpfixConfig::default() });
    let flow = &flows()[0];
    let deadline = Instant::now() + Duration::from_secs(20);
    // The refusal of one message is told to the next.
    while exporter.unsent() < 3 {
        exporter.flow(flow).unwrap();
        exporter.flush().unwrap();
        assert!(Instant::now() < deadline);
    }
    let listening = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    listening.set_nonblocking(true).unwrap();
    // A refusal may still wait.
    for _ in 0..3 {
        exporter.flow(flow).unwrap();
        exporter.flush().unwrap();
    }
    let unsent = exporter.unsent();
    exporter.lost(Losses { full: 5, ..Losses::default() }).unwrap();
    exporter.flush().unwrap();
    // Messages that were lost on the way were sent: the sequence goes on over them.
    let mut collector = Collector { records: u32::MAX, ..Collector::default() };
    let mut buffer = [0; 2048];
    while let Ok(length) = listening.recv(&mut buffer) {
        if collector.records == u32::MAX {
            collector.records = number(&buffer[8..12]) as u32;
        }
        collector.message(&buffer[..length]);
    }
    assert_eq!(collector.not_sent, unsent + 5);
    assert!(!collector.flows.is_empty());
}

#[test]
fn an_exporter_that_cannot_work_is_refused() {
    let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = IpfixExporter::new(socket(), IpfixConfig::default()).unwrap_err();
    assert!(matches!(error, IpfixError::NotConnected(_)) && error.to_string().contains("4739"), "{error}");
    for most_bytes in [100, 65_508] {
        let connected = socket();
        connected.connect("127.0.0.1:9").unwrap();
        let config = IpfixConfig { most_bytes, ..IpfixConfig::default() };
        let error = IpfixExporter::new(connected, config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("most_bytes is {most_bytes}: want 1")), "{error}");
        assert!(error.contains(" to 65507,"), "{error}");
    }
}

#[test]
fn an_exporter_does_not_wait_for_room() {
    let (listening, port) = bound();
    let socket = bound().0;
    let descriptor = socket.as_raw_fd();
    let _exporter = exporter(socket, port, IpfixConfig::default());
    let non_blocking = |descriptor| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        u32::from_str_radix(flags.trim(), 8).unwrap() & 0o4000 != 0
    };
    assert!(non_blocking(descriptor) && !non_blocking(listening.as_raw_fd()));
}

#[test]
fn a_collector_that_comes_up_later_gets_templates_at_once() {
    let (mut exporter, port) =
        early(IpfixConfig { templates_every: Duration::from_secs(3600), ..IpfixConfig::default() });
    let flow = &flows()[0];
    let mut send = |count: usize| {
        (0..count).for_each(|_| {
            exporter.flow(flow).unwrap();
            exporter.flush().unwrap();
        });
        exporter.unsent()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while send(1) < 3 {
        assert!(Instant::now() < deadline, "no refusal was told");
    }
    let listening = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    listening.set_nonblocking(true).unwrap();
    let refused = send(3);
    let mut buffer = [0; 2048];
    let length = listening.recv(&mut buffer).unwrap();
    let mut collector = Collector { records: number(&buffer[8..12]) as u32, ..Collector::default() };
    collector.message(&buffer[..length]);
    collector.listen(&listening);
    // A message that finds the refusal of the one before is sent for all that.
    assert_eq!((collector.flows.len(), send(1)), (3, refused));
}

/// nfcapd of nfdump, which knows nothing of this crate; its port, and what it says.
struct Nfcapd(Child, u16, tempfile::NamedTempFile);

impl Nfcapd {
    fn start(directory: &Path, port: u16) -> Self {
        let mut command = Command::new("nfcapd");
        command.args(["-b", "127.0.0.1", "-p", &port.to_string(), "-w"]).arg(directory);
        let says = tempfile::NamedTempFile::new().unwrap();
        let stderr = Stdio::from(says.reopen().unwrap());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let own = Self(child, port, says);
        // Its socket is there, and nothing waits in it.
        own.until(|queue| queue.is_some());
        own
    }

    /// Waits for what its socket holds: none while there is no socket.
    fn until(&self, right: impl Fn(Option<u64>) -> bool) {
        let entry = format!("0100007F:{:04X}", self.1);
        let held = || {
            let sockets = std::fs::read_to_string("/proc/net/udp").unwrap();
            let line = sockets.lines().find(|line| line.split_whitespace().nth(1) == Some(&entry))?.to_owned();
            let (_, received) = line.split_whitespace().nth(4)?.split_once(':')?;
            u64::from_str_radix(received, 16).ok()
        };
        let begun = Instant::now();
        while !right(held()) {
            self.pause(begun);
        }
    }

    /// Waits a little, but not for ever.
    fn pause(&self, begun: Instant) {
        let says = || std::fs::read_to_string(self.2.path()).unwrap_or_else(|error| error.to_string());
        assert!(begun.elapsed() < Duration::from_secs(20), "nfcapd stands still: {}", says());
        std::thread::sleep(Duration::from_millis(10));
    }

    /// Ends it when it has read all, upon which it writes its file.
    fn stop(mut self) {
        self.until(|queue| queue == Some(0));
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begun = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            self.pause(begun);
        }
    }
}

impl Drop for Nfcapd {
    fn drop(&mut self) {
        // It is gone already where the test has stopped it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_collector_of_others_reads_what_is_exported() {
    if !require(Rung::Services) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (mut exporter, port) = early(IpfixConfig::default());
    let collector = Nfcapd::start(directory.path(), port);
    let flows = flows();
    let exported: Vec<_> = flows.iter().filter(|f| f.pod.address.is_some() && f.egress_bytes != u64::MAX).collect();
    exported.iter().for_each(|flow| exporter.flow(flow).unwrap());
    exporter.lost(Losses { full: 3, ..Losses::default() }).unwrap();
    exporter.flush().unwrap();
    assert_eq!(exporter.unsent(), 0);
    collector.stop();
    let read = Command::new("nfdump").arg("-R").arg(directory.path()).args(["-q", "-o", "json"]).output().unwrap();
    let text = String::from_utf8(read.stdout).unwrap();
    let objects = text.trim().trim_start_matches('[').trim_end_matches(']').trim().trim_end_matches(',');
    let read: Vec<serde_json::Value> = serde_json::from_str(&format!("[{objects}]")).unwrap();
    let mut read: Vec<String> = read
        .iter()
        .map(|line| {
            let address = |side: &str| {
                let of = |version| line.get(format!("{side}{version}_addr")).and_then(|a| a.as_str());
                of(4).or(of(6)).unwrap().parse::<IpAddr>().unwrap()
            };
            let count = |name: &str| line.get(name).map_or(0, |n| n.as_u64().unwrap());
            let ports =
                if line["proto"] == 6 || line["proto"] == 17 { (count("src_port"), count("dst_port")) } else { (0, 0) };
            let there = (count("in_packets"), count("in_bytes"));
            let back = (count("out_packets"), count("out_bytes"));
            format!("{} {} {ports:?} {} {there:?} {back:?}", address("src"), address("dst"), line["proto"])
        })
        .collect();
    let mut expected: Vec<String> = exported
        .iter()
        .map(|flow| {
            let octets = |packets, bytes| if counted(flow) { (packets, bytes - 14 * packets) } else { (0, 0) };
            let egress = octets(flow.egress_packets, flow.egress_bytes);
            let ingress = octets(flow.ingress_packets, flow.ingress_bytes);
            let (source, destination, there, back) = match flow.direction {
                Direction::Egress => (&flow.pod, &flow.peer, egress, ingress),
                Direction::Ingress => (&flow.peer, &flow.pod, ingress, egress),
            };
            let has_ports = matches!(flow.protocol.0, 6 | 17);
            let ports = if has_ports { (source.port, destination.port) } else { (0, 0) };
            let (from, to) = (source.address.unwrap(), destination.address.unwrap());
            format!("{from} {to} {ports:?} {} {there:?} {back:?}", flow.protocol.0)
        })
        .collect();
    read.sort_unstable();
    expected.sort_unstable();
    assert_eq!(read, expected);
}
