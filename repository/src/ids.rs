//! Names of things: each its own type, each with a printed prefix where people see it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name that does not read as one.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    #[error("\"{text}\" is not {what}\nHINT: {hint}")]
    Malformed { text: String, what: &'static str, hint: &'static str },
}

/// Declares an id that is a prefix and 20 lower-case characters: time-ordered, random in its second half.
macro_rules! prefixed_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// New and unique: milliseconds since the epoch, then 50 random bits.
            pub fn generate() -> Self {
                Self(format!(concat!($prefix, "{}"), time_ordered()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let valid = text.strip_prefix($prefix).is_some_and(|rest| {
                    (1..=40).contains(&rest.len()) && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
                });
                if valid {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError::Malformed {
                        text: text.to_owned(),
                        what: $what,
                        hint: concat!("it begins with \"", $prefix, "\", followed by lower-case letters and digits."),
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

prefixed_id!(
    /// A backup, and the session that writes it: the session's id becomes the backup's.
    BackupId, "bk_", "a backup id"
);
prefixed_id!(
    /// A job of the controller.
    JobId, "job_", "a job id"
);
prefixed_id!(
    /// A hold on a backup or a stretch of WAL.
    HoldId, "hold_", "a hold id"
);

impl HoldId {
    /// The hold under which one cluster keeps a backup for another: the same whoever makes it, so that making it again
    /// changes nothing.
    pub fn lent(backup: &BackupId, borrower: &ClusterName) -> HoldId {
        let hash = blake3::hash(format!("{backup} {borrower}").as_bytes()).to_hex();
        HoldId(format!("hold_{}", hash.get(..20).unwrap_or_default()))
    }
}

/// 20 characters of Crockford's base 32: 48 bits of milliseconds, then 50 random bits; sorts by time.
fn time_ordered() -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let millis = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as u64);
    let value = u128::from(millis & 0xFFFF_FFFF_FFFF) << 50 | u128::from(rand::random::<u64>() >> 14);
    (0..20).rev().map(|i| char::from(ALPHABET[(value >> (i * 5) & 31) as usize])).collect()
}

/// A cluster's name: people choose it, it stands in every key, and it never changes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

impl ClusterName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest =
            text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'));
        if first && rest && text.len() <= 63 {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Malformed {
                text: text.to_owned(),
                what: "a cluster name",
                hint: "use 1 to 63 of a-z, 0-9, '-', '_' and '.', and begin with a letter or digit.",
            })
        }
    }
}

impl TryFrom<String> for ClusterName {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> String {
        name.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Declares an id of fixed bytes, printed in hexadecimal.
macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
                bytes.try_into().map(Self).map_err(|_| IdError::Malformed {
                    text: format!("{} bytes", bytes.len()),
                    what: $what,
                    hint: concat!("it has ", stringify!($len), " bytes."),
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bad = || IdError::Malformed {
                    text: text.to_owned(),
                    what: $what,
                    hint: concat!("it is ", stringify!($len), " bytes in lower-case hexadecimal."),
                };
                if text.len() != 2 * $len || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
                    return Err(bad());
                }
                let mut bytes = [0; $len];
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

byte_id!(
    /// A repository, chosen at random when it is made.
    RepositoryId, 16, "a repository id"
);
byte_id!(
    /// The reach of deduplication and of a key: one per cluster lineage.
    DomainId, 16, "a domain id"
);
byte_id!(
    /// A pack: BLAKE3 of its stored bytes.
    PackId, 32, "a pack id"
);
byte_id!(
    /// A chunk: BLAKE3 of its plain content, keyed with the domain's id key.
    ChunkId, 32, "a chunk id"
);
byte_id!(
    /// BLAKE3 of any stored object's bytes.
    Digest, 32, "a digest"
);
byte_id!(
    /// Whom a domain key is wrapped for: an X25519 public key.
    RecipientId, 32, "a recipient"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_refuse_what_is_not_theirs() {
        let first = BackupId::generate();
        std::thread::sleep(std::time::Duration::from_millis(3));
        let second = BackupId::generate();
        assert!(first < second);
        assert_eq!(first.as_str().len(), 23);
        assert!(first.as_str().parse::<BackupId>().is_ok());
        assert!("job_1".parse::<BackupId>().is_err());
        assert!("bk_../../x".parse::<BackupId>().is_err());
    }

    #[test]
    fn cluster_names_are_safe_in_keys() {
        for good in ["orders", "a", "eu-1.orders_2"] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good}");
        }
        for bad in ["", "Orders", "../x", "a/b", ".a", "-a", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
    }
}
