//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use super::{ParseError, serde_by_text};

/// A 48-bit Ethernet address, printed as six lower-case hexadecimal pairs with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Wraps the six bytes in wire order.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The six bytes in wire order.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether a device may carry it: neither multicast nor all zero (`is_valid_ether_addr` in the kernel's
    /// `include/linux/etherdevice.h`).
    pub const fn is_device_address(self) -> bool {
        self.0[0] & 1 == 0 && !matches!(self.0, [0, 0, 0, 0, 0, 0])
    }

    /// Reads an address that a device is to bear.
    ///
    /// # Errors
    /// As [`MacAddr::from_str`], and for what [`MacAddr::is_device_address`] denies.
    pub fn for_device(text: &str) -> Result<Self, ParseError> {
        let mac: Self = text.parse()?;
        if mac.is_device_address() {
            Ok(mac)
        } else {
            Err(ParseError::new("MAC address", text, "multicast or zero, which no device may bear; give a unicast one"))
        }
    }

    /// Turns 48 given bits into a locally administered unicast address (IEEE 802, second and lowest bit of the first byte).
    pub const fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Self(bytes)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let refuse = || ParseError::new("MAC address", s, "not six hexadecimal pairs joined by ':'");
        let mut bytes = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(refuse)?, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() { Err(refuse()) } else { Ok(Self(bytes)) }
    }
}

serde_by_text!(MacAddr);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let mac: MacAddr = "02:0A:ff:00:12:34".parse().unwrap();
        assert_eq!(mac.to_string(), "02:0a:ff:00:12:34");
        for bad in ["", "02:0a", "02:0a:ff:00:12:34:56", "02:0a:ff:00:12:3", "+2:0a:ff:00:12:34", "020aff001234"] {
            bad.parse::<MacAddr>().unwrap_err();
        }
    }

    #[test]
    fn local_addresses_are_unicast_and_locally_administered() {
        let mac = MacAddr::local([0xff; 6]);
        assert_eq!(mac.bytes()[0] & 3, 2);
        assert!(mac.is_device_address());
        assert!(!MacAddr::new([0; 6]).is_device_address());
        assert!(!MacAddr::new([1, 0, 0, 0, 0, 1]).is_device_address());
    }
}
