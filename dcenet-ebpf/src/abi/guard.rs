//! Who is below a guarded parent ([`crate::datapath::guard`]).

use super::layout::record;

record! {
    /// What tells who has sent a frame.
    pub struct Sender, 16 bytes {
        /// Ethernet source.
        mac: [u8; 6] = 0 @ ADDRESS,
        /// Index of the parent in the host's namespace.
        parent: u32 = 8 @ PARENT,
    }
}

record! {
    /// A pod on a guarded parent.
    pub struct Guarded, 24 bytes {
        /// Its attachment's id.
        attachment: u64 = 0 @ ATTACHMENT,
        /// The cookie of its network namespace (`SO_NETNS_COOKIE`, socket(7)).
        netns: u64 = 8 @ NETNS,
        /// Its slot; 0 while it has none: then nothing passes.
        slot: u32 = 16 @ SLOT,
    }
}

record! {
    /// The namespace of a guarded pod, on one parent.
    pub struct Namespace, 16 bytes {
        /// Its cookie.
        netns: u64 = 0 @ COOKIE,
        /// Index of the parent in the host's namespace.
        parent: u32 = 8 @ BELOW,
    }
}
