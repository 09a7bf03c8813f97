//! What is known of links without asking.

use super::apply::Session;
use crate::model::{IfIndex, IfName, Mtu};
use crate::netlink::LinkView;
use crate::plan::Target;

impl Session<'_> {
    /// Remembers a link's index, so that it need not be asked for.
    pub(super) fn know(&mut self, target: Target, link: &LinkView) {
        if let Ok(name) = link.name.parse() {
            self.links.insert((target, name), (link.index, Some(link.mtu)));
        }
    }

    /// Learns the index alone.
    pub(super) fn know_index(&mut self, target: Target, link: &IfName, index: IfIndex) {
        self.links.insert((target, link.clone()), (index, None));
    }

    /// A link's index, if it was learnt.
    pub(super) fn known(&self, target: Target, link: &IfName) -> Option<IfIndex> {
        self.entry(target, link).map(|(index, _)| index)
    }

    fn entry(&self, target: Target, link: &IfName) -> Option<(IfIndex, Option<u32>)> {
        let by = |name: &IfName| self.links.get(&(target, name.clone())).copied();
        by(link).or_else(|| by(self.renamed.get(&(target, link.clone()))?))
    }

    /// A link's MTU, if it was learnt.
    pub(super) fn known_mtu(&self, target: Target, link: &IfName) -> Option<Mtu> {
        let (_, mtu) = self.entry(target, link)?;
        mtu.and_then(|mtu| Mtu::try_from(mtu).ok())
    }
}
