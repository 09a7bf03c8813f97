//! What the host itself uses devices for.

use std::collections::BTreeMap;
use std::fmt;

use dcenet_core::model::IfIndex;
use dcenet_core::netlink::{LinkView, NetlinkError, RouteView, Socket};

/// What the host uses devices for, by their names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostUse {
    used: BTreeMap<String, InUse>,
    /// A default route leads to somewhere that is not read.
    unread: bool,
}

/// A use that forbids handing a device out.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InUse {
    /// The host's default route leads over it, or over a VLAN or the like on it.
    DefaultRoute,
    /// A default route of several next hops may lead over it.
    PerhapsDefaultRoute,
    /// It is a port of this bridge, bond or routing domain.
    Enslaved(String),
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DefaultRoute => f.write_str("carries the host's default route"),
            Self::PerhapsDefaultRoute => f.write_str("may carry the host's default route, which has several next hops"),
            Self::Enslaved(master) => write!(f, "is a port of {master}"),
        }
    }
}

impl HostUse {
    /// Looks in the socket's namespace.
    ///
    /// Bed: netns.
    ///
    /// # Errors
    /// Where links or routes cannot be listed.
    pub fn read(socket: &mut Socket) -> Result<Self, NetlinkError> {
        Ok(Self::of(&socket.links()?, &socket.routes()?))
    }

    /// Tells it from links and routes of a namespace. A default route counts in every routing table.
    pub fn of(links: &[LinkView], routes: &[RouteView]) -> Self {
        let by_index: BTreeMap<IfIndex, &LinkView> = links.iter().map(|link| (link.index, link)).collect();
        let mut used = BTreeMap::new();
        for link in links {
            if let Some(master) = link.master {
                let name = by_index.get(&master).map_or_else(|| format!("link {master}"), |m| m.name.clone());
                used.insert(link.name.clone(), InUse::Enslaved(name));
            }
        }
        let mut unread = false;
        for route in routes.iter().filter(|r| r.destination.prefix_len() == 0 && r.kind == UNICAST) {
            let Some(mut at) = route.link else {
                unread = true;
                continue;
            };
            // Down to the device that sends in the end. A parent in another namespace has an index that may be anybody's
            // here.
            for _ in 0..links.len() {
                let Some(link) = by_index.get(&at) else { break };
                used.insert(link.name.clone(), InUse::DefaultRoute);
                match link.peer {
                    Some(parent)
                        if link.peer_netns.is_none()
                            && ON_A_PARENT.contains(&link.kind.as_deref().unwrap_or_default()) =>
                    {
                        at = parent;
                    }
                    _ => break,
                }
            }
        }
        Self { used, unread }
    }

    /// What the host uses this device for.
    pub fn by(&self, name: &str) -> Option<&InUse> {
        self.used.get(name).or(self.unread.then_some(&InUse::PerhapsDefaultRoute))
    }
}

/// `RTN_UNICAST`.
const UNICAST: u8 = 1;
/// Kinds of devices that send over a parent.
const ON_A_PARENT: [&str; 4] = ["vlan", "macvlan", "ipvlan", "macsec"];
