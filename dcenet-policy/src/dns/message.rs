//! What is read of messages, and the answers that are the proxy's own.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder, DecodeError};

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
        let query = head.query.ok_or(Some(Failure::Format))?;
        if matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR) {
            // Of several messages, which a resolver is not asked for (RFC 5936).
            return Err(Some(Failure::Unknown));
        }
        Ok(Self { query })
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
    // After the root's name and the type, where other records have their class.
    if let Some(at) = place_of_opt(query)
        && let Some([high, low]) = query.get_mut(at + 3..at + 5)
        && u16::from_be_bytes([*high, *low]) > WHOLE
    {
        [*high, *low] = WHOLE.to_be_bytes();
    }
}

/// Where the record OPT of a query begins, if it is its first one.
fn place_of_opt(query: &[u8]) -> Option<usize> {
    let mut decoder = BinDecoder::new(query);
    let Header { counts, .. } = Header::read(&mut decoder).ok()?;
    let is_plain = counts.queries == 1 && counts.answers == 0 && counts.authorities == 0 && counts.additionals > 0;
    if !is_plain || Query::read(&mut decoder).is_err() {
        return None;
    }
    let at = decoder.index();
    (query.get(at..at + 3) == Some(&[0, 0, 41])).then_some(at)
}

/// Why nothing can be learnt of an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unread {
    #[error("its {0} answer records are more than {MOST_RECORDS}")]
    TooMany(u16),
    #[error("an answer record cannot be read: {0}")]
    Decode(#[from] DecodeError),
    #[error("an answer record of type {kind} has {length} bytes")]
    Length { kind: u16, length: usize },
}

/// What a record of an answer says, as far as names have to do with it.
enum Data {
    Address(IpAddr),
    Alias(String),
    Other,
}

/// A record of the class IN.
struct Record {
    owner: String,
    ttl: u32,
    data: Data,
}

/// The addresses of the question's name in an answer, with no time to live above the longest. Other sections are not read.
pub(super) fn addresses(bytes: &[u8], question: &Question, longest: Duration) -> Result<Found, Unread> {
    let most = u32::try_from(longest.as_secs()).unwrap_or(u32::MAX);
    let mut decoder = BinDecoder::new(bytes);
    let Header { counts, .. } = Header::read(&mut decoder)?;
    for _ in 0..counts.queries {
        Query::read(&mut decoder)?;
    }
    if counts.answers > MOST_RECORDS {
        return Err(Unread::TooMany(counts.answers));
    }
    let mut shortened: Option<Vec<u8>> = None;
    let mut records = Vec::new();
    for _ in 0..counts.answers {
        let owner = lower(&Name::read(&mut decoder)?);
        let kind = decoder.read_u16()?.unverified();
        let class = decoder.read_u16()?.unverified();
        let at = decoder.index();
        let ttl = decoder.read_u32()?.unverified();
        if ttl > most {
            // In its place, so that names stay compressed as they are.
            shortened.get_or_insert_with(|| bytes.to_vec())[at..at + 4].copy_from_slice(&most.to_be_bytes());
        }
        let length = usize::from(decoder.read_u16()?.unverified());
        let mut within = decoder.clone(decoder.index() as u16);
        let data = decoder.read_slice(length)?.unverified();
        let data = match kind {
            _ if class != IN => continue,
            A => Data::Address(<[u8; 4]>::try_from(data).map_err(|_| Unread::Length { kind, length })?.into()),
            AAAA => Data::Address(<[u8; 16]>::try_from(data).map_err(|_| Unread::Length { kind, length })?.into()),
            CNAME => Data::Alias(lower(&Name::read(&mut within)?)),
            _ => Data::Other,
        };
        records.push(Record { owner, ttl: ttl.min(most), data });
    }
    let mut names = BTreeSet::from([lower(question.query.name())]);
    // They may stand in any order. Resolvers follow no longer chains.
    for _ in 0..MOST_ALIASES {
        let before = names.len();
        for Record { owner, data, .. } in &records {
            if let Data::Alias(target) = data
                && names.contains(owner)
            {
                names.insert(target.clone());
            }
        }
        if names.len() == before {
            break;
        }
    }
    let found =
        records.into_iter().filter(|record| names.contains(&record.owner)).filter_map(|record| match record.data {
            Data::Address(address) if is_somebodys(address) => Some((address, Duration::from_secs(record.ttl.into()))),
            _ => None,
        });
    Ok(Found { addresses: found.collect(), shortened })
}

/// The head of an answer over UDP that says that there is more (TC), as which it can be released: the client asks again over TCP.
/// None where it does not say so.
pub(super) fn truncated(answer: &[u8], query: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = BinDecoder::new(answer);
    let Header { metadata, counts } = Header::read(&mut decoder).ok()?;
    if !metadata.truncation {
        return None;
    }
    for _ in 0..counts.queries {
        Query::read(&mut decoder).ok()?;
    }
    let mut head = answer.get(..decoder.index())?.to_vec();
    head[6..HEADER].fill(0);
    add_opt(&mut head, query);
    Some(head)
}

/// Adds the record OPT that an answer to a query with one must have (RFC 6891, section 6.1.1).
fn add_opt(answer: &mut Vec<u8>, query: &[u8]) {
    if place_of_opt(query).is_some() {
        let [high, low] = WHOLE.to_be_bytes();
        answer.extend([0, 0, 41, high, low, 0, 0, 0, 0, 0, 0]);
        answer[10..HEADER].copy_from_slice(&1_u16.to_be_bytes());
    }
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
    let mut answer = answer.to_vec().ok()?;
    add_opt(&mut answer, query);
    Some(answer)
}

/// Whether another server may know better: SERVFAIL or REFUSED (RFC 1035, section 4.1.1).
pub(super) fn is_failure(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|flags| matches!(flags & 0xf, 2 | 5))
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

/// Types and the class of records (RFC 1035, section 3.2; RFC 3596).
const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;
const IN: u16 = 1;

/// Records of an answer that is learnt from.
const MOST_RECORDS: u16 = 1024;

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

    #[test]
    fn what_is_not_learnt_from_is_in_nobodys_way() {
        let question = Question::read(QUERY).unwrap();
        // A torn record behind the answer's own, and a time to live that is too long.
        let mut odd = answer(&[192, 0, 2, 1]);
        odd[11] = 1;
        odd.extend([0, 0, 16]);
        odd[38..42].copy_from_slice(&[0, 9, 0, 0]);
        let found = addresses(&odd, &question, Duration::from_secs(60)).unwrap();
        assert_eq!(found.addresses.len(), 1);
        let mut expected = odd.clone();
        expected[38..42].copy_from_slice(&[0, 0, 0, 60]);
        assert!(found.shortened == Some(expected), "nothing but the time is another");
        odd[6..8].copy_from_slice(&1025_u16.to_be_bytes());
        assert!(matches!(addresses(&odd, &question, Duration::from_secs(60)), Err(Unread::TooMany(1025))));
    }

    #[test]
    fn an_answer_that_was_cut_off_is_released_without_its_records() {
        let mut cut = answer(&[192, 0, 2, 1]);
        assert_eq!(truncated(&cut, QUERY), None);
        cut[2] |= 0x02;
        cut.truncate(cut.len() - 2);
        let mut head = QUERY.to_vec();
        head[2..4].copy_from_slice(&[0x83, 0x80]);
        assert_eq!(truncated(&cut, QUERY).unwrap(), head);
        // With OPT, where the query has one.
        let mut query = QUERY.to_vec();
        query[11] = 1;
        query.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        head[11] = 1;
        head.extend([0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(truncated(&cut, &query).unwrap(), head);
        let failed = failure(&query, Failure::Server).unwrap();
        assert!(failed.ends_with(&head[head.len() - 11..]) && failed[11] == 1 && is_failure(&failed));
        assert_eq!(failure(QUERY, Failure::Server).unwrap()[11], 0);
        keep_whole(&mut query);
        assert_eq!(query[query.len() - 8..][..2], 1232_u16.to_be_bytes());
    }

    #[test]
    fn transfers_of_zones_are_not_implemented() {
        let mut query = QUERY.to_vec();
        let at = query.len() - 3;
        query[at] = 252;
        assert_eq!(Question::read(&query).unwrap_err(), Some(Failure::Unknown));
    }
}
