//! Frames and judgement, without a network; and signals.

use std::net::IpAddr;

use proptest::prelude::*;

use super::frame::{self, parse};
use super::judge::Judge;
use super::*;
use crate::model::MacAddr;

const NONCE: frame::Nonce = [1, 2, 3, 4, 5, 6];

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// As hexadecimal digits, with spaces anywhere.
fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

fn judge(frame: &[u8]) -> Option<Conflict> {
    let addresses = [ip("192.0.2.7"), ip("2001:db8::7")];
    Judge { mac: mac(7), addresses: &addresses, nonce: NONCE }.judge(frame)
}

/// Written by hand after RFC 826 and RFC 4861.
#[test]
fn frames_are_what_the_standards_say() {
    assert_eq!(
        frame::arp_request(mac(7), [0, 0, 0, 0].into(), [192, 0, 2, 7].into()),
        bytes("ffffffffffff 020000000007 0806 0001 0800 06 04 0001 020000000007 00000000 000000000000 c0000207")
    );
    let probe = frame::duplicate_detection(mac(7), "2001:db8::7".parse().unwrap(), NONCE);
    assert_eq!(probe.len(), 14 + 40 + 24 + 8);
    let (header, message) = (&probe[14..54], &probe[54..]);
    assert_eq!(probe[..14], bytes("3333ff000007 020000000007 86dd"));
    assert_eq!(header, bytes("60000000 0020 3a ff 00000000000000000000000000000000 ff0200000000000000000001ff000007"));
    assert_eq!(message[..2], [135, 0]);
    assert_eq!(message[4..], bytes("00000000 20010db8000000000000000000000007 0e01 010203040506"));
    let told = frame::advertisement(mac(7), "2001:db8::7".parse().unwrap());
    assert_eq!(told[..14], bytes("333300000001 020000000007 86dd"));
    assert_eq!(told[14 + 24..54], bytes("ff020000000000000000000000000001"));
    assert_eq!(told[54..56], [136, 0]);
    assert_eq!(told[58..], bytes("20000000 20010db8000000000000000000000007 0201 020000000007"));
}

#[test]
fn an_icmpv6_checksum_is_the_one_that_is_known() {
    // A neighbour solicitation that Linux 6.18 sent for fd20::9, from fe80::ff:fe00:1.
    let frame = bytes(
        "3333ff000009 020000000001 86dd 60000000 0020 3a ff fe80000000000000000000fffe000001 \
         ff0200000000000000000001ff000009 8700 7ce9 00000000 fd200000000000000000000000000009 0101 020000000001",
    );
    let own = frame::solicitation(mac(1), "fe80::ff:fe00:1".parse().unwrap(), "fd20::9".parse().unwrap());
    assert_eq!(own, frame);
}

#[test]
fn whoever_speaks_as_the_address_or_is_about_to_take_it_is_a_conflict() {
    let used = |address| Some(Conflict { address, holder: mac(9), evidence: Evidence::Used });
    let probed = |address| Some(Conflict { address, holder: mac(9), evidence: Evidence::Probed });
    let (four, six) = ("192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap());
    let (none, other) = ([0; 4].into(), [192, 0, 2, 99].into());
    assert_eq!(judge(&frame::arp_request(mac(9), four, four)), used(four.into()), "an announcement");
    assert_eq!(judge(&frame::arp_request(mac(9), four, other)), used(four.into()), "it asks for another");
    let mut reply = frame::arp_request(mac(9), four, none);
    reply[21] = 2;
    assert_eq!(judge(&reply), used(four.into()), "it answers");
    assert_eq!(judge(&frame::arp_request(mac(9), none, four)), probed(four.into()), "it probes");
    assert_eq!(judge(&frame::advertisement(mac(9), six)), used(six.into()));
    assert_eq!(judge(&frame::duplicate_detection(mac(9), six, [9; 6])), probed(six.into()));
}

#[test]
fn what_is_ours_or_nobodys_is_none() {
    let (four, six) = ("192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap());
    let (none, other) = ([0; 4].into(), [192, 0, 2, 99].into());
    let mut reply = frame::arp_request(mac(9), none, four);
    reply[21] = 2;
    let mut solicited = frame::advertisement(mac(9), six);
    // Solicited and to a group: not valid, were the checksum right too.
    solicited[58] |= 0x40;
    solicited[56] = solicited[56].wrapping_sub(0x40);
    let mut corrupt = frame::advertisement(mac(9), six);
    corrupt[60] ^= 1;
    let mut routed = frame::advertisement(mac(9), six);
    routed[21] = 64;
    for (frame, what) in [
        (frame::arp_request(mac(7), four, four), "announced by who has our Ethernet address: it migrates"),
        (frame::arp_request(mac(7), none, four), "our probe, looped back"),
        (frame::advertisement(mac(7), six), "announced by who has our Ethernet address"),
        (frame::duplicate_detection(mac(7), six, [9; 6]), "probed by who has our Ethernet address"),
        (frame::duplicate_detection(mac(9), six, NONCE), "our probe, looped back under another Ethernet address"),
        (frame::arp_request(mac(9), other, four), "somebody looks for it"),
        (frame::solicitation(mac(9), "2001:db8::9".parse().unwrap(), six), "somebody looks for it"),
        (frame::arp_request(mac(9), other, other), "about another"),
        (frame::arp_request(mac(9), none, other), "about another"),
        (frame::advertisement(mac(9), "2001:db8::9".parse().unwrap()), "about another"),
        (reply, "a reply from nobody"),
        (solicited, "not valid"),
        (corrupt, "corrupt"),
        (routed, "from elsewhere"),
    ] {
        assert_eq!(judge(&frame), None, "{what}");
    }
}

#[test]
fn an_advertisement_names_its_sender_in_the_message() {
    // As a proxy or a redundancy group sends it: the frame is from another Ethernet address than the one it tells.
    let mut frame = frame::advertisement(mac(9), "2001:db8::7".parse().unwrap());
    frame[6..12].copy_from_slice(&mac(8).bytes());
    assert_eq!(judge(&frame).unwrap().holder, mac(9));
    // Without the option, who sent the frame.
    let message = &frame[54..78];
    let mut bare = frame[..54].to_vec();
    bare[18..20].copy_from_slice(&24u16.to_be_bytes());
    bare.extend(message);
    // The sum without option and with a shorter length, from the one with them.
    let option: u32 = [0x0201u32, 0x0200, 0, 9].iter().sum();
    let mut sum = u32::from(u16::from_be_bytes([bare[56], bare[57]])) + option + 8;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    bare[56..58].copy_from_slice(&(sum as u16).to_be_bytes());
    assert_eq!(judge(&bare).unwrap().holder, mac(8));
}

#[test]
fn the_section_is_read_strictly_and_written_as_read() {
    let read = |text: &str| serde_json::from_str::<Underlay>(text);
    assert_eq!(read("{}").unwrap(), Underlay::default());
    let text = r#"{"probes":0,"within":"2s","replacements":1,"announcements":5,"gatewayProbe":"fail"}"#;
    let some = read(text).unwrap();
    assert_eq!(serde_json::to_string(&some).unwrap(), text);
    assert_eq!(some.conflict_probe(), None);
    assert_eq!(some.gateway_timing(), Timing { probes: 1, within: std::time::Duration::from_secs(2) });
    for (bad, said) in [
        (r#"{"probe":1}"#, "unknown field `probe`"),
        (r#"{"probes":11}"#, "11 is too many; give at most 10"),
        (r#"{"probes":-1}"#, "invalid value"),
        (r#"{"within":"75"}"#, "time \"75\": want a whole number and a unit"),
        (r#"{"within":"4ms"}"#, "not between 5ms and 10s"),
        (r#"{"within":"99999999999999999999s"}"#, "want a whole number"),
        (r#"{"within":75}"#, "invalid type"),
        (r#"{"gatewayProbe":"ask"}"#, "unknown variant `ask`"),
    ] {
        let error = read(bad).unwrap_err().to_string();
        assert!(error.contains(said), "{bad}: {error}");
    }
}

proptest! {
    #[test]
    fn what_is_no_frame_is_nothing(mut frame in prop::collection::vec(any::<u8>(), 0..120), kind in 0..3) {
        if let (Some(place), Some(kind)) = (frame.get_mut(12..14), [frame::ARP, frame::IPV6].get(kind as usize)) {
            place.copy_from_slice(&kind.to_be_bytes());
        }
        parse(&frame);
    }

    /// A bit that flips anywhere in a neighbour's message is found by its checksum, or lies outside of it.
    #[test]
    fn a_flipped_bit_makes_nobody_a_holder(at in 54 * 8..86 * 8usize) {
        let mut frame = frame::advertisement(mac(9), "2001:db8::7".parse().unwrap());
        prop_assert!(parse(&frame).is_some());
        frame[at / 8] ^= 1 << (at % 8);
        prop_assert_eq!(parse(&frame), None);
    }
}
