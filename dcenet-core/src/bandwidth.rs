//! How fast a pod may send and receive: `link.bandwidth` of a configuration, and the capability `bandwidth`.
//!
//! A token bucket on the host's end holds what goes to the pod. What comes from it is sent through an `ifb` device with a
//! bucket of its own, by a filter that stands behind those of policy: what policy drops takes no tokens.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::link::PlanError;
use crate::model::Mtu;

/// The limits of a pod, each of which may be absent. Directions are the pod's: ingress is what it receives.
///
/// Rates are in bits per second and bursts in bits, as in the CNI conventions; Ethernet headers count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub struct Bandwidth {
    /// What it receives.
    pub ingress: Option<Rate>,
    /// What it sends.
    pub egress: Option<Rate>,
}

/// A token bucket (tc-tbf(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    bits_per_second: NonZeroU64,
    burst_bytes: u32,
}

impl Rate {
    /// So many bits in a second, and so many at once after a pause.
    ///
    /// # Errors
    /// In words: a rate or burst that a bucket cannot have.
    pub fn new(bits_per_second: u64, burst_bits: u64) -> Result<Self, String> {
        let rate = NonZeroU64::new(bits_per_second).filter(|rate| rate.get() >= 8);
        let bits_per_second = rate.ok_or_else(|| format!("{bits_per_second} bits per second; give 8 or more"))?;
        let burst_bytes = u32::try_from(burst_bits / 8)
            .map_err(|_| format!("a burst of {burst_bits} bits; give less than {}", (u64::from(u32::MAX) + 1) * 8))?;
        Ok(Self { bits_per_second, burst_bytes })
    }

    /// Bytes in a second, rounded down.
    pub fn bytes_per_second(self) -> u64 {
        self.bits_per_second.get() / 8
    }

    /// Bytes at once.
    pub fn burst_bytes(self) -> u32 {
        self.burst_bytes
    }

    /// Bytes that may wait: those of 25 ms, as in the reference plugin, and as much of the burst as lets whole segments of
    /// TCP wait, which are of up to 64 KiB. More would only make them late.
    pub fn queue_bytes(self) -> u32 {
        let waiting = u32::try_from(self.bytes_per_second() / 40).unwrap_or(u32::MAX);
        waiting.saturating_add(self.burst_bytes.min(SEGMENTS))
    }

    fn check_burst(self, field: &'static str, mtu: Option<Mtu>) -> Result<(), PlanError> {
        let frame = mtu.map_or(DEFAULT_MTU, Mtu::get) + ETHERNET;
        if self.burst_bytes >= frame {
            return Ok(());
        }
        let reason = format!("no frame of {frame} bytes would ever pass; give at least {}", u64::from(frame) * 8);
        Err(PlanError::Invalid { field, value: (u64::from(self.burst_bytes) * 8).to_string(), reason })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bit/s with bursts of {} bytes", self.bits_per_second, self.burst_bytes)
    }
}

impl Bandwidth {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses a bucket that is too small for one frame of a device with this MTU.
    pub(crate) fn check(&self, mtu: Option<Mtu>) -> Result<(), PlanError> {
        let both = [("bandwidth.ingressBurst", self.ingress), ("bandwidth.egressBurst", self.egress)];
        both.into_iter().try_for_each(|(field, rate)| rate.map_or(Ok(()), |rate| rate.check_burst(field, mtu)))
    }
}

/// As the conventions name the keys, and as containerd's go-cni does, whose type `BandWidth` has no JSON tags.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wire {
    #[serde(default, alias = "IngressRate", skip_serializing_if = "is_zero")]
    ingress_rate: u64,
    #[serde(default, alias = "IngressBurst", skip_serializing_if = "is_zero")]
    ingress_burst: u64,
    #[serde(default, alias = "EgressRate", skip_serializing_if = "is_zero")]
    egress_rate: u64,
    #[serde(default, alias = "EgressBurst", skip_serializing_if = "is_zero")]
    egress_burst: u64,
}

impl TryFrom<Wire> for Bandwidth {
    type Error = String;

    fn try_from(wire: Wire) -> Result<Self, String> {
        let Wire { ingress_rate, ingress_burst, egress_rate, egress_burst } = wire;
        let limit = |name: &str, rate: u64, burst: u64| match (rate, burst) {
            (0, 0) => Ok(None),
            (0, _) => Err(format!("{name}Burst is {burst} without {name}Rate; give both, in bits")),
            (_, 0) => Err(format!("{name}Rate is {rate} without {name}Burst; give both, in bits")),
            _ => Rate::new(rate, burst).map(Some).map_err(|why| format!("{name}: {why}")),
        };
        Ok(Self {
            ingress: limit("ingress", ingress_rate, ingress_burst)?,
            egress: limit("egress", egress_rate, egress_burst)?,
        })
    }
}

impl From<Bandwidth> for Wire {
    fn from(bandwidth: Bandwidth) -> Self {
        let rate = |rate: Option<Rate>| rate.map_or(0, |r| r.bits_per_second.get());
        let burst = |rate: Option<Rate>| rate.map_or(0, |r| u64::from(r.burst_bytes) * 8);
        let Bandwidth { ingress, egress } = bandwidth;
        Self {
            ingress_rate: rate(ingress),
            ingress_burst: burst(ingress),
            egress_rate: rate(egress),
            egress_burst: burst(egress),
        }
    }
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Two segments of TCP at their largest.
const SEGMENTS: u32 = 128 << 10;
/// Of a device for which none is said.
const DEFAULT_MTU: u32 = 1500;
/// An Ethernet header, which a device's bucket counts and its MTU does not.
const ETHERNET: u32 = 14;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> Result<Bandwidth, String> {
        crate::section::read::<Bandwidth>("link.bandwidth", &value).map_err(|e| e.to_string())
    }

    #[test]
    fn limits_are_read_as_the_conventions_and_containerd_write_them() {
        let expected = Bandwidth { ingress: Some(Rate::new(1_000_000, 160_000).unwrap()), egress: None };
        let conventions = json!({ "ingressRate": 1_000_000, "ingressBurst": 160_000, "egressRate": 0 });
        assert_eq!(read(conventions).unwrap(), expected);
        // The bytes of `json.Marshal` for go-cni's `BandWidth`.
        let theirs = json!({ "IngressRate": 1_000_000, "IngressBurst": 160_000, "EgressRate": 0, "EgressBurst": 0 });
        assert_eq!(read(theirs).unwrap(), expected);
        assert!(read(json!({})).unwrap().is_none());
        let written = serde_json::to_value(expected).unwrap();
        assert_eq!(written, json!({ "ingressRate": 1_000_000, "ingressBurst": 160_000 }));
        assert_eq!(read(written).unwrap(), expected);
        let rate = expected.ingress.unwrap();
        assert_eq!((rate.bytes_per_second(), rate.burst_bytes(), rate.queue_bytes()), (125_000, 20_000, 23_125));
    }

    #[test]
    fn half_a_limit_is_refused() {
        for (value, words) in [
            (json!({ "ingressRate": 1000 }), ["link.bandwidth", "ingressRate is 1000 without ingressBurst"]),
            (json!({ "egressBurst": 1000 }), ["link.bandwidth", "egressBurst is 1000 without egressRate"]),
            (json!({ "egressRate": 7, "egressBurst": 80_000 }), ["egress: 7 bits", "8 or more"]),
            (json!({ "egressRate": 800, "egressBurst": 1u64 << 35 }), ["egress: a burst of", "less than 34359738368"]),
            (json!({ "ingresRate": 800 }), ["link.bandwidth.ingresRate", "did you mean `ingressRate`?"]),
        ] {
            let error = read(value).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let small = Bandwidth { ingress: None, egress: Some(Rate::new(1_000_000, 12_111).unwrap()) };
        let error = small.check(None).unwrap_err().to_string();
        assert!(error.contains("bandwidth.egressBurst") && error.contains("at least 12112"), "{error}");
        small.check(Some(Mtu::try_from(1400).unwrap())).unwrap();
        // What containerd asks for where a pod's annotation names a rate alone.
        read(json!({ "IngressRate": 1_000_000, "IngressBurst": u32::MAX })).unwrap();
    }
}
