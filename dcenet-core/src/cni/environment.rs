//! What the runtime says in the environment (CNI 1.1.0, section 2, "Parameters").

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::{CniError, ErrorCode};
use crate::model::{ContainerId, IfName, MacAddr, ParseError, Workload};

/// What the runtime wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Connect a container.
    Add,
    /// Verify a connection.
    Check,
    /// Remove a connection; repeated at will.
    Del,
    /// Remove every connection that is not in a list.
    Gc,
    /// Tell whether ADD could succeed.
    Status,
    /// Tell the versions of the specification that are served.
    Version,
}

impl Verb {
    /// The verb as in `CNI_COMMAND`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Verb {
    type Err = CniError;

    fn from_str(s: &str) -> Result<Self, CniError> {
        Ok(match s {
            "ADD" => Self::Add,
            "CHECK" => Self::Check,
            "DEL" => Self::Del,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            _ => {
                return Err(environment(format!(
                    "CNI_COMMAND {s:?} is none of ADD, CHECK, DEL, GC, STATUS and VERSION"
                )));
            }
        })
    }
}

/// The environment of one call, checked as far as its verb needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// `CNI_COMMAND`.
    pub verb: Verb,
    /// `CNI_CONTAINERID`; there for ADD, CHECK and DEL.
    pub container: Option<ContainerId>,
    /// `CNI_NETNS` exactly as given: results repeat it. There for ADD and CHECK, perhaps for DEL.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`; there for ADD, CHECK and DEL.
    pub ifname: Option<IfName>,
    /// `CNI_ARGS`.
    pub args: CniArgs,
    /// `CNI_PATH`: where the plugins of others are.
    pub path: OsString,
    /// `CNI_NETNS_OVERRIDE`: the caller's own namespace may be given as the container's.
    pub netns_override: bool,
    /// `TRACEPARENT`: of which request the call is a part.
    pub trace: Option<TraceParent>,
}

/// The request that a call is a part of, as its sender names it (W3C Trace Context, section 3.2: `VERSION-TRACE-PARENT-FLAGS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceParent(String);

impl TraceParent {
    /// `None` where the text is none: it must then be as if nothing had been said (section 3.2.2).
    fn of(text: &str) -> Option<Self> {
        let hexadecimal = |part: &str, length| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let mut parts = text.split('-');
        let [version, trace, parent, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let known = [(version, 2), (trace, 32), (parent, 16), (flags, 2)].iter().all(|(p, n)| hexadecimal(p, *n));
        // Later versions may say more behind it.
        let whole = if version == "00" { parts.next().is_none() } else { version != "ff" };
        let zero = |part: &str| part.bytes().all(|b| b == b'0');
        (known && whole && !zero(trace) && !zero(parent)).then(|| Self(text.to_owned()))
    }

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Invocation {
    /// Reads the variables through `get`, so that no test changes the process's environment.
    ///
    /// # Errors
    /// Code 4 with the variable and its value.
    pub fn from_env(get: impl Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let text = |name: &'static str| match get(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) if value.is_empty() => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(value)) => Err(environment(format!("{name} {value:?} is not UTF-8"))),
        };
        let verb: Verb = text("CNI_COMMAND")?
            .ok_or_else(|| environment("CNI_COMMAND is not set; this program is run by a container runtime".into()))?
            .parse()?;

        let path = get("CNI_PATH").unwrap_or_default();
        let trace = get("TRACEPARENT").and_then(|text| TraceParent::of(text.to_str()?));
        let per_container = matches!(verb, Verb::Add | Verb::Check | Verb::Del);
        if !per_container {
            // Runtimes fill the rest with placeholders here, which are not worth an error.
            return Ok(Self {
                verb,
                container: None,
                netns: None,
                ifname: None,
                args: CniArgs::default(),
                path,
                netns_override: false,
                trace,
            });
        }
        let required = |name: &'static str| {
            text(name)?.ok_or_else(|| environment(format!("{name} is not set; {verb:?} needs it")))
        };
        let container = required("CNI_CONTAINERID")?.parse().map_err(variable("CNI_CONTAINERID"))?;
        let ifname = required("CNI_IFNAME")?.parse().map_err(variable("CNI_IFNAME"))?;
        let netns = get("CNI_NETNS").filter(|v| !v.is_empty()).map(PathBuf::from);
        if netns.is_none() && verb != Verb::Del {
            return Err(environment(format!("CNI_NETNS is not set; {verb:?} needs it")));
        }
        Ok(Self {
            verb,
            container: Some(container),
            netns,
            ifname: Some(ifname),
            args: match (CniArgs::parse(&text("CNI_ARGS")?.unwrap_or_default()), verb) {
                // What DEL removes is known without them.
                (Err(_), Verb::Del) => CniArgs::default(),
                (args, _) => args?,
            },
            path,
            netns_override: text("CNI_NETNS_OVERRIDE")?.is_some_and(|v| is_true(&v)),
            trace,
        })
    }
}

/// `CNI_ARGS`: pairs `KEY=VALUE` joined by `;`, in any order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs {
    /// `K8S_POD_NAMESPACE` and `K8S_POD_NAME`: the pod's stable name.
    pub workload: Option<Workload>,
    /// `K8S_POD_UID`: which of the pods that bore the name.
    pub pod_uid: Option<String>,
    /// `MAC`: wanted hardware address.
    pub mac: Option<MacAddr>,
    /// `IP`: wanted addresses, joined by `,`.
    pub addresses: Vec<IpAddr>,
    /// `POOLS`: wanted pools, joined by `,`. A key of ours.
    pub pools: Vec<String>,
    /// All of it as it was given, for the plugins of others.
    pub text: String,
}

impl CniArgs {
    /// Reads the variable's value.
    ///
    /// # Errors
    /// Code 4 for a part without `=`, a value that cannot be read, and for an unknown key unless `IgnoreUnknown` is
    /// set anywhere (CNI convention, `CONVENTIONS.md`, "CNI_ARGS").
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let mut args = Self { text: text.to_owned(), ..Self::default() };
        let (mut namespace, mut name) = (None, None);
        let mut unknown = None;
        let mut ignore_unknown = false;
        for pair in text.split(';').filter(|p| !p.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| environment(format!("CNI_ARGS: {pair:?} is not of the form KEY=VALUE")))?;
            match key {
                "IgnoreUnknown" => ignore_unknown = is_true(value),
                "K8S_POD_NAMESPACE" => namespace = Some(value),
                "K8S_POD_NAME" => name = Some(value),
                "K8S_POD_UID" => args.pod_uid = Some(value.to_owned()),
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                "MAC" => args.mac = Some(MacAddr::for_device(value).map_err(variable("CNI_ARGS MAC"))?),
                "IP" => args.addresses = value.split(',').map(address).collect::<Result<_, _>>()?,
                "POOLS" => args.pools = value.split(',').map(pool).collect::<Result<_, _>>()?,
                other => unknown = unknown.or(Some(other)),
            }
        }
        if let (Some(key), false) = (unknown, ignore_unknown) {
            return Err(environment(format!("CNI_ARGS: unknown key {key:?}; remove it or add IgnoreUnknown=1")));
        }
        // podman sends a name without a namespace: no stable identity.
        if let (Some(namespace), Some(name)) = (namespace, name) {
            args.workload = Some(Workload::new(namespace, name).map_err(variable("CNI_ARGS"))?);
        }
        Ok(args)
    }
}

/// An address, where a prefix length is tolerated and ignored: runtimes differ.
fn address(text: &str) -> Result<IpAddr, CniError> {
    let bare = text.split_once('/').map_or(text, |(a, _)| a);
    bare.parse().map_err(|_| environment(format!("CNI_ARGS IP: {text:?} is no IP address; write one, as 10.0.0.7")))
}

fn pool(text: &str) -> Result<String, CniError> {
    if text.is_empty() {
        return Err(environment(format!(
            "CNI_ARGS POOLS: {text:?} names no pool; write a name or a pattern, or drop it"
        )));
    }
    Ok(text.to_owned())
}

fn is_true(value: &str) -> bool {
    matches!(value, "1" | "true" | "TRUE" | "True")
}

fn environment(message: String) -> CniError {
    CniError::new(ErrorCode::InvalidEnvironment, message)
}

fn variable(name: &'static str) -> impl Fn(ParseError) -> CniError {
    move |error| environment(format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn invoke(pairs: &[(&str, &str)]) -> Result<Invocation, CniError> {
        let map: HashMap<_, _> = pairs.iter().copied().collect();
        Invocation::from_env(|name| map.get(name).map(OsString::from))
    }

    const ADD: [(&str, &str); 4] =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/p")];

    fn add_with(extra: &[(&'static str, &'static str)]) -> Result<Invocation, CniError> {
        invoke(&[&ADD, extra].concat())
    }

    #[test]
    fn each_verb_asks_for_what_it_needs_only() {
        assert_eq!(add_with(&[]).unwrap().verb, Verb::Add);
        for missing in 1..4 {
            let mut pairs = ADD.to_vec();
            let (name, _) = pairs.remove(missing);
            let error = invoke(&pairs).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidEnvironment);
            assert!(error.message.contains(name), "{error}");
        }
        let del = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
        assert_eq!(invoke(&del).unwrap().netns, None);
        // containerd and podman fill VERSION's parameters with placeholders and an empty container id.
        let version =
            [("CNI_COMMAND", "VERSION"), ("CNI_CONTAINERID", ""), ("CNI_IFNAME", "dummy/"), ("CNI_ARGS", "?")];
        assert_eq!(invoke(&version).unwrap().verb, Verb::Version);
        for verb in ["GC", "STATUS"] {
            invoke(&[("CNI_COMMAND", verb)]).unwrap();
        }
        for bad in ["", "add", "REMOVE"] {
            assert_eq!(invoke(&[("CNI_COMMAND", bad)]).unwrap_err().code, ErrorCode::InvalidEnvironment);
        }
    }

    #[test]
    fn bad_values_are_named() {
        for (name, value) in
            [("CNI_IFNAME", "sixteen-bytes-xx"), ("CNI_IFNAME", "a/b"), ("CNI_CONTAINERID", "../x"), ("CNI_ARGS", "X")]
        {
            let error = add_with(&[(name, value)]).unwrap_err();
            assert_eq!(error.code.number(), 4);
            assert!(error.message.contains(name) && error.message.contains(value), "{error}");
        }
    }

    #[test]
    fn a_trace_is_taken_as_it_is_or_not_at_all() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        for (text, taken) in [
            (format!("00-{trace}-{parent}-01"), true),
            (format!("cc-{trace}-{parent}-01-later"), true),
            (format!("00-{trace}-{parent}-01-later"), false),
            (format!("ff-{trace}-{parent}-01"), false),
            (format!("00-{}-{parent}-01", trace.to_uppercase()), false),
            (format!("00-{trace}-{parent}"), false),
            (format!("00-{}-{parent}-01", "0".repeat(32)), false),
            (format!("00-{trace}-{}-01", "0".repeat(16)), false),
            (String::new(), false),
        ] {
            let found = Invocation::from_env(|name| match name {
                "CNI_COMMAND" => Some("STATUS".into()),
                "TRACEPARENT" => Some(text.clone().into()),
                _ => None,
            });
            let found = found.unwrap().trace;
            assert_eq!(found.as_ref().map(TraceParent::as_str), taken.then_some(text.as_str()));
        }
    }

    #[test]
    fn args_are_read_in_any_order_and_unknown_keys_need_leave() {
        let args = CniArgs::parse("K8S_POD_NAME=db;FOO=1;IP=10.0.0.1/24,2001:db8::1;K8S_POD_NAMESPACE=shop;IgnoreUnknown=1;MAC=02:00:00:00:00:01").unwrap();
        assert_eq!(args.workload.unwrap().to_string(), "shop/db");
        assert_eq!(args.addresses.len(), 2);
        assert_eq!(args.mac.unwrap().to_string(), "02:00:00:00:00:01");
        let error = CniArgs::parse("FOO=1;K8S_POD_NAME=db").unwrap_err();
        assert!(error.message.contains("FOO"), "{error}");
        assert!(CniArgs::parse("IgnoreUnknown=1;K8S_POD_NAME=c").unwrap().workload.is_none());
        CniArgs::parse("IP=10.0.0").unwrap_err();
        assert_eq!(CniArgs::parse("POOLS=db,web*").unwrap().pools, ["db", "web*"]);
        let error = CniArgs::parse("POOLS=db,").unwrap_err();
        assert!(error.message.starts_with("CNI_ARGS POOLS: \"\""), "{error}");
        let error = CniArgs::parse("MAC=ff:ff:ff:ff:ff:ff").unwrap_err();
        assert!(error.message.contains("CNI_ARGS MAC") && error.message.contains("ff:ff"), "{error}");
        assert_eq!(CniArgs::parse("").unwrap(), CniArgs::default());
    }
}
