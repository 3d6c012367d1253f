//! Address kinds. A guest-physical address and a guest-virtual address are different types, so
//! mixing them does not compile. Owns no memory access.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Size in bytes of the smallest x86-64 page.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(at) => Some(Self(at)),
                    None => None,
                }
            }

            /// The address `bytes` further on, wrapping at 2^64 as the CPU's own arithmetic does.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address `bytes` before, wrapping at zero as the CPU's own arithmetic does.
            #[must_use]
            pub const fn wrapping_sub(self, bytes: u64) -> Self {
                Self(self.0.wrapping_sub(bytes))
            }

            /// Offset within its 4 KiB page.
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// Start of its 4 KiB page.
            #[must_use]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() {
                    to.collect_str(self)
                } else {
                    to.serialize_u64(self.0)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    from.deserialize_any(AddressVisitor).map(Self)
                } else {
                    u64::deserialize(from).map(Self)
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#018x}", self.0)
            }
        }
    };
}

address!(
    /// Guest-physical address: an index into what the hypervisor gave the guest as RAM or devices.
    Gpa
);
address!(
    /// Guest-virtual address: meaningful only together with a page-table root.
    Gva
);

/// Reads an address as people write it. In JSON addresses are hexadecimal strings, for most readers of
/// JSON keep numbers in 53 bits; a plain number is taken too.
struct AddressVisitor;

impl Visitor<'_> for AddressVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address: a string such as \"0xffffffff81000000\", or a number")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<u64, E> {
        let digits = value
            .strip_prefix("0x")
            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(value), &self))?;
        u64::from_str_radix(digits, 16).map_err(E::custom)
    }
}

macro_rules! range {
    ($(#[$doc:meta])* $name:ident of $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub struct $name {
            /// First address inside.
            pub start: $address,
            /// First address past the end. Never below `start`.
            pub end: $address,
        }

        impl $name {
            /// `size` bytes from `start`; `None` if that passes the end of the address space.
            #[must_use]
            pub const fn sized(start: $address, size: u64) -> Option<Self> {
                match start.checked_add(size) {
                    Some(end) => Some(Self { start, end }),
                    None => None,
                }
            }

            /// Length in bytes.
            #[must_use]
            pub const fn size(&self) -> u64 {
                self.end.0.saturating_sub(self.start.0)
            }

            /// Whether the range holds no address.
            #[must_use]
            pub const fn is_empty(&self) -> bool {
                self.end.0 <= self.start.0
            }

            /// Whether `at` lies inside.
            #[must_use]
            pub const fn contains(&self, at: $address) -> bool {
                self.start.0 <= at.0 && at.0 < self.end.0
            }

            /// Whether the two ranges share an address.
            #[must_use]
            pub const fn overlaps(&self, other: &Self) -> bool {
                self.start.0 < other.end.0 && other.start.0 < self.end.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}..{}", self.start, self.end)
            }
        }
    };
}

range!(
    /// Half-open range of guest-physical addresses.
    GpaRange of Gpa
);
range!(
    /// Half-open range of guest-virtual addresses.
    GvaRange of Gva
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_past_the_end_of_the_address_space_is_refused() {
        assert!(GpaRange::sized(Gpa(u64::MAX), 2).is_none());
        assert!(GvaRange::sized(Gva(16), 16).is_some_and(|range| range.contains(Gva(31))));
    }

    #[test]
    fn an_address_is_a_hexadecimal_string_in_json_and_survives_the_way_back() {
        let at = Gva(0xffff_ffff_8100_0001);
        let json = serde_json::to_string(&at).unwrap();
        assert_eq!(json, "\"0xffffffff81000001\"");
        assert_eq!(serde_json::from_str::<Gva>(&json).unwrap(), at);
        assert_eq!(serde_json::from_str::<Gva>("4096").unwrap(), Gva(4096));
        assert!(serde_json::from_str::<Gva>("\"ffff\"").is_err());
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        let low = GvaRange {
            start: Gva(0),
            end: Gva(16),
        };
        let high = GvaRange {
            start: Gva(16),
            end: Gva(32),
        };
        assert!(!low.overlaps(&high));
        assert!(low.overlaps(&GvaRange {
            start: Gva(15),
            end: Gva(16)
        }));
    }
}
