//! DHCP messages: what is sent, and what an answer means.

use std::net::Ipv4Addr;

use dcenet_core::model::MacAddr;
use dcenet_core::provider::{Dns, LeasedRoute};
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::super::{BindToken, Bound, BoundAddress};

/// In whose name a message is sent.
#[derive(Debug, Clone)]
pub(super) struct Client {
    mac: MacAddr,
    id: Vec<u8>,
}

impl Client {
    pub(super) fn of(token: &BindToken, mac: MacAddr) -> Self {
        // Differs from that of every other lease of the attachment, or one's release would be another's.
        let iaid = (token.sequence as u32).to_be_bytes();
        Self { mac, id: identifier(iaid, token.attachment.mac()) }
    }

    pub(super) fn stranger() -> Self {
        Self { mac: super::STRANGER, id: identifier([0; 4], super::STRANGER) }
    }
}

/// RFC 4361, section 6.1: type 255, IAID, and a DUID, here of type DUID-LL (RFC 8415, section 11.4) on Ethernet.
fn identifier(iaid: [u8; 4], mac: MacAddr) -> Vec<u8> {
    [&[255][..], &iaid, &[0, 3, 0, 1], &mac.bytes()].concat()
}

/// What is asked or told (RFC 2131, section 4.3.6, table 4, and section 4.4.1, table 5).
#[derive(Debug, Clone)]
pub(super) enum Kind {
    Discover {
        wish: Option<Ipv4Addr>,
    },
    Select {
        address: Ipv4Addr,
        server: Ipv4Addr,
    },
    /// INIT-REBOOT.
    Reboot {
        address: Ipv4Addr,
    },
    /// RENEWING, with the server that is asked alone, and REBINDING.
    Renew {
        address: Ipv4Addr,
        server: Option<Ipv4Addr>,
    },
    Release {
        address: Ipv4Addr,
        server: Ipv4Addr,
    },
    Decline {
        address: Ipv4Addr,
        server: Ipv4Addr,
    },
}

impl Kind {
    /// The message as bytes; `secs` since the exchange began.
    pub(super) fn encode(&self, client: &Client, xid: u32, secs: u16) -> Result<Vec<u8>, String> {
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(xid, none, none, none, none, &client.mac.bytes());
        message.set_secs(secs);
        let mut options = vec![DhcpOption::ClientIdentifier(client.id.clone())];
        let kind = match self {
            Self::Discover { wish } => {
                options.extend(wish.map(DhcpOption::RequestedIpAddress));
                MessageType::Discover
            }
            Self::Select { address, server } => {
                options.push(DhcpOption::RequestedIpAddress(*address));
                options.push(DhcpOption::ServerIdentifier(*server));
                MessageType::Request
            }
            Self::Reboot { address } => {
                options.push(DhcpOption::RequestedIpAddress(*address));
                MessageType::Request
            }
            Self::Renew { address, .. } => {
                message.set_ciaddr(*address);
                MessageType::Request
            }
            Self::Release { address, server } => {
                message.set_ciaddr(*address);
                options.push(DhcpOption::ServerIdentifier(*server));
                MessageType::Release
            }
            Self::Decline { address, server } => {
                options.push(DhcpOption::RequestedIpAddress(*address));
                options.push(DhcpOption::ServerIdentifier(*server));
                MessageType::Decline
            }
        };
        if matches!(kind, MessageType::Discover | MessageType::Request) {
            if message.ciaddr().is_unspecified() {
                message.set_flags(Flags::default().set_broadcast());
            }
            options.push(DhcpOption::ParameterRequestList(WANTED.to_vec()));
            options.push(DhcpOption::MaxMessageSize(1500));
        }
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option);
        }
        message.to_vec().map_err(|e| e.to_string())
    }

    /// Whether a message of this type answers it.
    fn is_answered_by(&self, kind: MessageType) -> bool {
        match self {
            Self::Discover { .. } => kind == MessageType::Offer,
            Self::Select { .. } | Self::Reboot { .. } | Self::Renew { .. } => {
                matches!(kind, MessageType::Ack | MessageType::Nak)
            }
            Self::Release { .. } | Self::Decline { .. } => false,
        }
    }
}

/// Options that are asked for, 121 before 3 (RFC 3442).
const WANTED: [OptionCode; 9] = [
    OptionCode::SubnetMask,
    OptionCode::ClasslessStaticRoute,
    OptionCode::Router,
    OptionCode::DomainNameServer,
    OptionCode::DomainName,
    OptionCode::DomainSearch,
    OptionCode::AddressLeaseTime,
    OptionCode::Renewal,
    OptionCode::Rebinding,
];

/// What is written down of the server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Memo {
    pub(super) server: Ipv4Addr,
    /// T2, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rebind: Option<u64>,
}

/// An OFFER, ACK or NAK.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) is_nak: bool,
    pub(super) address: Ipv4Addr,
    pub(super) server: Ipv4Addr,
    message: Message,
}

impl Answer {
    /// Reads what answers a message; `None` for everything else that comes to the port.
    pub(super) fn decode(bytes: &[u8], kind: &Kind, client: &Client, xid: u32) -> Option<Self> {
        // `Message::chaddr` trusts the length that the sender wrote into the third byte.
        if bytes.get(2).is_none_or(|length| *length != 6) {
            return None;
        }
        let message = Message::decode(&mut Decoder::new(bytes)).ok()?;
        let options = message.opts();
        let ours = message.opcode() == Opcode::BootReply
            && message.xid() == xid
            && message.chaddr() == client.mac.bytes()
            && kind.is_answered_by(options.msg_type()?);
        let echoed = match options.get(OptionCode::ClientIdentifier) {
            // RFC 6842, section 3: who echoes it names whom it answers.
            Some(DhcpOption::ClientIdentifier(id)) => *id == client.id,
            _ => true,
        };
        let Some(DhcpOption::ServerIdentifier(server)) = options.get(OptionCode::ServerIdentifier) else { return None };
        let server = *server;
        if let Kind::Select { server: chosen, .. } | Kind::Renew { server: Some(chosen), .. } = kind
            && server != *chosen
        {
            return None;
        }
        let is_nak = options.msg_type()? == MessageType::Nak;
        let address = message.yiaddr();
        (ours && echoed && (is_nak || !address.is_unspecified())).then_some(Self { is_nak, address, server, message })
    }

    /// What an ACK binds; `sent` is when it was asked for, in milliseconds since 1970, from which its times count
    /// (RFC 2131, section 4.4.1).
    pub(super) fn bound(&self, token: &BindToken, mac: MacAddr, sent: u64) -> Result<Bound, String> {
        let options = self.message.opts();
        let ip = self.address;
        let length = match options.get(OptionCode::SubnetMask) {
            Some(DhcpOption::SubnetMask(mask)) => Ipv4Net::with_netmask(ip, *mask)
                .map_err(|_| format!("the server says that {mask} is a subnet mask"))?
                .prefix_len(),
            // Nobody but the router is known to be on the link then.
            _ => 32,
        };
        let mut gateway = match options.get(OptionCode::Router) {
            Some(DhcpOption::Router(routers)) => routers.first().copied(),
            _ => None,
        };
        let mut routes = Vec::new();
        if let Some(DhcpOption::ClasslessStaticRoute(told)) = options.get(OptionCode::ClasslessStaticRoute) {
            // The router option counts for nothing beside it (RFC 3442).
            gateway = told.iter().find(|(to, _)| to.prefix_len() == 0).map(|(_, via)| *via);
            for (destination, via) in told {
                // Via 0.0.0.0 is on the link.
                let gateway = (!via.is_unspecified()).then_some((*via).into());
                routes.push(LeasedRoute { destination: IpNet::V4(destination.trunc()), gateway });
            }
        } else if let Some(via) = gateway {
            routes.push(LeasedRoute { destination: IpNet::V4(Ipv4Net::default()), gateway: Some(via.into()) });
        }
        let mut dns = Dns::default();
        if let Some(DhcpOption::DomainNameServer(servers)) = options.get(OptionCode::DomainNameServer) {
            dns.nameservers = servers.iter().map(ToString::to_string).collect();
        }
        if let Some(DhcpOption::DomainName(domain)) = options.get(OptionCode::DomainName) {
            dns.domain = Some(domain.trim_end_matches('\0').to_owned()).filter(|d| !d.is_empty());
        }
        if let Some(DhcpOption::DomainSearch(names)) = options.get(OptionCode::DomainSearch) {
            dns.search = names.iter().map(|name| name.to_string().trim_end_matches('.').to_owned()).collect();
        }
        let time = match options.get(OptionCode::AddressLeaseTime) {
            Some(DhcpOption::AddressLeaseTime(seconds)) => *seconds,
            _ => return Err("the server does not say for how long the address is leased".to_owned()),
        };
        if time == 0 {
            return Err("the server leases the address for no time".to_owned());
        }
        // RFC 2131, section 3.3: all ones are for ever.
        let lasts = (time != u32::MAX).then_some(u64::from(time) * 1000);
        let told = |option: Option<&DhcpOption>| match option {
            // At once would be for ever.
            Some(DhcpOption::Renewal(seconds) | DhcpOption::Rebinding(seconds)) if *seconds > 0 => {
                Some(u64::from(*seconds) * 1000)
            }
            _ => None,
        };
        // Section 4.4.5: half of the time, and seven eighths; T1 before T2 before the end.
        let rebind = lasts.map(|all| told(options.get(OptionCode::Rebinding)).unwrap_or(all / 8 * 7).min(all));
        let renew = lasts
            .zip(rebind)
            .map(|(all, rebind)| told(options.get(OptionCode::Renewal)).unwrap_or(all / 2).min(rebind));
        let memo = Memo { server: self.server, rebind: rebind.map(|after| sent.saturating_add(after)) };
        Ok(Bound {
            token: token.clone(),
            addresses: vec![BoundAddress {
                address: IpNet::V4(Ipv4Net::new(ip, length).map_err(|e| e.to_string())?),
                gateway: gateway.filter(|via| !via.is_unspecified()).map(Into::into),
            }],
            mac,
            routes,
            dns,
            renew: renew.map(|after| sent.saturating_add(after)),
            until: lasts.map(|after| sent.saturating_add(after)),
            memo: serde_json::to_string(&memo).map_err(|e| e.to_string())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> BindToken {
        let attachment = serde_json::from_str(r#"{ "network": "n", "container": "c", "ifname": "eth0" }"#).unwrap();
        BindToken { attachment, sequence: 7 }
    }

    fn client() -> Client {
        Client::of(&token(), MacAddr::new([2, 0, 0, 0, 0, 9]))
    }

    fn reply(kind: MessageType, options: Vec<DhcpOption>) -> Vec<u8> {
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(5, none, [10, 9, 0, 20].into(), none, none, &[2, 0, 0, 0, 0, 9]);
        message.set_opcode(Opcode::BootReply);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        message.opts_mut().insert(DhcpOption::ServerIdentifier([10, 9, 0, 1].into()));
        for option in options {
            message.opts_mut().insert(option);
        }
        message.to_vec().unwrap()
    }

    fn decode(bytes: &[u8]) -> Option<Answer> {
        let kind = Kind::Select { address: [10, 9, 0, 20].into(), server: [10, 9, 0, 1].into() };
        Answer::decode(bytes, &kind, &client(), 5)
    }

    #[test]
    fn the_client_identifier_tells_leases_apart_and_not_restarts() {
        let same = Client::of(&token(), MacAddr::new([2, 0, 0, 0, 0, 1]));
        assert_eq!(client().id, same.id);
        assert_eq!(client().id[..9], [255, 0, 0, 0, 7, 0, 3, 0, 1]);
        assert_ne!(client().id, Client::of(&BindToken { sequence: 8, ..token() }, client().mac).id);
    }

    #[test]
    fn classless_routes_go_before_routers() {
        let route = |net: &str, via: [u8; 4]| (net.parse().unwrap(), Ipv4Addr::from(via));
        let options = |told: Vec<(Ipv4Net, Ipv4Addr)>| {
            let mut all = vec![
                DhcpOption::SubnetMask([255, 255, 255, 0].into()),
                DhcpOption::Router(vec![[10, 9, 0, 1].into()]),
                DhcpOption::AddressLeaseTime(120),
            ];
            if !told.is_empty() {
                all.push(DhcpOption::ClasslessStaticRoute(told));
            }
            decode(&reply(MessageType::Ack, all)).unwrap().bound(&token(), client().mac, 1000).unwrap()
        };
        let plain = options(vec![]);
        assert_eq!(plain.addresses[0].gateway, Some("10.9.0.1".parse().unwrap()));
        assert_eq!(plain.routes.len(), 1);
        assert_eq!((plain.renew, plain.until), (Some(61_000), Some(121_000)));
        assert!(plain.memo.contains("106000"), "{}", plain.memo);
        let told = options(vec![route("10.1.0.0/16", [10, 9, 0, 2]), route("10.2.0.0/16", [0, 0, 0, 0])]);
        assert_eq!(told.addresses[0].gateway, None);
        assert_eq!(told.routes[0].gateway, Some("10.9.0.2".parse().unwrap()));
        assert_eq!((told.routes.len(), told.routes[1].gateway), (2, None));
        let default = options(vec![route("0.0.0.0/0", [10, 9, 0, 3])]);
        assert_eq!(default.addresses[0].gateway, Some("10.9.0.3".parse().unwrap()));
    }

    #[test]
    fn what_is_not_an_answer_is_passed_over() {
        let good = reply(MessageType::Ack, vec![DhcpOption::AddressLeaseTime(9)]);
        assert!(decode(&good).is_some());
        assert!(decode(&reply(MessageType::Offer, vec![])).is_none());
        assert!(decode(&reply(MessageType::Nak, vec![])).unwrap().is_nak);
        assert!(decode(&reply(MessageType::Ack, vec![DhcpOption::ClientIdentifier(vec![1])])).is_none());
        let other = Answer::decode(&good, &Kind::Reboot { address: [10, 9, 0, 20].into() }, &client(), 6);
        assert!(other.is_none());
        let error = decode(&reply(MessageType::Ack, vec![])).unwrap().bound(&token(), client().mac, 0).unwrap_err();
        assert!(error.contains("how long"), "{error}");
        let timed = |options| decode(&reply(MessageType::Ack, options)).unwrap().bound(&token(), client().mac, 0);
        let error = timed(vec![DhcpOption::AddressLeaseTime(0)]).unwrap_err();
        assert!(error.contains("no time"), "{error}");
        let at_once = timed(vec![DhcpOption::AddressLeaseTime(60), DhcpOption::Renewal(0)]).unwrap();
        assert_eq!(at_once.renew, Some(30_000));
        // Who is asked alone answers alone (section 4.4.5); whoever rebinds is answered by any server.
        let renewed = |server| {
            let kind = Kind::Renew { address: [10, 9, 0, 20].into(), server };
            Answer::decode(&good, &kind, &client(), 5).is_some()
        };
        assert_eq!(
            (renewed(None), renewed(Some([10, 9, 0, 1].into())), renewed(Some([10, 9, 0, 2].into()))),
            (true, true, false)
        );
        // No cut and no changed byte stops the reader, nor a hardware address that claims to be longer than there is room.
        for at in 0..good.len() {
            let _ = decode(&good[..at]);
            for bits in [0xff, 0x80, 0x01] {
                let mut bad = good.clone();
                bad[at] ^= bits;
                if let Some(answer) = decode(&bad) {
                    let _ = answer.bound(&token(), client().mac, u64::MAX);
                }
            }
        }
    }
}
