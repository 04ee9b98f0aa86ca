//! How people name a branch: `5-9f3c07a1b2d4e680`, or as many of the digits as tell it from the others.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::postgres::{Timeline, WalBranch};

/// A branch is eight bytes ([`crate::postgres::Branch`]).
const DIGITS: usize = 16;

/// A timeline and the beginning of a branch's hexadecimal form.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BranchName {
    timeline: Timeline,
    /// The digits given are the upper ones.
    value: u64,
    /// 1 to [`DIGITS`].
    given: usize,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{0}\" does not name a branch of a timeline\nHINT: write the timeline, a hyphen and 1 to 16 hexadecimal digits, for example 5-9f3c07a1b2d4e680."
)]
pub struct BranchNameError(String);

impl BranchName {
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    pub fn names(&self, wal: &WalBranch) -> bool {
        let unasked = 4 * (DIGITS - self.given);
        wal.timeline == self.timeline && (u64::from_be_bytes(wal.branch.0) ^ self.value) >> unasked == 0
    }
}

impl From<&WalBranch> for BranchName {
    fn from(wal: &WalBranch) -> BranchName {
        BranchName { timeline: wal.timeline, value: u64::from_be_bytes(wal.branch.0), given: DIGITS }
    }
}

impl FromStr for BranchName {
    type Err = BranchNameError;

    fn from_str(text: &str) -> Result<Self, BranchNameError> {
        let parse = || {
            let (timeline, digits) = text.split_once('-')?;
            let given = digits.len();
            // from_str_radix and parse would take a sign.
            let good = timeline.bytes().all(|byte| byte.is_ascii_digit())
                && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
                && (1..=DIGITS).contains(&given);
            let timeline = Timeline::new(timeline.parse().ok()?).ok()?;
            let value = u64::from_str_radix(digits, 16).ok()?;
            good.then(|| BranchName { timeline, value: value << (4 * (DIGITS - given)), given })
        };
        parse().ok_or_else(|| BranchNameError(text.to_owned()))
    }
}

impl fmt::Display for BranchName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.value >> (4 * (DIGITS - self.given));
        write!(f, "{}-{digits:0width$x}", self.timeline, width = self.given)
    }
}

impl From<BranchName> for String {
    fn from(name: BranchName) -> String {
        name.to_string()
    }
}

impl TryFrom<String> for BranchName {
    type Error = BranchNameError;

    fn try_from(text: String) -> Result<Self, BranchNameError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Branch, SystemId};

    #[test]
    fn a_name_is_as_much_of_the_branch_as_was_written() {
        let branch = Branch([0x0f, 0x3c, 7, 0xa1, 0xb2, 0xd4, 0xe6, 0x80]);
        let wal = WalBranch { system_id: SystemId(1), timeline: Timeline(5), branch };
        for good in ["5-0", "5-0f3", "5-0f3c07a1b2d4e680"] {
            let name: BranchName = good.parse().unwrap();
            assert!(name.names(&wal) && name.to_string() == good, "{good} is {name}");
        }
        assert!("5-0F3C".parse::<BranchName>().unwrap().names(&wal), "either case");
        assert_eq!(BranchName::from(&wal).to_string(), "5-0f3c07a1b2d4e680");
        for other in ["5-1", "5-0f4", "6-0f3c", "5-0f3c07a1b2d4e681"] {
            assert!(!other.parse::<BranchName>().unwrap().names(&wal), "{other}");
        }
        for bad in ["5", "5-", "-0f", "0-0f", "+5-0f", "5-+f", "5-0x", "5-0f3c07a1b2d4e6800", "5--0", "5-é"] {
            assert!(bad.parse::<BranchName>().is_err(), "{bad}");
        }
    }
}
