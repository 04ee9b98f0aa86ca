//! The name of what says that `wal_level` changed: where, and to what.

use std::fmt;

use crate::postgres::{Lsn, WalBranch};

const MINIMAL: &str = "minimal";
const REPLICA: &str = "replica";

/// What a setting of `wal_level` means for recovery from a backup.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum WalLevelClass {
    /// WAL for a server's own crash recovery alone: replay from a backup must not pass it.
    Minimal,
    /// `replica` or more.
    Replica,
}

/// A change of `wal_level` in a branch's WAL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WalLevelName {
    pub wal: WalBranch,
    /// To `minimal`: the start of the last record before the one that says so. Otherwise that one's end.
    pub at: Lsn,
    pub level: WalLevelClass,
}

impl WalLevelName {
    pub(super) fn parse(wal: WalBranch, name: &str) -> Option<WalLevelName> {
        let (at, level) = name.split_once('.')?;
        let level = match level {
            MINIMAL => WalLevelClass::Minimal,
            REPLICA => WalLevelClass::Replica,
            _ => return None,
        };
        let found = WalLevelName { wal, at: Lsn(u64::from_str_radix(at, 16).ok()?), level };
        Some(found).filter(|found| found.to_string() == name)
    }
}

impl fmt::Display for WalLevelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            WalLevelClass::Minimal => MINIMAL,
            WalLevelClass::Replica => REPLICA,
        };
        write!(f, "{:016x}.{level}", self.at.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ClusterName;
    use crate::layout::{parse_gap_note, parse_wal_level, parse_wal_object, wal_branch, wal_level};
    use crate::postgres::{Branch, SegmentSize, SystemId, Timeline};

    #[test]
    fn changes_of_wal_level_are_found_among_a_branch_s_objects() {
        let cluster: ClusterName = "orders".parse().unwrap();
        let wal = WalBranch { system_id: SystemId(7412), timeline: Timeline(1), branch: Branch::ROOT };
        for (level, word) in [(WalLevelClass::Minimal, "minimal"), (WalLevelClass::Replica, "replica")] {
            let name = WalLevelName { wal, at: Lsn(0x1_0000_0028), level };
            let key = wal_level(&cluster, &name);
            assert!(key.as_ref().ends_with(&format!("/levels/0000000100000028.{word}")), "{key}");
            assert_eq!(parse_wal_level(&cluster, &key), Some(name));
            assert_eq!(parse_gap_note(&cluster, &key), None);
            assert_eq!(parse_wal_object(&cluster, &key, SegmentSize::DEFAULT), None);
        }
        for name in ["1.minimal", "0000000100000028.logical", "0000000100000028", "000000010000002G.minimal"] {
            let key = wal_branch(&cluster, &wal).join("levels").join(name);
            assert_eq!(parse_wal_level(&cluster, &key), None, "{name}");
        }
    }
}
