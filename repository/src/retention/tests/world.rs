//! Histories of a cluster: WAL by the hour, failovers, an upgrade, backups, gaps, holds, sessions under way.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::super::calendar::Calendar;
use super::super::{Candidate, Given, Promise};
use crate::format::log_entry::{HeldStretch, Hold, HoldSubject, Open};
use crate::ids::BackupId;
use crate::postgres::{Branch, Lsn, SegmentSize, SystemId, Timeline, TimelineHistory, WalBranch};
use crate::recovery_window::{BackupFacts, BranchWal, SegmentFacts, WalCatalog};

/// A server writes one segment in this time, always.
const SEGMENT_HOURS: u64 = 2;
pub const SIZE: u32 = 1 << 20;

pub fn hours(hours: u64) -> SignedDuration {
    SignedDuration::from_hours(hours as i64)
}

pub fn begun() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().expect("a time")
}

/// Where servers are after so many hours: the first segment is number 1.
fn lsn(hours: f64) -> Lsn {
    Lsn(u64::from(SIZE) + (hours / SEGMENT_HOURS as f64 * f64::from(SIZE)) as u64)
}

fn number(hours: f64) -> u64 {
    lsn(hours).0 / u64::from(SIZE)
}

fn time(lsn: Lsn) -> Timestamp {
    let hours = (lsn.0 as f64 / f64::from(SIZE) - 1.0) * SEGMENT_HOURS as f64;
    begun() + SignedDuration::from_millis((hours * 3_600_000.0).round() as i64)
}

fn wal(system: u64, timeline: u32) -> WalBranch {
    let branch = if timeline == 1 { Branch::ROOT } else { Branch([timeline as u8; 8]) };
    WalBranch { system_id: SystemId(system), timeline: Timeline(timeline), branch }
}

#[derive(Clone, Debug)]
pub struct World {
    pub now: Timestamp,
    pub promise: Promise,
    pub candidates: Vec<Candidate>,
    pub catalog: WalCatalog,
    pub last_stored: BTreeMap<WalBranch, Timestamp>,
    pub holds: Vec<Hold>,
    pub open: Vec<Open>,
    pub trimmed: BTreeMap<WalBranch, Lsn>,
}

/// A stretch of time in which one branch is the one that is written: `[from, to)` hours.
struct Reign {
    wal: WalBranch,
    from: f64,
    to: f64,
}

impl World {
    fn empty(hours: f64) -> World {
        World {
            now: time(lsn(hours)),
            promise: Promise {
                window: SignedDuration::ZERO,
                calendar: Calendar::none(),
                minimum: 1,
                trash: super::hours(7 * 24),
            },
            candidates: Vec::new(),
            catalog: WalCatalog::default(),
            last_stored: BTreeMap::new(),
            holds: Vec::new(),
            open: Vec::new(),
            trimmed: BTreeMap::new(),
        }
    }

    /// Of one timeline, with a backup at noon of days 0 to `days`, and one hour later it is now.
    pub fn daily(days: u64) -> World {
        let end = (days * 24 + 13) as f64;
        let mut world = World::empty(end);
        world.write(&Reign { wal: wal(7, 1), from: 0.0, to: end }, &[], end);
        for day in 0..=days {
            world.back_up(&format!("bk_{day:03}"), wal(7, 1), (day * 24 + 12) as f64);
        }
        world
    }

    /// The same; after the backup of day `upgraded` another system goes on under the name.
    pub fn upgraded(days: u64, upgraded: u64) -> World {
        let (turn, end) = ((upgraded * 24 + 13) as f64, (days * 24 + 13) as f64);
        let mut world = World::empty(end);
        world.write(&Reign { wal: wal(7, 1), from: 0.0, to: turn }, &[], turn);
        world.write(&Reign { wal: wal(8, 1), from: turn, to: end }, &[], end);
        for day in 0..=days {
            let system = if day <= upgraded { 7 } else { 8 };
            world.back_up(&format!("bk_{day:03}"), wal(system, 1), (day * 24 + 12) as f64);
        }
        world
    }

    pub fn random(seed: u64) -> World {
        let mut random = StdRng::seed_from_u64(seed);
        let end = random.random_range(10.0..600.0);
        let mut world = World::empty(end);
        let reigns = reigns(&mut random, end);
        let mut ancestors: Vec<(Timeline, Lsn)> = Vec::new();
        for (at, reign) in reigns.iter().enumerate() {
            let next = reigns.get(at + 1);
            let is_promoted = next.is_some_and(|next| next.wal.system_id == reign.wal.system_id);
            // What the dead primary had written beyond the switch, or all of an upgraded one.
            let beyond = if is_promoted && random.random_bool(0.6) { random.random_range(0.0..60.0) } else { 0.0 };
            world.write(reign, &ancestors, (reign.to + beyond).min(end));
            ancestors.push((reign.wal.timeline, lsn(reign.to)));
            if !is_promoted {
                ancestors.clear();
            }
        }
        let every = random.random_range(3.0..50.0);
        let mut at = random.random_range(0.0..10.0);
        let mut count = 0;
        while at < end - 1.0 {
            let reign = reigns.iter().find(|reign| reign.from <= at && at < reign.to);
            if let Some(reign) = reign {
                world.back_up(&format!("bk_{count:03}"), reign.wal, at);
                count += 1;
            }
            at += every * random.random_range(0.3..1.7);
        }
        world.spoil(&mut random);
        world.decide(&mut random, end);
        world
    }

    /// Writes a branch's WAL from the segment of its beginning on.
    fn write(&mut self, reign: &Reign, ancestors: &[(Timeline, Lsn)], until: f64) {
        let segments = number(reign.from)..number(until).max(number(reign.from) + 1);
        let segments = segments.map(|number| (number, SegmentFacts::default())).collect();
        let timeline = reign.wal.timeline;
        let history = (timeline.0 > 1).then(|| TimelineHistory { timeline, ancestors: ancestors.to_vec() });
        let segment_size = SegmentSize::new(SIZE.into()).expect("a size");
        let branch = BranchWal { segment_size, segments, history, parent: None, divergence: None };
        self.catalog.branches.insert(reign.wal, branch);
        self.last_stored.insert(reign.wal, time(lsn(until)));
    }

    /// Begins an hour before `at`.
    fn back_up(&mut self, id: &str, wal: WalBranch, at: f64) {
        let facts = BackupFacts {
            id: id.parse().expect("an id"),
            wal,
            start_lsn: lsn((at - 1.0).max(0.0)),
            stop_lsn: lsn(at),
            stopped_at_us: time(lsn(at)).as_microsecond(),
        };
        let seen_at = time(lsn(at)) + SignedDuration::from_mins(if id.starts_with("bk_") { 0 } else { 5 });
        self.candidates.push(Candidate { facts, seen_at, expired_at: None, is_proven: false, is_doubtful: false });
    }

    /// Gaps in the WAL, proofs, doubts, and some that are in the trash.
    fn spoil(&mut self, random: &mut StdRng) {
        for branch in self.catalog.branches.values_mut() {
            let numbers: Vec<u64> = branch.segments.keys().copied().collect();
            for _ in 0..random.random_range(0..4) {
                if random.random_bool(0.3) {
                    let from = numbers[random.random_range(0..numbers.len())];
                    let to = from + random.random_range(1..4);
                    branch.segments.retain(|number, _| !(from..to).contains(number));
                }
            }
        }
        for candidate in &mut self.candidates {
            candidate.is_proven = random.random_bool(0.1);
            candidate.is_doubtful = random.random_bool(0.1);
            if random.random_bool(0.1) {
                candidate.expired_at = Some(candidate.seen_at + hours(1));
            }
            // Commits are seen a while after the stop, at times much later.
            if random.random_bool(0.2) {
                candidate.seen_at += SignedDuration::from_mins(random.random_range(0..600));
            }
        }
    }

    fn decide(&mut self, random: &mut StdRng, end: f64) {
        let copies = |random: &mut StdRng, most| if random.random_bool(0.5) { random.random_range(0..most) } else { 0 };
        self.promise = Promise {
            window: hours(random.random_range(0..300)),
            calendar: Calendar {
                daily: copies(random, 10),
                weekly: copies(random, 4),
                monthly: copies(random, 3),
                yearly: copies(random, 2),
                ..Calendar::none()
            },
            minimum: random.random_range(0..4),
            trash: hours(random.random_range(0..200)),
        };
        let candidates: Vec<Candidate> = self.candidates.clone();
        if candidates.is_empty() {
            return;
        }
        let one = |random: &mut StdRng| candidates[random.random_range(0..candidates.len())].clone();
        let hold = |name: &str, subject| Hold {
            hold: name.parse().expect("an id"),
            subject,
            reason: String::new(),
            owner: String::new(),
            until_us: None,
        };
        if random.random_bool(0.3) {
            self.holds.push(hold("hold_b", HoldSubject::Backup(one(random).facts.id)));
        }
        if random.random_bool(0.3) {
            let facts = one(random).facts;
            let end = Lsn(facts.stop_lsn.0 + random.random_range(1..50 * u64::from(SIZE)));
            self.holds.push(hold("hold_w", HoldSubject::Wal { branch: facts.wal, start: facts.start_lsn, end }));
        }
        if random.random_bool(0.3) {
            let facts = one(random).facts;
            let end =
                random.random_bool(0.7).then(|| Lsn(facts.stop_lsn.0 + random.random_range(1..50 * u64::from(SIZE))));
            let stretch = HeldStretch { base: facts.id, end, from_us: 0, to_us: None };
            self.holds.push(hold("hold_s", HoldSubject::Stretch(stretch)));
        }
        if random.random_bool(0.3) {
            let parent = one(random).facts;
            let floor = lsn(random.random_range(0.0..end));
            let session: BackupId = "bk_open".parse().expect("an id");
            let open = Open { session, parents: vec![parent.id], run: None, wal: parent.wal, wal_floor: floor };
            self.open.push(open);
        }
    }

    /// Of what system, and from where on, a stretch holds WAL.
    pub fn held(&self, stretch: &HeldStretch) -> Option<(SystemId, Lsn)> {
        let base = self.candidates.iter().find(|candidate| candidate.facts.id == stretch.base)?;
        Some((base.facts.wal.system_id, base.facts.start_lsn))
    }

    pub fn given(&self) -> Given<'_> {
        Given {
            now: self.now,
            promise: &self.promise,
            candidates: &self.candidates,
            catalog: &self.catalog,
            last_stored: &self.last_stored,
            trimmed: &self.trimmed,
            holds: &self.holds,
            open: &self.open,
            doubts: &[],
        }
    }

    pub fn time_of(&self, lsn: Lsn) -> Timestamp {
        time(lsn)
    }

    /// Positions on a way to ask for: around its backups, and spread over all of it.
    pub fn targets(&self, tip: &WalBranch, branch: &BranchWal) -> Vec<Lsn> {
        let last = branch.segments.last_key_value().map_or(1, |(number, _)| *number) * u64::from(SIZE);
        let spread = (1..=8).map(|part| Lsn(last / 8 * part + 9));
        let of_system = self.candidates.iter().filter(|candidate| candidate.facts.wal.system_id == tip.system_id);
        let stops = of_system.map(|candidate| candidate.facts.stop_lsn).step_by(3);
        let edge = (self.now - self.promise.window).duration_since(begun()).as_secs_f64() / 3600.0;
        let edge = (edge > 0.0).then(|| [lsn(edge), Lsn(lsn(edge).0 + 100)]);
        spread.chain(stops).chain(edge.into_iter().flatten()).collect()
    }

    /// How many copies are promised of what.
    #[expect(clippy::type_complexity, reason = "a list that is read in one place")]
    pub fn calendar_units(&self) -> [(usize, fn(&Candidate) -> (i16, i16)); 4] {
        fn date(candidate: &Candidate) -> jiff::civil::Date {
            candidate.seen_at.to_zoned(jiff::tz::TimeZone::UTC).date()
        }
        let calendar = &self.promise.calendar;
        [
            (calendar.daily, |candidate| (date(candidate).year(), date(candidate).day_of_year())),
            (calendar.weekly, |candidate| {
                let monday = date(candidate).iso_week_date();
                (monday.year(), monday.week().into())
            }),
            (calendar.monthly, |candidate| (date(candidate).year(), date(candidate).month().into())),
            (calendar.yearly, |candidate| (date(candidate).year(), 0)),
        ]
    }
}

/// Who wrote when: failovers, and at times an upgrade.
fn reigns(random: &mut impl Rng, end: f64) -> Vec<Reign> {
    let mut turns: Vec<f64> = (0..random.random_range(0..4)).map(|_| random.random_range(1.0..end)).collect();
    turns.sort_by(f64::total_cmp);
    let mut reigns = Vec::new();
    let (mut system, mut timeline, mut from) = (7, 1, 0.0);
    for to in turns.into_iter().chain([end]) {
        reigns.push(Reign { wal: wal(system, timeline), from, to });
        from = to;
        if random.random_bool(0.25) {
            (system, timeline) = (system + 1, 1);
        } else {
            timeline += 1;
        }
    }
    reigns
}
