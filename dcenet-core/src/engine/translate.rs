//! Entering and removing what is translated for attachments: elements of the sets of our nftables table.
//!
//! Every change is decided on what was read and takes place only if nothing has changed since, or is decided anew: no
//! lock is needed among attachments, and no port is given twice.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Engine;
use super::error::{StepError, TeardownError};
use super::setting::{restored, write_step};
use crate::journal::{JournalError, Record};
use crate::link::{PlanError, Policy};
use crate::model::{AttachmentKey, IfName, NetworkName};
use crate::nat::{self, Element, HostPort, Nat, Transport};
use crate::netlink::nft::{change, lacks_subsystem, list};
use crate::netlink::{Failure, Family, Flow, Message, NetlinkError, Socket, conntrack, nft};
use crate::netns::NetNsError;
use crate::plan::{MARK, Operation, Plan, Step, Target, Undo, mark};
use crate::proc_sys;
use crate::provider::LeasedAddress;
use crate::sysctl::dotted;

/// Adds to a plan what translates for the attachment.
///
/// # Errors
/// Where its packets do not pass the host, and as [`nat::elements`].
pub(super) fn add_to(plan: &mut Plan, nat: &Nat, policy: Policy, addresses: &[LeasedAddress]) -> Result<(), PlanError> {
    if nat.is_none() {
        return Ok(());
    }
    let (Some(end), Some(entry)) = (&plan.host_end, plan.entry()) else {
        let (field, value) = match nat.ports.first() {
            Some(port) => ("runtimeConfig.portMappings", port.to_string()),
            None => ("nat.masquerade", "true".to_owned()),
        };
        let reason = "packets of this link.kind do not pass the host, so that it cannot translate them; use bridge, veth, \
                      vrf or netkit, or drop it";
        return Err(PlanError::Invalid { field, value, reason: reason.to_owned() });
    };
    let addresses: Vec<IpNet> = addresses.iter().map(|a| a.address).collect();
    // Policy lets the host in, and would let in whoever bears its address.
    let elements = nat::elements(nat, &addresses, plan.bridge.is_some() && policy == Policy::None)?;
    let settings = settings(&elements, entry);
    let port = end.name.clone();
    // A bridge outlives the attachment.
    let outlives = |name: &String| plan.bridge.is_some() && name.ends_with(ROUTE_LOCALNET);
    let write = |name: String| match outlives(&name) {
        true => restored(Target::Host, name, "1".to_owned()),
        false => write_step(Target::Host, name, "1".to_owned()),
    };
    let writes: Vec<Step> = settings.into_iter().map(write).collect();
    plan.steps.extend(writes);
    if !nat.ports.is_empty() && plan.bridge.is_some() {
        // With `bridge-nf-call-iptables` the bridge itself sends a pod's packets to its own mapped port back to it
        // (`br_nf_pre_routing_finish` in `net/bridge/br_netfilter_hooks.c`).
        plan.steps.push(Step::new(Target::Host, Operation::Hairpin { port }));
    }
    if !elements.is_empty() {
        // First, for a port that another has is reason enough not to begin.
        let undo = Undo::DeleteTranslation { elements: elements.clone() };
        plan.steps.insert(0, Step::new(Target::Host, Operation::Translate { elements }).undone_by(undo));
    }
    Ok(())
}

/// Lets packets to 127.0.0.0/8 come in by a link.
const ROUTE_LOCALNET: &str = "/route_localnet";

/// The settings of the host without which elements translate nothing, all of which must be 1. Pods' packets come in by
/// `link`.
fn settings(elements: &[Element], link: &IfName) -> Vec<String> {
    let mut settings = Vec::new();
    for (ipv4, name) in [(true, "ipv4/ip_forward"), (false, "ipv6/conf/all/forwarding")] {
        if elements.iter().any(|element| element.is_ipv4() == ipv4) {
            settings.push(name.to_owned());
        }
    }
    let is_local = |element: &Element| match element {
        Element::Port { address, to, .. } => to.is_ipv4() && nat::reached_by_loopback(*address),
        _ => false,
    };
    if elements.iter().any(is_local) {
        // Over this link answers to 127.0.0.1 come in: what others send there from outside our table drops.
        settings.push(format!("ipv4/conf/{link}{ROUTE_LOCALNET}"));
    }
    settings
}

/// The comment of an attachment's elements: its mark, or its short form where that does not fit (`NFT_USERDATA_MAXLEN` of
/// `include/uapi/linux/netfilter/nf_tables.h` is 256).
fn owner(key: &AttachmentKey) -> String {
    let mark = mark(key);
    if mark.len() <= 250 { mark } else { format!("{MARK}{}", key.id()) }
}

/// The attachment that a comment names.
fn owned_by(comment: &str) -> Option<AttachmentKey> {
    let mut parts = comment.strip_prefix(MARK)?.splitn(3, '/');
    Some(AttachmentKey {
        network: parts.next()?.parse().ok()?,
        container: parts.next()?.parse().ok()?,
        ifname: parts.next()?.parse().ok()?,
    })
}

impl Engine {
    fn netfilter_socket(&self) -> Result<Socket, NetNsError> {
        self.host.0.socket(Family::Netfilter)
    }

    /// A socket for removing elements; `None` where the kernel has no nftables, and so nothing of ours.
    fn removal_socket(&self) -> Result<Option<Socket>, TeardownError> {
        match self.netfilter_socket() {
            Err(NetNsError::Socket(error)) if lacks_subsystem(&error) => Ok(None),
            opened => {
                let mut socket = opened?;
                match socket.request(&nft::get_generation()) {
                    Err(error) if lacks_subsystem(&error) => Ok(None),
                    Err(error) => Err(error.into()),
                    Ok(_) => Ok(Some(socket)),
                }
            }
        }
    }

    /// Enters elements, making the table where it is missing or not whole. What another attachment left at an address that
    /// is this one's now is taken over.
    pub(super) fn translate(&self, elements: &[Element], key: &AttachmentKey) -> Result<(), StepError> {
        let mut socket = match self.netfilter_socket() {
            Err(NetNsError::Socket(source)) if lacks_subsystem(&source) => return Err(no_translation(source)),
            opened => opened?,
        };
        match socket.request(&nft::get_generation()) {
            Err(source) if lacks_subsystem(&source) => return Err(no_translation(source)),
            other => other?,
        };
        let owner = owner(key);
        change(&mut socket, &format!("translate for {key}"), |socket| {
            let mut messages = if is_whole(socket)? { Vec::new() } else { nft::layout() };
            for ipv4 in [true, false] {
                refuse_held(socket, elements, ipv4, &owner, &mut messages)?;
            }
            for (element, found) in elements.iter().zip(look_up(socket, elements)?) {
                let taken = |found: nft::Found| nft::delete_listed(&nft::set_of(element), &found);
                messages.extend(found.filter(|_| !matches!(element, Element::Port { .. })).map(taken));
                messages.push(nft::add_element(element, &owner));
            }
            Ok::<_, StepError>(messages)
        })?;
        let mut own = None;
        for (address, port, to) in elements.iter().filter_map(udp_port) {
            let own = match &own {
                Some(own) => own,
                none => {
                    debug_assert!(none.is_none());
                    let listed = self.host_socket()?.addresses()?;
                    own.insert(listed.iter().map(|a| a.address.addr()).collect::<Vec<IpAddr>>())
                }
            };
            let here = |to: IpAddr| address.map_or_else(|| to.is_loopback() || own.contains(&to), |at| at == to);
            // Of before the port was mapped: their packets would go on to where they went.
            forget_flows(&mut socket, to.is_ipv4(), port, |flow| flow.answerer != to && here(flow.destination))
                .map_err(|error| match lacks_subsystem(&error) {
                    true => StepError::NoTranslation { subsystem: "ctnetlink (CONFIG_NF_CT_NETLINK)", source: error },
                    false => error.into(),
                })?;
        }
        Ok(())
    }

    /// Removes those of the elements that are the attachment's.
    pub(super) fn untranslate(&self, elements: &[Element], key: &AttachmentKey) -> Result<(), TeardownError> {
        let Some(mut socket) = self.removal_socket()? else { return Ok(()) };
        let owner = owner(key);
        for elements in elements.chunks(DELETIONS) {
            change(&mut socket, &format!("end translating for {key}"), |socket| {
                let found = elements.iter().zip(look_up(socket, elements)?);
                let ours = found.filter_map(|(element, found)| {
                    let found = found.filter(|found| found.owner.as_ref() == Some(&owner))?;
                    Some(nft::delete_listed(&nft::set_of(element), &found))
                });
                Ok::<_, NetlinkError>(ours.collect())
            })?;
        }
        for (_, port, to) in elements.iter().filter_map(udp_port) {
            match forget_flows(&mut socket, to.is_ipv4(), port, |flow| flow.answerer == to) {
                Err(error) if lacks_subsystem(&error) => break,
                done => done?,
            }
        }
        Ok(())
    }

    /// Removes all elements that bear the attachment's mark, where no record lists them.
    pub(super) fn untranslate_by_mark(&self, key: &AttachmentKey) -> Result<(), TeardownError> {
        let owner = owner(key);
        self.remove_elements(&format!("end translating for {key}"), |found| Ok(found.owner.as_ref() == Some(&owner)))
    }

    /// Removes elements of attachments of a network that have no record, but for those that are `kept`: what a lost run
    /// directory leaves. Called by GC.
    ///
    /// # Errors
    /// Where the table or the journal cannot be read, or the elements not be deleted.
    pub fn collect_translations(
        &self,
        network: &NetworkName,
        kept: &dyn Fn(&AttachmentKey) -> bool,
    ) -> Result<(), TeardownError> {
        self.remove_elements(&format!("collect what is translated for {network}"), |found| {
            let Some(key) = found.owner.as_deref().and_then(owned_by) else { return Ok(false) };
            // Its record is written before and removed after its elements.
            Ok(key.network == *network && !kept(&key) && !self.journal.exists(key.id())?)
        })
    }

    /// Removes our table if nothing is translated for anybody. Called when a network goes away for good.
    ///
    /// # Errors
    /// Where it cannot be read or deleted.
    pub fn remove_idle_translation(&self) -> Result<(), TeardownError> {
        let Some(mut socket) = self.removal_socket()? else { return Ok(()) };
        change(&mut socket, "remove the idle table", |socket| {
            if socket.dump(&nft::rule_dump())?.iter().all(|reply| nft::rule_chain(&reply.payload).is_none()) {
                return Ok(Vec::new());
            }
            for set in nft::set_names() {
                if !list(socket, nft::TABLE, &set)?.is_empty() {
                    return Ok(Vec::new());
                }
            }
            Ok::<_, NetlinkError>(vec![nft::delete_table()])
        })?;
        Ok(())
    }

    fn remove_elements(
        &self,
        what: &str,
        mut wanted: impl FnMut(&nft::Found) -> Result<bool, JournalError>,
    ) -> Result<(), TeardownError> {
        let Some(mut socket) = self.removal_socket()? else { return Ok(()) };
        let mut full = true;
        while full {
            change(&mut socket, what, |socket| {
                let mut messages = Vec::new();
                for set in nft::set_names() {
                    for found in list(socket, nft::TABLE, &set)? {
                        if messages.len() < DELETIONS && wanted(&found)? {
                            messages.push(nft::delete_listed(&set, &found));
                        }
                    }
                }
                full = messages.len() == DELETIONS;
                Ok::<_, TeardownError>(messages)
            })?;
        }
        Ok(())
    }

    /// The settings of the host that keep an attachment's translation from working, in words. Its packets come in by `link`.
    pub(super) fn contrary_settings(&self, record: &Record, link: &IfName) -> Result<Vec<String>, NetNsError> {
        let settings = settings(record.translation(), link);
        // One that cannot be read is of a link that is gone, which is told.
        let is_off = |name: &String| proc_sys::read(name).is_ok_and(|value| value != "1");
        let off = self.run_in(&self.host.0, || settings.into_iter().filter(is_off).collect::<Vec<_>>())?;
        Ok(off.into_iter().map(|name| format!("{} is not 1", dotted(&name))).collect())
    }

    /// Whether anything is translated for an attachment.
    pub(super) fn is_translating(&self, record: &Record) -> Result<bool, TeardownError> {
        let Some(mut socket) = self.removal_socket()? else { return Ok(false) };
        let owner = owner(&record.key);
        let mut found = look_up(&mut socket, record.translation())?.into_iter().flatten();
        Ok(found.any(|found| found.owner.as_ref() == Some(&owner)))
    }

    /// What an attachment lacks of its translation, in words.
    pub(super) fn missing_translation(&self, record: &Record) -> Result<Vec<String>, NetlinkError> {
        let elements = record.translation();
        if elements.is_empty() {
            return Ok(Vec::new());
        }
        let mut socket = self
            .netfilter_socket()
            .map_err(|error| NetlinkError::new("open netlink socket", Failure::Socket(std::io::Error::other(error))))?;
        let mut missing = Vec::new();
        if !is_whole(&mut socket)? {
            missing.push(format!("rules of nftables table inet {} are gone", nft::TABLE));
        }
        let owner = owner(&record.key);
        for (element, found) in elements.iter().zip(look_up(&mut socket, elements)?) {
            match found {
                Some(found) if found.is(element) && found.owner.as_ref() == Some(&owner) => {}
                Some(_) => missing.push(format!("{element} is another's")),
                None => missing.push(format!("{element} is missing")),
            }
        }
        Ok(missing)
    }
}

impl Record {
    /// What the host translates for the attachment.
    pub(super) fn translation(&self) -> &[Element] {
        let elements = self.undo.iter().find_map(|undo| match undo {
            Undo::DeleteTranslation { elements } => Some(&elements[..]),
            _ => None,
        });
        elements.unwrap_or_default()
    }
}

fn no_translation(source: NetlinkError) -> StepError {
    StepError::NoTranslation { subsystem: "nftables (CONFIG_NF_TABLES)", source }
}

/// Refuses ports that others have. Those of others that lead to addresses of ours by now are deleted.
fn refuse_held(
    socket: &mut Socket,
    elements: &[Element],
    ipv4: bool,
    owner: &str,
    messages: &mut Vec<Message>,
) -> Result<(), StepError> {
    let ports: Vec<_> = elements
        .iter()
        .filter(|element| element.is_ipv4() == ipv4)
        .filter_map(|element| match *element {
            Element::Port { address, protocol, port, to, .. } => Some((element, address, protocol, port, to)),
            _ => None,
        })
        .collect();
    if ports.is_empty() {
        return Ok(());
    }
    let [at, everywhere] = nft::port_maps(ipv4);
    for (set, is_everywhere) in [(at, false), (everywhere, true)] {
        for found in list(socket, nft::TABLE, &set)? {
            let meets =
                |(element, address, protocol, port, _): &&(&Element, Option<IpAddr>, Transport, u16, IpAddr)| {
                    let includes = is_everywhere || address.is_none() || found.has_key_of(element);
                    found.is_same_port(*protocol, *port) && includes
                };
            let Some((_, address, protocol, port, to)) = ports.iter().find(meets) else { continue };
            if found.owner.as_deref() == Some(owner) || found.leads_to(*to) {
                messages.push(nft::delete_listed(&set, &found));
                continue;
            }
            let holder = found.owner.unwrap_or_else(|| "somebody who left no name".to_owned());
            let holder = holder.strip_prefix(MARK).map(str::to_owned).unwrap_or(holder);
            let port = HostPort { address: *address, protocol: *protocol, port: *port }.to_string();
            return Err(StepError::PortHeld { port, holder });
        }
    }
    Ok(())
}

/// The address, the port and the pod's address of a UDP port.
fn udp_port(element: &Element) -> Option<(Option<IpAddr>, u16, IpAddr)> {
    match *element {
        Element::Port { address, protocol: Transport::Udp, port, to, .. } => Some((address, port, to)),
        _ => None,
    }
}

/// Has the kernel forget UDP flows to a port.
fn forget_flows(socket: &mut Socket, ipv4: bool, port: u16, stale: impl Fn(&Flow) -> bool) -> Result<(), NetlinkError> {
    let udp = Transport::Udp.number();
    let flows = socket.dump(&conntrack::flow_dump(ipv4, udp, port))?;
    let flows = flows.iter().filter_map(|reply| Flow::parse(&reply.payload));
    for flow in flows.filter(|flow| flow.is_to(udp, port) && stale(flow)) {
        match socket.request(&conntrack::delete_flow(&flow)) {
            Err(error) if error.errno() != Some(libc::ENOENT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whether our table has all of its rules.
fn is_whole(socket: &mut Socket) -> Result<bool, NetlinkError> {
    let rules = socket.dump(&nft::rule_dump())?;
    let mut there: Vec<String> = rules.iter().filter_map(|reply| nft::rule_chain(&reply.payload)).collect();
    let mut wanted = nft::chains_of_rules();
    there.sort();
    wanted.sort_unstable();
    Ok(there == wanted)
}

/// What is there of these elements.
fn look_up(socket: &mut Socket, elements: &[Element]) -> Result<Vec<Option<nft::Found>>, NetlinkError> {
    let messages: Vec<Message> = elements.iter().map(nft::get_element).collect();
    let one = |answer: Result<Vec<crate::netlink::Reply>, NetlinkError>| match answer {
        Ok(replies) => Ok(replies.iter().flat_map(|reply| nft::Found::parse(&reply.payload)).next()),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    };
    // The kernel queues all answers to a batch before the first can be read.
    messages.chunks(32).flat_map(|chunk| socket.batch(chunk)).map(one).collect()
}

/// How many elements one transaction deletes at most: it is one datagram, and must fit the socket's buffer.
const DELETIONS: usize = 256;
