//! Links with all their names and the device that they belong to, and changes of them by index.

use std::os::fd::{AsFd, AsRawFd};

use super::link::{HEADER, LinkChange, LinkView, RTEXT_FILTER_SKIP_STATS, header, set_link};
use super::message::{Attributes, Message, text};
use super::{NetlinkError, Socket};
use crate::model::{IfIndex, IfName, MacAddr, Mtu};
use crate::netns::NetNs;

/// A link, with what [`LinkView`] leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkDetail {
    /// The rest.
    pub link: LinkView,
    /// Its alternative names, sorted (`IFLA_ALT_IFNAME`; Linux 5.5).
    pub alternative_names: Vec<String>,
    /// The device that it belongs to, by bus and name, such as `pci` and `0000:01:10.0` (`IFLA_PARENT_DEV_BUS_NAME`,
    /// `IFLA_PARENT_DEV_NAME`; Linux 5.14). Virtual links have none.
    pub parent: Option<(String, String)>,
}

impl LinkDetail {
    /// Reads a `RTM_NEWLINK` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let mut alternative_names: Vec<String> = attributes
            .find(IFLA_PROP_LIST)
            .into_iter()
            .flat_map(Attributes::new)
            .filter(|(kind, _)| *kind == IFLA_ALT_IFNAME)
            .map(|(_, name)| text(name))
            .collect();
        alternative_names.sort_unstable();
        let parent = || {
            let bus = attributes.find(IFLA_PARENT_DEV_BUS_NAME).map(text)?;
            Some((bus, attributes.find(IFLA_PARENT_DEV_NAME).map(text)?))
        };
        Some(Self { link: LinkView::parse(payload)?, alternative_names, parent: parent() })
    }
}

/// What is to be changed of a link that exists; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkSettings<'a> {
    /// The namespace that it goes to. All else is changed there.
    pub netns: Option<&'a NetNs>,
    /// Its name.
    pub name: Option<&'a IfName>,
    /// Its alias; an empty one takes it away.
    pub alias: Option<&'a str>,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// Its MTU.
    pub mtu: Option<Mtu>,
    /// Whether it receives all frames (`IFF_PROMISC`).
    pub promisc: Option<bool>,
    /// Whether it receives all multicast frames (`IFF_ALLMULTI`).
    pub allmulti: Option<bool>,
    /// Whether it is up.
    pub up: Option<bool>,
}

impl Socket {
    /// The link of this index, if there is one.
    pub fn link_detail(&mut self, index: IfIndex) -> Result<Option<LinkDetail>, NetlinkError> {
        let operation = format!("look up link {index}");
        let mut message = Message::new(libc::RTM_GETLINK, 0, operation, &header(index.get(), 0, 0));
        message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        match self.request(&message) {
            Ok(replies) => Ok(replies.iter().find_map(|reply| LinkDetail::parse(&reply.payload))),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links.
    pub fn link_details(&mut self) -> Result<Vec<LinkDetail>, NetlinkError> {
        let replies = self.dump(&super::link_dump(None))?;
        Ok(replies.iter().filter_map(|reply| LinkDetail::parse(&reply.payload)).collect())
    }

    /// Changes a link by one message. What was changed before a refusal stays so: the kernel goes by the order namespace,
    /// address, MTU, name, alias, flags (`do_setlink` in net/core/rtnetlink.c).
    ///
    /// # Errors
    /// `ENODEV` where it is gone; `EBUSY` for the name of one that is up, before Linux 6.3; `EEXIST` where a name is taken:
    /// see [`move_link`](Self::move_link).
    pub fn change_link(&mut self, index: IfIndex, settings: &LinkSettings<'_>) -> Result<(), NetlinkError> {
        let LinkSettings { netns, name, alias, mac, mtu, promisc, allmulti, up } = *settings;
        let change = LinkChange {
            rename: name,
            alias,
            mac,
            mtu: mtu.map(Mtu::get),
            promisc,
            allmulti,
            up,
            ..LinkChange::default()
        };
        let mut message = set_link(&index, index, &change);
        if let Some(netns) = netns {
            message.bytes(libc::IFLA_NET_NS_FD, &netns.as_fd().as_raw_fd().to_ne_bytes());
        }
        self.request(&message).map(drop)
    }

    /// Gives a link another name beside its own, of up to 127 bytes.
    ///
    /// # Errors
    /// `EEXIST` where any link of the namespace is called so.
    ///
    /// # Minimum kernel version
    /// 5.5.
    pub fn add_alternative_name(&mut self, index: IfIndex, name: &str) -> Result<(), NetlinkError> {
        self.property(RTM_NEWLINKPROP, EXCLUSIVE, format!("add alternative name {name} to link {index}"), index, name)
    }

    /// Takes such a name away.
    ///
    /// # Errors
    /// `ENOENT` or `EINVAL` where the link is not called so.
    pub fn delete_alternative_name(&mut self, index: IfIndex, name: &str) -> Result<(), NetlinkError> {
        self.property(RTM_DELLINKPROP, 0, format!("delete alternative name {name} of link {index}"), index, name)
    }

    fn property(
        &mut self,
        kind: u16,
        flags: u16,
        operation: String,
        index: IfIndex,
        name: &str,
    ) -> Result<(), NetlinkError> {
        let mut message = Message::new(kind, flags, operation, &header(index.get(), 0, 0));
        message.nest(IFLA_PROP_LIST | libc::NLA_F_NESTED as u16, |list| {
            list.text(IFLA_ALT_IFNAME, name);
        });
        self.request(&message).map(drop)
    }
}

const RTM_NEWLINKPROP: u16 = 108;
const RTM_DELLINKPROP: u16 = 109;
const EXCLUSIVE: u16 = (libc::NLM_F_EXCL | libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;
const IFLA_PROP_LIST: u16 = 52;
const IFLA_ALT_IFNAME: u16 = 53;
const IFLA_PARENT_DEV_NAME: u16 = 56;
const IFLA_PARENT_DEV_BUS_NAME: u16 = 57;
