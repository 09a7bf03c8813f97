//! Fixed layouts: a struct, the offset of each field, `encode` and `decode`.

/// A field of a record: something with a fixed size and a form in bytes.
pub trait Field: Copy + Default {
    /// Its size in bytes.
    const BYTES: usize;

    /// Writes it to the first [`Field::BYTES`] bytes.
    fn put(self, out: &mut [u8]);

    /// Reads it from the first [`Field::BYTES`] bytes.
    fn take(bytes: &[u8]) -> Self;
}

macro_rules! number_fields {
    ($($number:ty),+) => {$(
        /// In native byte order.
        impl Field for $number {
            const BYTES: usize = size_of::<$number>();

            fn put(self, out: &mut [u8]) {
                out[..Self::BYTES].copy_from_slice(&self.to_ne_bytes());
            }

            fn take(bytes: &[u8]) -> Self {
                let mut value = [0; size_of::<$number>()];
                value.copy_from_slice(&bytes[..Self::BYTES]);
                Self::from_ne_bytes(value)
            }
        }
    )+};
}

number_fields!(u8, u16, u32, u64);

/// As they are: addresses in network order.
impl<const N: usize> Field for [u8; N]
where
    [u8; N]: Default,
{
    const BYTES: usize = N;

    fn put(self, out: &mut [u8]) {
        out[..N].copy_from_slice(&self);
    }

    fn take(bytes: &[u8]) -> Self {
        let mut value = [0; N];
        value.copy_from_slice(&bytes[..N]);
        value
    }
}

/// A number in network byte order (big-endian) in memory, in native order as a value of Rust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Be16(pub u16);

impl Field for Be16 {
    const BYTES: usize = 2;

    fn put(self, out: &mut [u8]) {
        self.0.to_be_bytes().put(out);
    }

    fn take(bytes: &[u8]) -> Self {
        Self(u16::from_be_bytes(Field::take(bytes)))
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
                $($crate::abi::layout::Field::put(self.$field, &mut out[$offset..]);)+
                out
            }

            /// Reads the bytes that a program wrote. `None` where there are not exactly enough.
            pub fn decode(bytes: &[u8]) -> Option<Self> {
                if bytes.len() != $bytes {
                    return None;
                }
                Some(Self { $($field: $crate::abi::layout::Field::take(&bytes[$offset..]),)+ })
            }
        }

        // Fields neither overlap nor reach beyond the record, and are aligned, as the verifier wants it.
        const _: () = {
            let mut end = 0;
            $(
                let bytes = <$kind as $crate::abi::layout::Field>::BYTES;
                assert!($offset >= end, "fields overlap or are out of order");
                assert!($offset % if bytes >= 8 { 8 } else { bytes } == 0, "a field is not aligned");
                end = $offset + bytes;
            )+
            assert!(end <= $bytes && $bytes % 8 == 0);
        };
    };
}

pub(crate) use record;
