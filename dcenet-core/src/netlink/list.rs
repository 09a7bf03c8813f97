//! Lists of everything of a kind in a namespace.

use super::message::Message;
use super::vxlan::forwarding_dump;
use super::{
    AddressView, ForwardingView, LinkView, NeighbourView, NetlinkError, RouteView, RuleView, Socket, VxlanSpec,
    address_dump, link_by_name, link_dump, neighbour_dump, route_dump, rule_dump,
};
use crate::model::{IfIndex, IfName};

/// Each list is whole: the kernel says when something changed while it was read, and then it is read again.
impl Socket {
    /// All links.
    pub fn links(&mut self) -> Result<Vec<LinkView>, NetlinkError> {
        self.list(&link_dump(None), LinkView::parse)
    }

    /// All addresses of both families.
    pub fn addresses(&mut self) -> Result<Vec<AddressView>, NetlinkError> {
        self.list(&address_dump(None), AddressView::parse)
    }

    /// All routes of both families and all tables.
    pub fn routes(&mut self) -> Result<Vec<RouteView>, NetlinkError> {
        self.list(&route_dump(None), RouteView::parse)
    }

    /// All policy routing rules of both families.
    pub fn rules(&mut self) -> Result<Vec<RuleView>, NetlinkError> {
        self.list(&rule_dump(), RuleView::parse)
    }

    /// All neighbours of both families.
    pub fn neighbours(&mut self) -> Result<Vec<NeighbourView>, NetlinkError> {
        self.list(&neighbour_dump(), NeighbourView::parse)
    }

    /// What the forwarding database of a VXLAN device says, whoever entered it.
    pub fn forwarding(&mut self, device: IfIndex) -> Result<Vec<ForwardingView>, NetlinkError> {
        let mut found = self.list(&forwarding_dump(device), ForwardingView::parse)?;
        // Kernels before the strict checks (4.20) list all devices.
        found.retain(|entry| entry.index == device);
        Ok(found)
    }

    /// How the VXLAN device of this name was made, with its link; `None` where there is no link of that name, and no spec
    /// where it is of another kind.
    pub fn vxlan(&mut self, name: &IfName) -> Result<Option<(LinkView, Option<VxlanSpec>)>, NetlinkError> {
        let replies = match self.request(&link_by_name(name)) {
            Err(error) if error.errno() == Some(libc::ENODEV) => return Ok(None),
            replies => replies?,
        };
        Ok(replies.iter().find_map(|r| Some((LinkView::parse(&r.payload)?, VxlanSpec::parse(&r.payload)))))
    }

    fn list<T>(&mut self, message: &Message, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>, NetlinkError> {
        Ok(self.dump(message)?.iter().filter_map(|reply| parse(&reply.payload)).collect())
    }
}
