//! Addresses from a DHCPv4 server (RFC 2131).
//!
//! The binder speaks on a device of the host that leads to the server's link, a bridge or the parent of macvlan
//! devices, in the pod's name: an address is leased before the pod has a device. Every message asks for broadcast answers
//! (RFC 2131, section 4.1), since the host has no address of the pod's. The pod's MAC address is in `chaddr` and comes
//! with the lease; the frames bear the MAC address of the host's device, so a switch that compares the two must be told
//! to let them pass.
//!
//! - **Who asks**: a client identifier of RFC 4361, made of the attachment (DUID-LL of its MAC address) and of the low 32
//!   bits of the lease's sequence (IAID). It is the same after a restart of this process, and never that of another
//!   lease: a late release frees nothing that a later lease has.
//! - **After a restart** the store still has the lease. [`AddressBinder::renew`] checks it with the server, in the form of
//!   INIT-REBOOT (section 3.2).
//! - **Renewal** is a unicast REQUEST up to T2 and a broadcast one afterwards (RENEWING and REBINDING, section 4.4.5)
//!   where the address is one of the namespace that the binder works in; else it takes the form of INIT-REBOOT, which
//!   servers answer with a new time as well.
//! - **A release has no answer** (section 4.4.6). It goes to the server alone where the host's device has an address to
//!   send it from, else to all of the link. Where it gets lost, or where nobody knows what was bound and no server
//!   answers, the server has the address until the lease ends.
//!
//! # Limits
//! A device without an IPv4 address gets broadcast answers only where its namespace does not filter by reverse path
//! (`net.ipv4.conf.*.rp_filter` 0). A DHCP client of the host on the same device is not disturbed.

mod message;
mod socket;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dcenet_core::model::{IfName, MacAddr};
use dcenet_core::netns::NetNs;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::message::{Answer, Client, Kind, Memo};
use self::socket::{Exchange, Link};
use super::off_thread::off_thread;
use super::{AddressBinder, BindError, BindRequest, BindToken, Bound};

/// How to reach the server.
///
/// ```json
/// { "device": "br0", "first": "1s", "tries": 4 }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DhcpConfig {
    /// The device that leads to the server's link.
    pub device: IfName,
    /// How long the first answer is waited for, 1s unless told; twice as long each further time, a tenth more or less.
    /// RFC 2131, section 4.1, has 4 s for a client that is alone; here a pod's start waits.
    #[serde(default = "DhcpConfig::default_first", with = "first_text")]
    pub first: Duration,
    /// How many times a message is sent, 1 to 8; 4 unless told.
    #[serde(default = "DhcpConfig::default_tries")]
    pub tries: u32,
}

impl DhcpConfig {
    /// With what is usual.
    pub fn new(device: IfName) -> Self {
        Self { device, first: Self::default_first(), tries: Self::default_tries() }
    }

    fn default_first() -> Duration {
        Duration::from_secs(1)
    }

    fn default_tries() -> u32 {
        4
    }
}

mod first_text {
    use serde::de::Error as _;
    use serde::{Deserializer, Serializer};

    use super::Duration;
    use crate::config::duration_text;

    pub(super) fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        duration_text::serialize(&Some(*value), serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        duration_text::deserialize(deserializer)?
            .ok_or_else(|| D::Error::custom("first is null; write a duration, as 1s, or leave it out"))
    }
}

/// A DHCPv4 client for many attachments.
#[derive(Debug, Clone)]
pub struct DhcpBinder {
    config: DhcpConfig,
    netns: Option<Arc<NetNs>>,
    /// Until when a token that has declined an address waits.
    waiting: Arc<Mutex<HashMap<BindToken, Instant>>>,
}

impl DhcpBinder {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// [`BindError::Refused`] for a configuration that cannot work.
    pub fn new(config: DhcpConfig) -> Result<Self, BindError> {
        let this = Self { config, netns: None, waiting: Arc::default() };
        let DhcpConfig { first, tries, .. } = &this.config;
        if !(1..=8).contains(tries) {
            return Err(this.refused(format!("tries: {tries} is not 1 to 8")));
        }
        if first.is_zero() || *first > Duration::from_secs(60) {
            return Err(this.refused(format!("first: {first:?} is not more than zero and at most 60s")));
        }
        Ok(this)
    }

    /// In this namespace.
    #[must_use]
    pub fn in_netns(self, netns: Arc<NetNs>) -> Self {
        Self { netns: Some(netns), ..self }
    }

    /// Asks whether a server has an address for a stranger, and takes none. `None` if nobody offers one.
    ///
    /// # Errors
    /// [`BindError::Failed`] if the device cannot be used.
    pub fn probe(&self) -> Result<Option<Ipv4Addr>, BindError> {
        let client = Client::stranger();
        let mut link = self.link(None)?;
        let offer = self.ask(&mut link, &mut Exchange::new(), &client, &DISCOVER, Ipv4Addr::BROADCAST, 2)?;
        Ok(offer.map(|offer| offer.address))
    }

    fn refused(&self, reason: String) -> BindError {
        BindError::Refused { outside: self.name(), reason }
    }

    fn failed(&self, doing: &'static str) -> impl Fn(std::io::Error) -> BindError {
        let outside = self.name();
        move |source| BindError::Failed { outside: outside.clone(), doing, source: Box::new(source) }
    }

    /// A socket on the device; bound to the address where one is given.
    fn link(&self, address: Option<Ipv4Addr>) -> Result<Link, BindError> {
        let open = || Link::open(&self.config.device, address);
        let opened = match &self.netns {
            None => open(),
            Some(netns) => netns.run(open).map_err(std::io::Error::other).and_then(|opened| opened),
        };
        opened.map_err(self.failed("opening a socket for port 68"))
    }

    /// Sends a message until somebody answers it; `None` if nobody does.
    fn ask(
        &self,
        link: &mut Link,
        exchange: &mut Exchange,
        client: &Client,
        kind: &Kind,
        to: Ipv4Addr,
        tries: u32,
    ) -> Result<Option<Answer>, BindError> {
        let asked = link.ask(exchange, client, kind, to, self.config.first, tries.min(self.config.tries));
        asked.map_err(self.failed("sending to the server"))
    }

    fn no_answer(&self, messages: u32, certain: bool, advice: &'static str) -> BindError {
        let tries = self.config.tries;
        let waited = self.config.first.saturating_mul((1 << tries) - 1).saturating_mul(messages);
        BindError::NoAnswer { outside: self.name(), waited, asked: tries, certain, advice }
    }

    /// DISCOVER and REQUEST (RFC 2131, section 3.1).
    fn select(&self, request: &BindRequest) -> Result<Bound, BindError> {
        let wish = match request.addresses[..] {
            [] => None,
            [address] => match address.addr() {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(ip) => return Err(self.refused(format!("{ip} is no IPv4 address"))),
            },
            _ => return Err(self.refused("a client has one address; ask for one".to_owned())),
        };
        let client = Client::of(&request.token, request.mac);
        self.wait_after_decline(&request.token);
        // Opened afterwards, or the broadcasts of ten seconds would fill its queue.
        let mut link = self.link(None)?;
        for _ in 0..NAKS {
            let (discover, mut exchange) = (Kind::Discover { wish }, Exchange::new());
            let all = (Ipv4Addr::BROADCAST, self.config.tries);
            let offer = self.ask(&mut link, &mut exchange, &client, &discover, all.0, all.1)?;
            let Some(offer) = offer else {
                return Err(self.no_answer(1, true, "no server is on the link, or it has no address left"));
            };
            let (address, server) = (offer.address, offer.server);
            if let Some(wish) = wish.filter(|wish| *wish != address) {
                return Err(self.refused(format!("{wish} was asked for and {address} offered; it may be in use")));
            }
            let choose = Kind::Select { address, server };
            let sent = now();
            match self.ask(&mut link, &mut exchange, &client, &choose, all.0, all.1)? {
                Some(answer) if answer.is_nak => {}
                Some(answer) if answer.address != address => {
                    // It counts as ours there, and nobody asked for it.
                    let release = Kind::Release { address: answer.address, server };
                    link.tell(&client, &release, Some(server)).map_err(self.failed("sending a release"))?;
                    let acknowledged = answer.address;
                    return Err(self.refused(format!("{address} was asked for and {acknowledged} acknowledged")));
                }
                Some(answer) => {
                    return answer.bound(&request.token, request.mac, sent).map_err(|reason| self.refused(reason));
                }
                None => return Err(self.no_answer(2, false, "the server offered an address and then fell silent")),
            }
        }
        Err(self.refused(format!("the server took back what it had offered, {NAKS} times in a row")))
    }

    /// RFC 2131, section 3.1, item 5: at least ten seconds go by between a DECLINE and the next DISCOVER.
    fn wait_after_decline(&self, token: &BindToken) {
        let mut waiting = self.waiting.lock();
        waiting.retain(|_, until| *until > Instant::now());
        let until = waiting.get(token).copied();
        drop(waiting);
        if let Some(until) = until {
            thread::sleep(until.saturating_duration_since(Instant::now()));
            // From here on it may have something again.
            self.waiting.lock().remove(token);
        }
    }

    fn turn_down(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        let (own, memo) = self.parts(bound)?;
        if IpAddr::V4(own) != address {
            return Err(self.refused(format!("{address} is not what {} has", bound.token)));
        }
        let client = Client::of(&bound.token, bound.mac);
        let decline = Kind::Decline { address: own, server: memo.server };
        self.link(None)?.tell(&client, &decline, None).map_err(self.failed("sending a decline"))?;
        self.waiting.lock().insert(bound.token.clone(), Instant::now() + DECLINED);
        Ok(())
    }

    /// Runs what waits for the server beside the caller's thread.
    async fn beside<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<R, BindError> + Send + 'static,
    ) -> Result<R, BindError> {
        let this = self.clone();
        off_thread(move || work(&this)).await.map_err(self.failed("making a thread"))?
    }

    fn extend(&self, bound: &Bound) -> Result<Bound, BindError> {
        let (address, memo) = self.parts(bound)?;
        let client = Client::of(&bound.token, bound.mac);
        let tries = self.config.tries;
        let (sent, all) = (now(), Ipv4Addr::BROADCAST);
        let mut answer = None;
        // Where the address is not in this namespace, nobody here would get what is sent to it.
        match self.link(Some(address)) {
            Ok(mut link) => {
                if memo.rebind.is_none_or(|at| sent < at) {
                    let renew = Kind::Renew { address, server: Some(memo.server) };
                    answer = self.ask(&mut link, &mut Exchange::new(), &client, &renew, memo.server, tries)?;
                }
                if answer.is_none() {
                    let rebind = Kind::Renew { address, server: None };
                    answer = self.ask(&mut link, &mut Exchange::new(), &client, &rebind, all, tries)?;
                }
            }
            Err(_) => {
                let mut link = self.link(None)?;
                let reboot = Kind::Reboot { address };
                answer = self.ask(&mut link, &mut Exchange::new(), &client, &reboot, all, tries)?;
            }
        }
        let lost = || {
            let (address, token) = (address.into(), bound.token.clone());
            BindError::Lost { outside: self.name(), address, token }
        };
        match answer {
            Some(answer) if answer.is_nak || answer.address != address => Err(lost()),
            Some(answer) => answer.bound(&bound.token, bound.mac, sent).map_err(|reason| self.refused(reason)),
            None if bound.until.is_some_and(|until| now() >= until) => Err(lost()),
            None => Err(self.no_answer(1, true, "the server is away; the lease lasts until its time is over")),
        }
    }

    /// The address of a lease, and what was written down of the server.
    fn parts(&self, bound: &Bound) -> Result<(Ipv4Addr, Memo), BindError> {
        let memo = serde_json::from_str(&bound.memo);
        match (bound.addresses.first().map(|a| a.address.addr()), memo) {
            (Some(IpAddr::V4(address)), Ok(memo)) => Ok((address, memo)),
            _ => Err(self.refused(format!("the record of {} is of no DHCP lease", bound.token))),
        }
    }

    fn let_go(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError> {
        let mac = bound.map_or_else(|| token.attachment.mac(), |bound| bound.mac);
        let client = Client::of(token, mac);
        let declined = |until: &Instant| *until > Instant::now();
        if bound.is_none() && self.waiting.lock().get(token).is_some_and(declined) {
            // It has nothing since, and a DISCOVER would come too soon.
            return Ok(());
        }
        let mut link = self.link(None)?;
        let (address, server) = match bound {
            Some(bound) => {
                let (address, memo) = self.parts(bound)?;
                (address, memo.server)
            }
            // Who has an address is offered it (RFC 2131, section 4.3.1). Who has none: a server ignores its release.
            None => match self.ask(&mut link, &mut Exchange::new(), &client, &DISCOVER, Ipv4Addr::BROADCAST, 2)? {
                Some(offer) => (offer.address, offer.server),
                None => return Ok(()),
            },
        };
        let release = Kind::Release { address, server };
        link.tell(&client, &release, Some(server)).map_err(self.failed("sending a release"))
    }
}

#[async_trait]
impl AddressBinder for DhcpBinder {
    fn name(&self) -> String {
        format!("dhcp on {}", self.config.device)
    }

    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        let request = request.clone();
        self.beside(move |this| this.select(&request)).await
    }

    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        let bound = bound.clone();
        self.beside(move |this| this.extend(&bound)).await
    }

    async fn release(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError> {
        let (token, bound) = (token.clone(), bound.cloned());
        self.beside(move |this| this.let_go(&token, bound.as_ref())).await
    }

    /// By a DECLINE (RFC 2131, section 4.4.4), which has no answer. Servers keep the address back for a time of theirs. The
    /// token's next [`AddressBinder::bind`] waits until ten seconds are over; others do not.
    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        let bound = bound.clone();
        self.beside(move |this| this.turn_down(&bound, address)).await
    }

    /// Servers do not tell.
    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        Ok(None)
    }

    /// Whether the device is there and a socket can be opened on it; asks no server.
    async fn ready(&self) -> Result<(), BindError> {
        self.link(None).map(drop)
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

const DISCOVER: Kind = Kind::Discover { wish: None };
/// Between a DECLINE and the next DISCOVER.
const DECLINED: Duration = Duration::from_secs(10);
/// Offers that the server may take back in a row.
const NAKS: u32 = 2;

/// A stranger's MAC address: locally administered, and no attachment's.
const STRANGER: MacAddr = MacAddr::new([0x02, 0, 0, 0, 0, 0]);
