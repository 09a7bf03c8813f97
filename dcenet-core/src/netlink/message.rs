//! Netlink messages: building one, and reading the attributes of one (`include/uapi/linux/netlink.h`).

/// A request: one netlink message, built attribute by attribute.
///
/// Sequence number and acknowledgement flags are the socket's business and filled in when it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
    operation: String,
}

impl Message {
    /// Begins a message of type `kind` with `NLM_F_*` flags (`NLM_F_REQUEST` is implied), followed by the family's
    /// fixed header. `operation` says for people what is attempted, such as `add address 10.0.0.2/24 to eth0`.
    pub fn new(kind: u16, flags: u16, operation: impl Into<String>, header: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; HEADER]);
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        let mut message = Self { bytes, operation: operation.into() };
        message.append(header);
        message
    }

    /// Appends an attribute with raw content.
    pub fn bytes(&mut self, attribute: u16, content: &[u8]) -> &mut Self {
        // Every caller passes names, addresses and small structures; the kernel's own limit is 64 KiB - 1.
        let len = u16::try_from(ATTRIBUTE + content.len()).expect("attributes are far below 64 KiB");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&attribute.to_ne_bytes());
        self.append(content);
        self
    }

    /// Appends a one-byte attribute.
    pub fn u8(&mut self, attribute: u16, value: u8) -> &mut Self {
        self.bytes(attribute, &[value])
    }

    /// Appends a 32-bit attribute in the machine's byte order.
    pub fn u32(&mut self, attribute: u16, value: u32) -> &mut Self {
        self.bytes(attribute, &value.to_ne_bytes())
    }

    /// Appends a NUL-terminated string.
    pub fn text(&mut self, attribute: u16, value: &str) -> &mut Self {
        let mut content = Vec::with_capacity(value.len() + 1);
        content.extend_from_slice(value.as_bytes());
        content.push(0);
        self.bytes(attribute, &content)
    }

    /// Appends an attribute that holds the attributes which `fill` appends.
    pub fn nest(&mut self, attribute: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; ATTRIBUTE]);
        fill(self);
        let len = u16::try_from(self.bytes.len() - start).expect("attributes are far below 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&attribute.to_ne_bytes());
        self
    }

    /// Appends raw bytes, padded to four: a fixed structure inside a nest.
    pub fn append(&mut self, content: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// What the message attempts, for people.
    pub fn operation(&self) -> &str {
        &self.operation
    }

    /// The finished message with `sequence` and the additional `flags`.
    pub(crate) fn encode(&self, sequence: u32, flags: u16, into: &mut Vec<u8>) {
        let start = into.len();
        into.extend_from_slice(&self.bytes);
        let header = &mut into[start..];
        let len = u32::try_from(self.bytes.len()).expect("messages are far below 4 GiB");
        header[..4].copy_from_slice(&len.to_ne_bytes());
        let own = u16::from_ne_bytes([header[6], header[7]]);
        header[6..8].copy_from_slice(&(own | flags).to_ne_bytes());
        header[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// One message as received: header fields and payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// Splits a datagram into its messages. Ends at the first one whose length makes no sense, with `Err`.
pub(crate) fn split(mut datagram: &[u8]) -> impl Iterator<Item = Result<Received<'_>, &'static str>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let Some(len) = field(datagram, 0).map(u32::from_ne_bytes) else {
            datagram = &[];
            return Some(Err("a message shorter than its header"));
        };
        let len = len as usize;
        if len < HEADER || len > datagram.len() {
            datagram = &[];
            return Some(Err("a message length beyond the datagram"));
        }
        let (message, _) = datagram.split_at(len);
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Received {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: field(message, 8).map(u32::from_ne_bytes).unwrap_or_default(),
            payload: &message[HEADER..],
        }))
    })
}

/// The attributes in a byte string, in order. Reading stops at the first one whose length makes no sense.
#[derive(Debug, Clone)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Reads the attributes of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The content of the first attribute of this type.
    pub fn find(&self, attribute: u16) -> Option<&'a [u8]> {
        self.clone().find_map(|(kind, content)| (kind == attribute).then_some(content))
    }
}

impl<'a> Iterator for Attributes<'a> {
    /// The type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`, and the content.
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let len = u16::from_ne_bytes(field(self.0, 0)?) as usize;
        let kind = u16::from_ne_bytes(field(self.0, 2)?);
        let content = self.0.get(ATTRIBUTE..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, content))
    }
}

/// `N` bytes at `offset`, if there are as many.
pub(crate) fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// A 32-bit number at the start of an attribute's content.
pub(crate) fn number(content: &[u8]) -> Option<u32> {
    field(content, 0).map(u32::from_ne_bytes)
}

/// A string up to its NUL.
pub(crate) fn text(content: &[u8]) -> String {
    let end = content.iter().position(|b| *b == 0).unwrap_or(content.len());
    String::from_utf8_lossy(&content[..end]).into_owned()
}

/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;
/// `sizeof(struct nlmsghdr)`.
const HEADER: usize = 16;
/// `sizeof(struct nlattr)`.
const ATTRIBUTE: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut message = Message::new(16, 0, "try", &[1, 2, 3, 4]);
        message.u32(1, 7).text(2, "eth0").nest(3 | 0x8000, |m| {
            m.u8(4, 9);
        });
        let mut bytes = Vec::new();
        message.encode(5, 4, &mut bytes);
        let all: Vec<_> = split(&bytes).map(Result::unwrap).collect();
        let [one] = all[..] else { panic!("{all:?}") };
        assert_eq!((one.kind, one.flags, one.sequence), (16, 5, 5));
        let attributes = Attributes::new(&one.payload[4..]);
        assert_eq!(attributes.find(1).and_then(number), Some(7));
        assert_eq!(attributes.find(2).map(text).as_deref(), Some("eth0"));
        assert_eq!(Attributes::new(attributes.find(3).unwrap()).find(4), Some(&[9][..]));
        assert_eq!(attributes.find(9), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_end_the_reading_and_nothing_else(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for message in split(&bytes).flatten() {
                prop_assert!(Attributes::new(message.payload).count() <= message.payload.len() / 4);
            }
            prop_assert!(Attributes::new(&bytes).count() <= bytes.len() / 4 + 1);
        }
    }
}
