//! Lists of everything of a kind in a namespace.

use super::message::Message;
use super::{
    AddressView, LinkView, NeighbourView, NetlinkError, RouteView, RuleView, Socket, address_dump, link_dump,
    neighbour_dump, route_dump, rule_dump,
};

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

    fn list<T>(&mut self, message: &Message, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>, NetlinkError> {
        Ok(self.dump(message)?.iter().filter_map(|reply| parse(&reply.payload)).collect())
    }
}
