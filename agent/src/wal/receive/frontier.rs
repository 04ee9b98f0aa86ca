//! How far everything is there, when its parts come in any order.

use std::collections::BTreeMap;

use walfleet_repository::postgres::Lsn;

#[derive(Clone, Debug)]
pub struct Frontier {
    at: Lsn,
    /// What is there beyond a hole: ends by beginnings.
    ahead: BTreeMap<Lsn, Lsn>,
}

impl Frontier {
    pub fn new(at: Lsn) -> Frontier {
        Frontier { at, ahead: BTreeMap::new() }
    }

    /// Everything before it is there.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// Takes in `[from, to)`; whether the frontier moved.
    pub fn confirm(&mut self, from: Lsn, to: Lsn) -> bool {
        let before = self.at;
        let known = self.ahead.entry(from).or_insert(to);
        *known = to.max(*known);
        while let Some(entry) = self.ahead.first_entry().filter(|entry| *entry.key() <= self.at) {
            self.at = self.at.max(entry.remove());
        }
        self.at > before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_count_once_all_before_them_are_there() {
        let mut frontier = Frontier::new(Lsn(100));
        assert!(!frontier.confirm(Lsn(120), Lsn(130)));
        assert!(frontier.confirm(Lsn(100), Lsn(110)));
        assert_eq!(frontier.at(), Lsn(110));
        assert!(!frontier.confirm(Lsn(50), Lsn(105)), "known already");
        assert!(!frontier.confirm(Lsn(130), Lsn(140)));
        assert!(frontier.confirm(Lsn(105), Lsn(125)), "overlaps");
        assert_eq!(frontier.at(), Lsn(140));
    }
}
