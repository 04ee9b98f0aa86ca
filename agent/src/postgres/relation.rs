//! File names of relations (GetRelationPath, src/common/relpath.c; parse_filename_for_nontemp_relation,
//! src/backend/storage/file/reinit.c).

/// One of a relation's files' kinds (ForkNumber, src/include/common/relpath.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Fork {
    Main = 0,
    FreeSpaceMap = 1,
    VisibilityMap = 2,
    /// What an unlogged relation is reset to after a crash.
    Init = 3,
}

impl Fork {
    /// As WAL names it.
    pub const fn number(self) -> u8 {
        self as u8
    }

    pub fn from_number(number: u8) -> Option<Fork> {
        let all = [Fork::Main, Fork::FreeSpaceMap, Fork::VisibilityMap, Fork::Init];
        all.into_iter().find(|fork| fork.number() == number)
    }

    /// Whether WAL tells of every page of it that changes. Of the two maps it tells only in part, or by implication.
    pub const fn is_logged(self) -> bool {
        matches!(self, Fork::Main | Fork::Init)
    }
}

/// The file of one segment of one fork.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelationFile {
    /// The relfilenumber, which is not the relation's OID once it was rewritten.
    pub number: u32,
    pub fork: Fork,
    /// From 0; each but the last has the cluster's relation segment size.
    pub segment: u32,
}

impl RelationFile {
    /// `None` for any other file, temporary relations' included.
    pub fn parse(name: &[u8]) -> Option<RelationFile> {
        let (number, rest) = leading_number(name)?;
        let (fork, rest) = fork_suffix(rest)?;
        let segment = match rest {
            [] => 0,
            [b'.', digits @ ..] => leading_number(digits).filter(|(_, rest)| rest.is_empty())?.0,
            _ => return None,
        };
        Some(RelationFile { number, fork, segment })
    }
}

/// `t<backend>_<number>[_fork][.segment]` (looks_like_temp_rel_name, src/backend/storage/file/fd.c).
pub fn is_temporary_relation(name: &[u8]) -> bool {
    let parse = || {
        let rest = name.strip_prefix(b"t")?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let rest = rest.get(digits..)?.strip_prefix(b"_")?;
        (digits > 0).then(|| RelationFile::parse(rest))?
    };
    parse().is_some()
}

/// A positive number without leading zeros, and what follows it.
fn leading_number(text: &[u8]) -> Option<(u32, &[u8])> {
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at_checked(length)?;
    if digits.first().is_none_or(|first| *first == b'0') {
        return None;
    }
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some((number, rest))
}

fn fork_suffix(rest: &[u8]) -> Option<(Fork, &[u8])> {
    let Some(after) = rest.strip_prefix(b"_") else { return Some((Fork::Main, rest)) };
    let forks = [(&b"fsm"[..], Fork::FreeSpaceMap), (b"vm", Fork::VisibilityMap), (b"init", Fork::Init)];
    forks.into_iter().find_map(|(name, fork)| after.strip_prefix(name).map(|rest| (fork, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_relation_files_are_told_from_all_others() {
        let file = |number, fork, segment| Some(RelationFile { number, fork, segment });
        assert_eq!(RelationFile::parse(b"16384"), file(16384, Fork::Main, 0));
        assert_eq!(RelationFile::parse(b"16384.12"), file(16384, Fork::Main, 12));
        assert_eq!(RelationFile::parse(b"16384_fsm.1"), file(16384, Fork::FreeSpaceMap, 1));
        assert_eq!(RelationFile::parse(b"4294967295_vm"), file(u32::MAX, Fork::VisibilityMap, 0));
        assert_eq!(RelationFile::parse(b"1_init"), file(1, Fork::Init, 0));
        for other in [
            "",
            "0",
            "012",
            "4294967296",
            "16384.",
            "16384.0",
            "16384.x",
            "16384_",
            "16384_foo",
            "16384_fsmx",
            "t3_16384",
            "PG_VERSION",
            "pg_filenode.map",
            "16384_fsm_vm",
            "16384.1.2",
            "16384 ",
        ] {
            assert_eq!(RelationFile::parse(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn temporary_relations_are_known_by_their_backend() {
        for name in ["t3_16384", "t128_16384_fsm", "t0_1.2"] {
            assert!(is_temporary_relation(name.as_bytes()), "{name}");
        }
        for name in ["t_16384", "t3_", "t3", "3_16384", "t3_x", "temp"] {
            assert!(!is_temporary_relation(name.as_bytes()), "{name}");
        }
    }
}
