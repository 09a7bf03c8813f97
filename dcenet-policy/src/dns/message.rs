//! What is read of messages, and the answers that are the proxy's own.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::ProtoError;
use hickory_proto::op::{Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::model::DomainName;

/// The question of a query.
#[derive(Debug, Clone)]
pub(super) struct Question {
    query: Query,
}

/// What a client hears instead of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// Its query cannot be read.
    Format,
    /// It asks for something that is no query for a name.
    Unknown,
    /// There is no answer, or none that may be released.
    Server,
}

/// What an answer tells of a name.
pub(super) struct Found {
    pub(super) addresses: Vec<(IpAddr, Duration)>,
    /// The answer with shorter times to live, where one was too long.
    pub(super) shortened: Option<Vec<u8>>,
}

impl Question {
    /// Reads a query; the error is what to answer, if anything.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Option<Failure>> {
        let Some(head) = Head::read(bytes) else {
            return Err((bytes.len() >= HEADER && !is_response(bytes)).then_some(Failure::Format));
        };
        if head.metadata.message_type != MessageType::Query {
            return Err(None);
        }
        if head.metadata.op_code != OpCode::Query {
            return Err(Some(Failure::Unknown));
        }
        head.query.map(|query| Self { query }).ok_or(Some(Failure::Format))
    }

    /// The name that is asked for, where a policy can mean it.
    pub(super) fn domain_name(&self) -> Option<DomainName> {
        if self.query.query_class() != DNSClass::IN {
            return None;
        }
        self.query.name().to_ascii().parse().ok()
    }

    /// Whether a message answers this question, asked with that number.
    pub(super) fn is_answered_by(&self, bytes: &[u8], number: u16) -> bool {
        if bytes.len() < HEADER || bytes[..2] != number.to_be_bytes() || !is_response(bytes) {
            return false;
        }
        let Some(head) = Head::read(bytes) else { return false };
        let same = |query: &Query| {
            lower(query.name()) == lower(self.query.name())
                && query.query_type() == self.query.query_type()
                && query.query_class() == self.query.query_class()
        };
        match &head.query {
            Some(query) => same(query),
            // A server that cannot read the query need not repeat it.
            None => head.metadata.response_code != ResponseCode::NoError && head.answers == 0,
        }
    }
}

/// What comes before the records. These need not be known here, where nobody learns from them.
struct Head {
    metadata: Metadata,
    /// The one question; none where there are not one.
    query: Option<Query>,
    answers: u16,
}

impl Head {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut decoder = BinDecoder::new(bytes);
        let Header { metadata, counts } = Header::read(&mut decoder).ok()?;
        let query = if counts.queries == 1 { Some(Query::read(&mut decoder).ok()?) } else { None };
        Some(Self { metadata, query, answers: counts.answers })
    }
}

/// Has a query over UDP say that its sender takes no longer answers than come in one packet: of what comes in fragments, the second
/// has neither the port nor the number that make it hard to forge (RFC 6891, section 6.2.5; RFC 5452).
pub(super) fn keep_whole(query: &mut [u8]) {
    let mut decoder = BinDecoder::new(query);
    let Ok(Header { counts, .. }) = Header::read(&mut decoder) else { return };
    let is_plain = counts.queries == 1 && counts.answers == 0 && counts.authorities == 0 && counts.additionals > 0;
    if !is_plain || Query::read(&mut decoder).is_err() {
        return;
    }
    // The root's name, the type OPT, and where other records have their class.
    let at = decoder.index();
    if let Some([0, 0, 41, high, low]) = query.get_mut(at..at + 5)
        && u16::from_be_bytes([*high, *low]) > WHOLE
    {
        [*high, *low] = WHOLE.to_be_bytes();
    }
}

/// The addresses of the question's name in an answer, with no time to live above the longest.
pub(super) fn addresses(bytes: &[u8], question: &Question, longest: Duration) -> Result<Found, ProtoError> {
    let mut read = Message::from_vec(bytes)?;
    let mut names = BTreeSet::from([lower(question.query.name())]);
    // They may stand in any order. Resolvers follow no longer chains.
    for _ in 0..MOST_ALIASES {
        let before = names.len();
        for record in &read.answers {
            if let RData::CNAME(target) = &record.data
                && record.dns_class == DNSClass::IN
                && names.contains(&lower(&record.name))
            {
                names.insert(lower(&target.0));
            }
        }
        if names.len() == before {
            break;
        }
    }
    let most = u32::try_from(longest.as_secs()).unwrap_or(u32::MAX);
    let mut found = Vec::new();
    for record in read.answers.iter().filter(|record| record.dns_class == DNSClass::IN) {
        let address: IpAddr = match &record.data {
            RData::A(address) => address.0.into(),
            RData::AAAA(address) => address.0.into(),
            _ => continue,
        };
        if names.contains(&lower(&record.name)) && is_somebodys(address) {
            found.push((address, Duration::from_secs(record.ttl.min(most).into())));
        }
    }
    let is_long = read.answers.iter().any(|record| record.ttl > most);
    let shortened = if is_long {
        read.answers.iter_mut().for_each(|record| record.ttl = record.ttl.min(most));
        Some(read.to_vec()?)
    } else {
        None
    };
    Ok(Found { addresses: found, shortened })
}

/// The answer to a query that fails; none where it is not even the head of one.
pub(super) fn failure(query: &[u8], failure: Failure) -> Option<Vec<u8>> {
    if query.len() < HEADER || is_response(query) {
        return None;
    }
    let code = match failure {
        Failure::Format => ResponseCode::FormErr,
        Failure::Unknown => ResponseCode::NotImp,
        Failure::Server => ResponseCode::ServFail,
    };
    let mut answer = Message::response(u16::from_be_bytes([query[0], query[1]]), OpCode::Query);
    if let Some(head) = Head::read(query) {
        answer.metadata.op_code = head.metadata.op_code;
        answer.metadata.recursion_desired = head.metadata.recursion_desired;
        answer.add_queries(head.query);
    }
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    answer.to_vec().ok()
}

/// Whether a name may mean the address: it can be another host's, and is not of the link alone.
fn is_somebodys(address: IpAddr) -> bool {
    let is_odd = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || is_odd)
}

fn lower(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// The bit QR (RFC 1035, section 4.1.1).
fn is_response(bytes: &[u8]) -> bool {
    bytes.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

/// Bytes of a message that no path known cuts into fragments, with headers of IPv6 and UDP.
const WHOLE: u16 = 1232;

/// Names that lead on from one to the next.
const MOST_ALIASES: usize = 16;

/// Bytes of a message's header.
const HEADER: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x07example\x03com\x00\x00\x01\x00\x01";

    /// An answer whose one record has this data of an address.
    fn answer(data: &[u8]) -> Vec<u8> {
        let mut answer = QUERY.to_vec();
        answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, data.len() as u8]);
        answer.extend(data);
        answer
    }

    #[test]
    fn a_record_that_cannot_be_read_is_in_the_way_of_who_learns_and_of_nobody_else() {
        let question = Question::read(QUERY).unwrap();
        assert_eq!(question.domain_name().unwrap().as_str(), "db.example.com");
        let (good, bad) = (answer(&[192, 0, 2, 1]), answer(&[192, 0, 2]));
        assert!([&good, &bad].iter().all(|answer| question.is_answered_by(answer, 0x1234)));
        assert!(!question.is_answered_by(&good, 0x1235));
        assert!(!question.is_answered_by(QUERY, 0x1234), "a query is no answer");
        let found = addresses(&good, &question, Duration::from_secs(60)).unwrap();
        assert_eq!(found.addresses, [(IpAddr::from([192, 0, 2, 1]), Duration::from_secs(60))]);
        assert!(found.shortened.is_some());
        assert!(addresses(&bad, &question, Duration::from_secs(60)).is_err());
    }
}
