//! `alloc`: the pool in memory, without I/O: an address is given with owner and sequence, then one of those in use, at
//! random, is taken back into its cooldown, and what rests too long is forgotten. At 0, 50 and 99.99 % of 65,536
//! addresses in use, in an IPv4 /16 and in IPv6 prefixes in which as many are in use. The sweep is also a picture:
//! `target/bench/alloc.svg`.
//!
//! The rows are of giving; what it takes with taking back is told beside. The clock's own cost is in it, and told.

use std::fmt::Write as _;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_ipam::pool::{AddressPool, Allocation, Ranges};
use ipnet::IpNet;

const ID: &str = "alloc";
const ADDRESSES: u64 = 1 << 16;
const SUBNETS: [&str; 5] = ["10.0.0.0/16", "fd00::/112", "fd00::/64", "fd00::/48", "fd00::/32"];
/// The addresses that are left free: all, half, 0.01 %.
const FREE: [(&str, u64); 3] = [("0 %", ADDRESSES), ("50 %", ADDRESSES / 2), ("99.99 %", 6)];
/// A millisecond passes with each operation: four of the last six free ones are at rest.
const COOLDOWN: Duration = Duration::from_millis(4);
const REMEMBERED: Duration = Duration::from_secs(1);

fn main() {
    let mut summary = Summary::default();
    let owners: Vec<String> = (0..1000).map(|n| format!("shop/web-{n}")).collect();
    let (runs, operations) = (rounds(9, 2), rounds(200_000, 10_000));
    // Of each round: median and 99.9th percentile, by subnet and fill.
    let mut medians = vec![vec![Vec::new(); FREE.len()]; SUBNETS.len()];
    let (mut tails, mut pairs) = (medians.clone(), medians.clone());
    let mut floors = Vec::new();
    for _ in 0..runs {
        floors.push(bare_bitmap(operations));
        for (subnet, text) in SUBNETS.iter().enumerate() {
            for (fill, (_, free)) in FREE.iter().enumerate() {
                let times = churn(text.parse().expect("a prefix"), *free, &owners, operations);
                let (give, both) = (Sample::new(times.give), Sample::new(times.both));
                medians[subnet][fill].push(give.median());
                tails[subnet][fill].push(give.quantile(0.999));
                pairs[subnet][fill].push(both.median());
            }
        }
    }
    let floor = Sample::new(floors).median();
    say(format_args!("{ID}: reading the clock twice takes {:.0} ns of each", clock_cost()));
    for (subnet, text) in SUBNETS.iter().enumerate() {
        for (fill, (name, _)) in FREE.iter().enumerate() {
            let (medians_of, tails_of) = (&medians[subnet][fill], &tails[subnet][fill]);
            let row = if subnet == 0 {
                let goal = vec![250.0; runs];
                Row::compare(ID, &format!("{text}, {name}"), 1.0, medians_of, ("250 ns", &goal))
            } else {
                Row::compare(ID, &format!("{text}, {name}"), 1.5, medians_of, ("the IPv4 /16", &medians[0][fill]))
            };
            summary.add(row.in_unit("ns").with_floor(floor));
            let goal = vec![2000.0; runs];
            let tail = Row::compare(ID, &format!("{text}, {name}, p99.9"), 1.0, tails_of, ("2 us", &goal));
            summary.add(tail.in_unit("ns"));
            let pair = Sample::new(pairs[subnet][fill].clone()).median();
            say(format_args!("{ID}: {text}, {name}: {pair:.0} ns with another taken back and an old one forgotten"));
        }
    }
    for text in &SUBNETS[2..] {
        let sample = Sample::new(scattered(text.parse().expect("a prefix"), &owners, operations));
        say(format_args!(
            "{ID}: {text}, 32,768 in use at random places: p50 {:.0} ns, p99.9 {:.0} ns",
            sample.median(),
            sample.quantile(0.999)
        ));
    }
    let path = plot(&medians);
    say(format_args!("{ID}: the sweep is drawn in {}", path.display()));
    summary.write();
}

/// Nanoseconds of each operation.
struct Times {
    give: Vec<f64>,
    /// Giving, taking back, forgetting.
    both: Vec<f64>,
}

/// Gives and takes back with so many free.
fn churn(subnet: IpNet, free: u64, owners: &[String], operations: usize) -> Times {
    let first = number(subnet);
    // Of a wide prefix no more is given than of the narrow ones.
    let mut pool = AddressPool::new(Ranges::new([(first, first + u128::from(ADDRESSES) - 1)]), COOLDOWN);
    let in_use = ADDRESSES - free;
    let mut held: Vec<_> = (0..in_use)
        .map(|n| pool.allocate_exact(first + u128::from(n), owner(owners, n), 0).expect("it is free"))
        .collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut times = Times { give: Vec::with_capacity(operations), both: Vec::with_capacity(operations) };
    for n in 0..operations as u64 {
        let (now, owner) = (n + 10, owner(owners, random.next()));
        // Whoever gives an address back has its sequence at hand.
        let place = (!held.is_empty()).then(|| random.next() as usize % held.len());
        let leaving = place.map(|place| held[place]);
        let begin = Instant::now();
        let given = pool.allocate(owner, now).expect("some are free");
        times.give.push(begin.elapsed().as_nanos() as f64);
        let Allocation { address, sequence } = leaving.unwrap_or(given);
        assert!(pool.free(address, sequence, now));
        pool.forget_released(REMEMBERED, now);
        times.both.push(begin.elapsed().as_nanos() as f64);
        if let Some(place) = place {
            held[place] = given;
        }
    }
    assert_eq!(pool.bound(), in_use);
    times
}

/// The same with addresses all over the prefix, where hardly two share a leaf.
fn scattered(subnet: IpNet, owners: &[String], operations: usize) -> Vec<f64> {
    let (first, host) = (number(subnet), (1_u128 << (128 - u32::from(subnet.prefix_len()))) - 1);
    let mut pool = AddressPool::new(subnet, COOLDOWN);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut place = || first + ((u128::from(random.next()) << 64 | u128::from(random.next())) & host);
    let mut held: Vec<_> = (0..ADDRESSES / 2)
        .map(|n| pool.allocate_exact(place(), owner(owners, n), 0).expect("hardly taken twice"))
        .collect();
    let mut times = Vec::with_capacity(operations);
    for n in 0..operations {
        let (from, now) = (place(), n as u64 + 10);
        let at = n.wrapping_mul(7919) % held.len();
        let begin = Instant::now();
        let given = pool.allocate_within(from, first + host, &owners[n % owners.len()], now).expect("it is wide");
        let given = std::mem::replace(&mut held[at], given);
        assert!(pool.free(given.address, given.sequence, now));
        pool.forget_released(REMEMBERED, now);
        times.push(begin.elapsed().as_nanos() as f64);
    }
    times
}

/// The least that knows which of 65,536 are free: a word for 64, searched from the last place. No owner, no sequence.
fn bare_bitmap(operations: usize) -> f64 {
    let mut words = vec![0_u64; ADDRESSES as usize / 64];
    let mut times = Vec::with_capacity(operations);
    let mut at = 0;
    for _ in 0..operations {
        let begin = Instant::now();
        while words[at] == u64::MAX {
            at = (at + 1) % words.len();
        }
        let bit = words[at].trailing_ones();
        words[at] |= 1 << bit;
        black_box(&mut words)[at] &= !(1 << bit);
        times.push(begin.elapsed().as_nanos() as f64);
    }
    Sample::new(times).median()
}

fn clock_cost() -> f64 {
    Sample::new((0..10_000).map(|_| Instant::now().elapsed().as_nanos() as f64).collect()).median()
}

fn number(subnet: IpNet) -> u128 {
    match subnet.network() {
        std::net::IpAddr::V4(ip) => u32::from(ip).into(),
        std::net::IpAddr::V6(ip) => ip.into(),
    }
}

fn owner(owners: &[String], n: u64) -> &str {
    &owners[n as usize % owners.len()]
}

/// xorshift64 (Marsaglia, 2003): the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Draws the medians of the medians: a group of bars for each fill, a bar for each subnet, the goal as a line.
fn plot(medians: &[Vec<Vec<f64>>]) -> PathBuf {
    const COLOURS: [&str; 5] = ["#222222", "#1b6ca8", "#2a9d8f", "#e9a03b", "#c8553d"];
    let at = |subnet: usize, fill: usize| Sample::new(medians[subnet][fill].clone()).median();
    let all = (0..SUBNETS.len()).flat_map(|s| (0..FREE.len()).map(move |f| (s, f)));
    let top = all.map(|(s, f)| at(s, f)).fold(300.0, f64::max) * 1.1;
    let y = |ns: f64| 340.0 - ns / top * 300.0;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 420\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"640\" height=\"420\" fill=\"white\"/>\n\
         <text x=\"60\" y=\"22\" font-size=\"14\">One address given, median in ns</text>\n",
    );
    let mut line = |text: std::fmt::Arguments<'_>| svg.write_fmt(text).expect("text can be written to a string");
    for ns in (0..).map(|n| f64::from(n) * 100.0).take_while(|ns| *ns < top) {
        line(format_args!(
            "<path d=\"M60 {0:.1}H620\" stroke=\"#dddddd\"/><text x=\"52\" y=\"{1:.1}\" text-anchor=\"end\">{ns}</text>\n",
            y(ns),
            y(ns) + 4.0
        ));
    }
    for (fill, (name, _)) in FREE.iter().enumerate() {
        let left = 80.0 + fill as f64 * 180.0;
        for (subnet, colour) in COLOURS.iter().enumerate() {
            let (ns, x) = (at(subnet, fill), left + subnet as f64 * 28.0);
            line(format_args!(
                "<rect x=\"{x}\" y=\"{0:.1}\" width=\"24\" height=\"{1:.1}\" fill=\"{colour}\"/>\
                 <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"middle\" font-size=\"10\">{ns:.0}</text>\n",
                y(ns),
                340.0 - y(ns),
                x + 12.0,
                y(ns) - 3.0
            ));
        }
        line(format_args!("<text x=\"{}\" y=\"358\" text-anchor=\"middle\">{name} in use</text>\n", left + 68.0));
    }
    line(format_args!("<path d=\"M60 {0:.1}H620\" stroke=\"#c00000\" stroke-dasharray=\"6 4\"/>\n", y(250.0)));
    for (subnet, (text, colour)) in SUBNETS.iter().zip(COLOURS).enumerate() {
        let x = 60 + subnet * 115;
        line(format_args!(
            "<rect x=\"{x}\" y=\"382\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"392\">{text}</text>\n",
            x + 18
        ));
    }
    line(format_args!("</svg>\n"));
    let path = dcenet_benches::target().join("bench/alloc.svg");
    std::fs::create_dir_all(path.parent().expect("the path has two parts")).expect("create target/bench");
    std::fs::write(&path, svg).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path
}
