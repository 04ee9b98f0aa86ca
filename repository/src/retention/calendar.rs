//! Copies by the calendar: the last of each of so many days, weeks, months and years.

use std::collections::BTreeMap;
use std::fmt;

use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::Candidate;

/// How many copies of each kind. Only days (weeks, months, years) that have a restorable backup count, so that a time
/// without backups uses none of them up.
#[derive(Clone, PartialEq, Debug)]
pub struct Calendar {
    pub daily: usize,
    /// ISO 8601 weeks: they begin on Mondays.
    pub weekly: usize,
    pub monthly: usize,
    pub yearly: usize,
    /// In which a day begins.
    pub time_zone: TimeZone,
}

/// What a copy stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Slot {
    Day(Date),
    Week { year: i16, week: i8 },
    Month { year: i16, month: i8 },
    Year(i16),
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Day(date) => write!(f, "daily copy of {date}"),
            Slot::Week { year, week } => write!(f, "weekly copy of {year}-W{week:02}"),
            Slot::Month { year, month } => write!(f, "monthly copy of {year}-{month:02}"),
            Slot::Year(year) => write!(f, "yearly copy of {year}"),
        }
    }
}

/// What a copy of a day stands for.
type SlotOf = fn(Date) -> Slot;

impl Calendar {
    /// None of any kind.
    pub fn none() -> Calendar {
        Calendar { daily: 0, weekly: 0, monthly: 0, yearly: 0, time_zone: TimeZone::UTC }
    }

    /// The copies to keep, each with what it stands for. `in_order`: by when they were seen.
    pub(super) fn chosen<'c>(&self, in_order: &[&'c Candidate]) -> Vec<(&'c Candidate, Slot)> {
        let kinds: [(usize, SlotOf); 4] =
            [(self.daily, Slot::Day), (self.weekly, week), (self.monthly, month), (self.yearly, year)];
        kinds.into_iter().flat_map(|(count, slot)| self.newest(in_order, count, slot)).collect()
    }

    fn newest<'c>(&self, in_order: &[&'c Candidate], count: usize, slot: SlotOf) -> Vec<(&'c Candidate, Slot)> {
        let mut best: BTreeMap<Slot, &Candidate> = BTreeMap::new();
        for candidate in in_order.iter().copied() {
            let slot = slot(candidate.seen_at.to_zoned(self.time_zone.clone()).date());
            let held = best.entry(slot).or_insert(candidate);
            // The later of two of the same worth.
            if worth(candidate) >= worth(held) {
                *held = candidate;
            }
        }
        best.into_iter().rev().take(count).map(|(slot, candidate)| (candidate, slot)).collect()
    }
}

/// A proven backup makes way for none that is not, a sound one for none that is doubtful.
fn worth(candidate: &Candidate) -> (bool, bool) {
    (candidate.is_proven, !candidate.is_doubtful)
}

fn week(date: Date) -> Slot {
    let week = date.iso_week_date();
    Slot::Week { year: week.year(), week: week.week() }
}

fn month(date: Date) -> Slot {
    Slot::Month { year: date.year(), month: date.month() }
}

fn year(date: Date) -> Slot {
    Slot::Year(date.year())
}
