//! Layouts of kernel types, by member path. Filled from BTF in guest RAM ([`btf`]); without BTF nothing
//! is known. Owns the paths; knows no bytes.

pub(crate) mod btf;
pub(crate) mod search;

use btf::{Btf, Kind, Type};

pub use btf::BtfError;

/// Types nested deeper than this are not followed: hostile BTF may refer to itself.
const DEEPEST: usize = 32;
/// Members looked at for one name, all anonymous structs together: the same in breadth.
const MOST_MEMBERS: usize = 1 << 16;
/// Section of per-CPU variables (Linux v6.12 include/linux/percpu-defs.h).
const PER_CPU: &str = ".data..percpu";
/// Size of a pointer on x86-64.
const POINTER: u64 = 8;

/// One member of a struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the outermost struct.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Why a type or member is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// No struct of that name.
    #[error("the guest kernel has no type `struct {0}`")]
    NoStruct(String),
    /// The struct is there, the member is not.
    #[error("`struct {within}` has no member `{member}`")]
    NoMember {
        /// The struct.
        within: String,
        /// The path looked for.
        member: String,
    },
    /// The member is a bit field: it has no address.
    #[error("member `{member}` of `struct {within}` is a bit field")]
    BitField {
        /// The struct.
        within: String,
        /// The path looked for.
        member: String,
    },
}

/// Type layouts of one kernel. A kernel without BTF has none: its symbols, identity and vCPUs are known,
/// but what needs the layout of a struct (tasks, modules, log) is refused by name.
#[derive(Debug, Default)]
pub struct Types {
    btf: Option<Box<Btf>>,
}

impl Types {
    /// Types as BTF has them.
    ///
    /// # Errors
    /// [`BtfError`].
    pub fn from_btf(data: Vec<u8>) -> Result<Self, BtfError> {
        Ok(Self {
            btf: Some(Box::new(Btf::parse(data)?)),
        })
    }

    /// Whether nothing at all is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.btf.is_none()
    }

    /// Where the member lies; `path` may go through nested and anonymous structs: `"thread.sp"`.
    ///
    /// # Errors
    /// [`TypeError`].
    pub fn member(&self, within: &str, path: &str) -> Result<Member, TypeError> {
        let missing = || TypeError::NoMember {
            within: within.to_owned(),
            member: path.to_owned(),
        };
        let btf = self.btf.as_ref().ok_or_else(|| no_struct(within))?;
        let outer = btf.composite(within).ok_or_else(|| no_struct(within))?;
        let found = find_path(btf, &outer, path).ok_or_else(missing)?;
        found.ok_or_else(|| TypeError::BitField {
            within: within.to_owned(),
            member: path.to_owned(),
        })
    }

    /// Offset of a member in bytes: [`member`](Self::member) for those who know its size.
    ///
    /// # Errors
    /// [`TypeError`].
    pub fn offset_of(&self, within: &str, path: &str) -> Result<u64, TypeError> {
        self.member(within, path).map(|member| member.offset)
    }

    /// Size of a struct or union in bytes.
    ///
    /// # Errors
    /// [`TypeError::NoStruct`].
    pub fn size_of(&self, name: &str) -> Result<u64, TypeError> {
        let found = self.btf.as_ref().and_then(|btf| btf.composite(name));
        found
            .map(|found| u64::from(found.size_or_type))
            .ok_or_else(|| no_struct(name))
    }

    /// Offset of a per-CPU variable within each CPU's area: BTF lists them all, also where kallsyms has
    /// no data symbols. `None` where there is none of that name, or several.
    #[must_use]
    pub fn per_cpu(&self, name: &str) -> Option<u64> {
        let btf = self.btf.as_ref()?;
        let mut found = btf.variables(PER_CPU).filter(|(other, _)| *other == name);
        let (_, offset) = found.next()?;
        found.next().is_none().then_some(u64::from(offset))
    }

    /// Value of an enumerator: of several of that name the first.
    #[must_use]
    pub fn enumerator(&self, name: &str) -> Option<i64> {
        let btf = self.btf.as_ref()?;
        let enums = btf
            .types()
            .filter(|found| matches!(found.kind, Kind::Enum | Kind::Enum64));
        for found in enums {
            let value = btf.enumerators(&found).find(|(other, _)| *other == name);
            if let Some((_, value)) = value {
                return Some(value);
            }
        }
        None
    }
}

fn no_struct(name: &str) -> TypeError {
    TypeError::NoStruct(name.to_owned())
}

/// Follows a path of names: `None` if there is no such member, `Some(None)` if it is a bit field.
fn find_path(btf: &Btf, outer: &Type<'_>, path: &str) -> Option<Option<Member>> {
    let mut within = *outer;
    let mut offset = 0;
    let mut budget = MOST_MEMBERS;
    let mut names = path.split('.').peekable();
    while let Some(name) = names.next() {
        let found = find_member(btf, &within, name, DEEPEST, &mut budget)?;
        if found.bit_size != 0 || !found.bit_offset.is_multiple_of(8) {
            return Some(None);
        }
        offset += found.bit_offset / 8;
        if names.peek().is_none() {
            let size = size_of(btf, found.of).unwrap_or(0);
            return Some(Some(Member { offset, size }));
        }
        within = plain(btf, found.of)?;
    }
    None
}

/// A member found, its offset in bits from the struct that was searched.
struct Found {
    of: u32,
    bit_offset: u64,
    bit_size: u32,
}

/// The member of that name in `within` or in a struct or union without a name inside it.
fn find_member(
    btf: &Btf,
    within: &Type<'_>,
    name: &str,
    depth: usize,
    budget: &mut usize,
) -> Option<Found> {
    let depth = depth.checked_sub(1)?;
    for member in btf.members(within) {
        *budget = budget.checked_sub(1)?;
        let bit_offset = u64::from(member.bit_offset);
        if member.name == name {
            return Some(Found {
                of: member.of,
                bit_offset,
                bit_size: member.bit_size,
            });
        }
        if !member.name.is_empty() {
            continue;
        }
        let inner =
            plain(btf, member.of).and_then(|inner| find_member(btf, &inner, name, depth, budget));
        if let Some(found) = inner {
            return Some(Found {
                bit_offset: bit_offset + found.bit_offset,
                ..found
            });
        }
    }
    None
}

/// The type behind typedefs and qualifiers.
fn plain(btf: &Btf, id: u32) -> Option<Type<'_>> {
    let mut found = btf.get(id)?;
    for _ in 0..DEEPEST {
        if !matches!(found.kind, Kind::Typedef | Kind::Qualifier) {
            return Some(found);
        }
        found = btf.get(found.size_or_type)?;
    }
    None
}

/// Size in bytes of a data type.
fn size_of(btf: &Btf, id: u32) -> Option<u64> {
    let mut elements = 1_u64;
    let mut found = plain(btf, id)?;
    for _ in 0..DEEPEST {
        let size = match found.kind {
            Kind::Pointer => POINTER,
            Kind::Array => {
                let (of, count) = btf.array(&found)?;
                elements = elements.checked_mul(u64::from(count))?;
                found = plain(btf, of)?;
                continue;
            }
            Kind::Forward
            | Kind::Variable
            | Kind::Section
            | Kind::Other
            | Kind::Typedef
            | Kind::Qualifier => return None,
            _ => u64::from(found.size_or_type),
        };
        return elements.checked_mul(size);
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes BTF by hand: words of types and the strings they name.
    struct Writer {
        types: Vec<u32>,
        strings: Vec<u8>,
    }

    impl Writer {
        fn new() -> Self {
            Self {
                types: Vec::new(),
                strings: vec![0],
            }
        }

        fn name(&mut self, name: &str) -> u32 {
            let at = self.strings.len() as u32;
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            if name.is_empty() { 0 } else { at }
        }

        fn add(&mut self, name: &str, kind: u32, count: u32, size: u32, rest: &[u32]) {
            let name = self.name(name);
            self.types.extend([name, kind << 24 | count, size]);
            self.types.extend(rest);
        }

        fn finish(self) -> Vec<u8> {
            let types = self.types.len() as u32 * 4;
            let strings = self.strings.len() as u32;
            let mut bytes = vec![0x9f, 0xeb, 1, 0];
            let words = [24, 0, types, types, strings];
            bytes.extend(
                words
                    .iter()
                    .chain(&self.types)
                    .flat_map(|word| word.to_le_bytes()),
            );
            bytes.extend(self.strings);
            bytes
        }
    }

    /// `struct outer { int a; union { struct { long b; }; }; struct inner c[3]; }`
    fn sample() -> Vec<u8> {
        let mut btf = Writer::new();
        let [a, b, c, x] = ["a", "b", "c", "x"].map(|name| btf.name(name));
        btf.add("int", 1, 0, 4, &[32]);
        btf.add("long", 1, 0, 8, &[64]);
        btf.add("", 4, 1, 8, &[b, 2, 0]);
        btf.add("", 5, 1, 8, &[0, 3, 0]);
        btf.add("inner", 4, 2, 12, &[a, 1, 0, x, 1, 64]);
        btf.add("", 3, 0, 0, &[5, 1, 3]);
        btf.add("alias", 8, 0, 5, &[]);
        btf.add(
            "outer",
            4,
            4,
            60,
            &[a, 1, 0, 0, 4, 64, c, 6, 128, x, 7, 416],
        );
        let [low, high] = ["LOW", "HIGH"].map(|name| btf.name(name));
        btf.add("level", 6, 2, 4, &[low, 1, high, 70000]);
        btf.finish()
    }

    #[test]
    fn a_path_leads_through_anonymous_and_named_structs() {
        let types = Types::from_btf(sample()).unwrap();
        assert_eq!(
            types.member("outer", "b"),
            Ok(Member { offset: 8, size: 8 })
        );
        assert_eq!(
            types.member("outer", "c"),
            Ok(Member {
                offset: 16,
                size: 36
            })
        );
        assert_eq!(
            types.member("outer", "x.x"),
            Ok(Member {
                offset: 60,
                size: 4
            })
        );
        assert_eq!(types.size_of("inner"), Ok(12));
        assert_eq!(types.enumerator("HIGH"), Some(70000));
    }

    #[test]
    fn what_is_missing_is_named() {
        let types = Types::from_btf(sample()).unwrap();
        let missing = types.member("outer", "c.a").unwrap_err();
        assert_eq!(missing.to_string(), "`struct outer` has no member `c.a`");
        assert_eq!(
            types.size_of("alias"),
            Err(TypeError::NoStruct("alias".into()))
        );
        assert_eq!(types.enumerator("MIDDLE"), None);
    }

    #[test]
    fn a_struct_inside_itself_ends() {
        let mut btf = Writer::new();
        let n = btf.name("n");
        btf.add("loop", 4, 2, 8, &[0, 1, 0, n, 1, 0]);
        let types = Types::from_btf(btf.finish()).unwrap();
        assert!(types.member("loop", "none").is_err());
        assert!(types.member("loop", "n.n.n").is_ok());
    }

    #[test]
    fn anonymous_structs_in_each_other_end() {
        let mut btf = Writer::new();
        btf.add("wide", 4, 4, 8, &[0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]);
        let types = Types::from_btf(btf.finish()).unwrap();
        assert!(types.member("wide", "none").is_err());
    }

    #[test]
    fn cut_short_data_are_refused() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(
                Types::from_btf(whole[..len].to_vec()).is_err(),
                "{len} bytes"
            );
        }
    }

    proptest! {
        #[test]
        fn hostile_btf_never_panics(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        ) {
            let mut data = sample();
            for (place, byte) in changes {
                let at = place.index(data.len());
                data[at] = byte;
            }
            if let Ok(types) = Types::from_btf(data) {
                for path in ["a", "b", "c", "x.x", "n.n"] {
                    let _ = types.member("outer", path);
                }
                let _ = (types.size_of("inner"), types.enumerator("HIGH"));
            }
        }
    }
}
