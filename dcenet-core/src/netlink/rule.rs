//! Policy routing rules: `struct fib_rule_hdr` (`include/uapi/linux/fib_rules.h`).

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::message::Message;
use super::{PROTOCOL, family_of, octets};

/// A rule by which packets from some sources are routed by a table of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// The sources.
    pub from: IpNet,
    /// The table.
    pub table: u32,
    /// Its place: the lowest is asked first.
    pub priority: u32,
}

/// Adds a rule marked as ours (Linux 4.17: `FRA_PROTOCOL`). Fails with EEXIST where there is the same.
pub(crate) fn add_rule(rule: &RuleSpec) -> Message {
    let what = format!("add rule from {} to table {}", rule.from, rule.table);
    message(libc::RTM_NEWRULE, (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16, what, FR_ACT_TO_TBL, rule)
}

/// Deletes a rule of ours.
pub(crate) fn delete_rule(rule: &RuleSpec) -> Message {
    let what = format!("delete rule from {} to table {}", rule.from, rule.table);
    message(libc::RTM_DELRULE, 0, what, FR_ACT_UNSPEC, rule)
}

fn message(kind: u16, flags: u16, operation: String, action: u8, rule: &RuleSpec) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(rule.from.addr());
    header[2] = rule.from.prefix_len();
    header[7] = action;
    let mut message = Message::new(kind, flags, operation, &header);
    message.bytes(FRA_SRC, &octets(rule.from.network()));
    message.u32(FRA_TABLE, rule.table).u32(FRA_PRIORITY, rule.priority).u8(FRA_PROTOCOL, PROTOCOL);
    message
}

/// `sizeof(struct fib_rule_hdr)`.
const HEADER: usize = 12;
const FR_ACT_UNSPEC: u8 = 0;
const FR_ACT_TO_TBL: u8 = 1;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
