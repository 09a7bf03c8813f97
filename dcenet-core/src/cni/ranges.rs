//! The capability `ipRanges` (CNI conventions): what addresses a runtime wants a pod to get, as pools of the call.
//!
//! An attachment gets an address of each list, from the first of its ranges that has a free one. They take the place of
//! `ipam.pools`: a runtime that names ranges has planned them. An attachment gets one address of a subnet, so that two lists
//! cannot have ranges of the same. Releasing needs none of them, for a lease is found by its attachment.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::CniError;
use crate::section::{self, SectionError};

/// As the conventions name the keys, and as containerd's go-cni does, whose type `IPRanges` has no JSON tags.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Range {
    #[serde(alias = "Subnet")]
    subnet: IpNet,
    #[serde(default, alias = "RangeStart")]
    range_start: Option<String>,
    #[serde(default, alias = "RangeEnd")]
    range_end: Option<String>,
    #[serde(default, alias = "Gateway")]
    gateway: Option<String>,
}

/// Puts the ranges into the section `ipam`. `value` asks for something.
///
/// # Errors
/// Code 7, with the path of the wrong field.
pub(super) fn put(value: &Value, keys: &mut Map<String, Value>) -> Result<(), CniError> {
    let lists: Vec<Vec<Range>> = section::read(FIELD, value)?;
    let ipam = match keys.get_mut("ipam") {
        Some(Value::Object(ipam)) => ipam,
        _ => {
            return Err(wrong(
                FIELD.to_owned(),
                "cannot be had without a section ipam; add one, or drop it".to_owned(),
            ));
        }
    };
    let mut pools: Vec<Value> = Vec::new();
    let mut families: Vec<bool> = Vec::new();
    for (i, list) in lists.iter().enumerate().filter(|(_, list)| !list.is_empty()) {
        let family = list[0].subnet.addr().is_ipv4();
        // The first of a family is for everybody; only a group gives an address beside it.
        let group = families.contains(&family).then(|| format!("ranges-{i}"));
        families.push(family);
        let from = pools.len();
        for (j, range) in list.iter().enumerate() {
            let path = format!("{FIELD}[{i}][{j}]");
            if range.subnet.addr().is_ipv4() != family {
                let reason =
                    "is of another family than the list's first; an address is of one, so give it a list of its own";
                return Err(wrong(format!("{path}.subnet"), reason.to_owned()));
            }
            add(range, &path, group.as_deref(), &mut pools, from)?;
        }
    }
    ipam.insert("pools".to_owned(), Value::Array(pools));
    Ok(())
}

/// Adds a range to the list's pool of its subnet, or makes that.
fn add(range: &Range, path: &str, group: Option<&str>, pools: &mut Vec<Value>, from: usize) -> Result<(), CniError> {
    let subnet = range.subnet.trunc();
    let address = |key: &str, text: &Option<String>| -> Result<Option<IpAddr>, CniError> {
        let Some(text) = text.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        let found = text.parse().ok().filter(|ip| subnet.contains(ip));
        let reason = || format!("{text:?} is no address in {subnet}; give one, or drop the key");
        found.map(Some).ok_or_else(|| wrong(format!("{path}.{key}"), reason()))
    };
    let first = address("rangeStart", &range.range_start)?.unwrap_or(subnet.network());
    let last = address("rangeEnd", &range.range_end)?.unwrap_or(subnet.broadcast());
    if first > last {
        let reason = format!("{last} is before rangeStart {first}; exchange the two");
        return Err(wrong(format!("{path}.rangeEnd"), reason));
    }
    let gateway = address("gateway", &range.gateway)?;
    if pools[..from].iter().any(|pool| pool["subnet"] == json!(subnet)) {
        let reason = format!(
            "{subnet} is in a list before it, and an attachment gets one address of a subnet; put its ranges into one list"
        );
        return Err(wrong(format!("{path}.subnet"), reason));
    }
    let of_subnet = pools[from..].iter_mut().find(|pool| pool["subnet"] == json!(subnet));
    let pool = match of_subnet {
        Some(pool) => pool,
        None => {
            let name = format!("{POOL}{subnet}").replace([':', '/'], "-");
            let mut pool = json!({ "name": name, "subnet": subnet, "ranges": [] });
            if let Some(group) = group {
                pool["group"] = json!(group);
            }
            pools.push(pool);
            pools.last_mut().expect("one was just put there")
        }
    };
    if let Some(gateway) = gateway {
        if pool.get("gateway").is_some_and(|other| *other != json!(gateway)) {
            let reason = format!("{gateway} is another than that of a range before it in {subnet}; a subnet has one");
            return Err(wrong(format!("{path}.gateway"), reason));
        }
        pool["gateway"] = json!(gateway);
    }
    if let Some(ranges) = pool["ranges"].as_array_mut() {
        ranges.push(json!(format!("{first}-{last}")));
    }
    Ok(())
}

fn wrong(field: String, reason: String) -> CniError {
    SectionError { field, reason }.into()
}

const FIELD: &str = "runtimeConfig.ipRanges";
/// Begins the names of the pools. The rest is the subnet, so that all calls with a range mean one pool.
const POOL: &str = "ranges-";

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(value: Value) -> Result<Value, String> {
        let mut keys = Map::from_iter([("ipam".to_owned(), json!({ "pools": [{ "name": "own" }], "routes": [] }))]);
        put(&value, &mut keys).map_err(|error| error.message)?;
        assert_eq!(keys["ipam"]["routes"], json!([]));
        Ok(keys["ipam"]["pools"].take())
    }

    #[test]
    fn each_list_is_an_address_and_ranges_of_a_subnet_are_one_pool() {
        let asked = json!([
            [
                { "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.20", "gateway": "10.1.2.1" },
                { "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.40", "rangeEnd": "10.1.2.60" },
                { "subnet": "10.1.3.0/24" },
            ],
            [{ "subnet": "2001:db8::/64" }],
            [],
            [{ "subnet": "10.9.0.0/16" }],
        ]);
        let expected = json!([
            { "name": "ranges-10.1.2.0-24", "subnet": "10.1.2.0/24", "gateway": "10.1.2.1",
              "ranges": ["10.1.2.9-10.1.2.20", "10.1.2.40-10.1.2.60"] },
            { "name": "ranges-10.1.3.0-24", "subnet": "10.1.3.0/24", "ranges": ["10.1.3.0-10.1.3.255"] },
            { "name": "ranges-2001-db8---64", "subnet": "2001:db8::/64",
              "ranges": ["2001:db8::-2001:db8::ffff:ffff:ffff:ffff"] },
            { "name": "ranges-10.9.0.0-16", "subnet": "10.9.0.0/16", "ranges": ["10.9.0.0-10.9.255.255"], "group": "ranges-3" },
        ]);
        assert_eq!(pools(asked).unwrap(), expected);
        // The bytes of `json.Marshal` for go-cni's `IPRanges`.
        let theirs = json!([[{ "Subnet": "10.1.3.0/24", "RangeStart": "", "RangeEnd": "10.1.3.9", "Gateway": "" }]]);
        assert_eq!(pools(theirs).unwrap()[0]["ranges"], json!(["10.1.3.0-10.1.3.9"]));
    }

    #[test]
    fn wrong_ranges_are_told_by_their_path() {
        for (value, words) in [
            (json!([{ "subnet": "10.1.2.0/24" }]), "runtimeConfig.ipRanges[0]: "),
            (json!([[{ "subnet": "10.1.2.0" }]]), "runtimeConfig.ipRanges[0][0].subnet: "),
            (json!([[{ "subnet": "10.1.2.0/24", "rangeStrat": "" }]]), "did you mean `rangeStart`?"),
            (json!([[{ "subnet": "10.1.2.0/24", "rangeStart": "10.1.3.1" }]]), "[0][0].rangeStart: \"10.1.3.1\" is no"),
            (
                json!([[{ "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.8" }]]),
                "[0][0].rangeEnd: 10.1.2.8 is before",
            ),
            (json!([[{ "subnet": "10.1.2.0/24", "gateway": "x" }]]), "[0][0].gateway: "),
            (
                json!([[{ "subnet": "10.1.2.0/24" }, { "subnet": "2001:db8::/64" }]]),
                "[0][1].subnet: is of another family",
            ),
            (
                json!([
                    [{ "subnet": "10.1.2.0/24", "rangeEnd": "10.1.2.19" }],
                    [{ "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.20" }],
                ]),
                "[1][0].subnet: 10.1.2.0/24 is in a list before it",
            ),
        ] {
            let error = pools(value).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let error = put(&json!([[{ "subnet": "10.1.2.0/24" }]]), &mut Map::new()).unwrap_err();
        assert!(error.message.contains("section ipam"), "{error}");
    }
}
