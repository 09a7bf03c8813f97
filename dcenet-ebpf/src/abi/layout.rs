//! Fixed layouts: a struct, the offset of each field, `encode` and `decode`.

use crate::maps::Plain;

/// A number in network byte order (big-endian) in memory, in native order as a value of Rust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Be16(pub u16);

impl Plain for Be16 {
    const SIZE: usize = 2;

    fn write(&self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0.to_be_bytes());
    }

    fn read(bytes: &[u8]) -> Self {
        Self(u16::from_be_bytes(Plain::read(bytes)))
    }
}

/// Makes a record: every field says its offset, what is between fields is zero.
macro_rules! record {
    (
        $(#[$doc:meta])*
        pub struct $name:ident, $bytes:literal bytes {
            $($(#[$field_doc:meta])* $field:ident: $kind:ty = $offset:literal @ $constant:ident,)+
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $kind,)+
        }

        impl $name {
            /// Size in bytes.
            pub const BYTES: usize = $bytes;
            $(
                #[doc = concat!("Offset of `", stringify!($field), "` in bytes.")]
                pub const $constant: i16 = $offset;
            )+

            /// The bytes as programs see them.
            pub fn encode(&self) -> [u8; $bytes] {
                let mut out = [0; $bytes];
                $crate::maps::Plain::write(self, &mut out);
                out
            }

            /// Reads the bytes that a program wrote. `None` where there are not exactly enough.
            pub fn decode(bytes: &[u8]) -> Option<Self> {
                (bytes.len() == $bytes).then(|| $crate::maps::Plain::read(bytes))
            }
        }

        impl $crate::maps::Plain for $name {
            const SIZE: usize = $bytes;

            fn write(&self, bytes: &mut [u8]) {
                $(
                    let end = $offset + <$kind as $crate::maps::Plain>::SIZE;
                    $crate::maps::Plain::write(&self.$field, &mut bytes[$offset..end]);
                )+
            }

            fn read(bytes: &[u8]) -> Self {
                Self {
                    $($field: $crate::maps::Plain::read(
                        &bytes[$offset..$offset + <$kind as $crate::maps::Plain>::SIZE],
                    ),)+
                }
            }
        }

        // Fields neither overlap nor reach beyond the record, and are aligned, as the verifier wants it.
        const _: () = {
            let mut end = 0;
            $(
                let bytes = <$kind as $crate::maps::Plain>::SIZE;
                assert!($offset >= end, "fields overlap or are out of order");
                assert!($offset % if bytes >= 8 { 8 } else { bytes } == 0, "a field is not aligned");
                end = $offset + bytes;
            )+
            assert!(end <= $bytes && $bytes % 8 == 0);
        };
    };
}

pub(crate) use record;
