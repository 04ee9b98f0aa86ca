//! Plans over random histories, held against what could be restored before and can be after.

pub(super) mod world;

use std::collections::BTreeSet;

use jiff::tz::TimeZone;

use self::world::{World, hours};
use super::*;
use crate::format::log_entry::HoldSubject;
use crate::postgres::Segment;
use crate::recovery_window::{Pick, TargetPoint, TimelineChoice, choose_backup};

/// What is left once all that a plan lets go of is gone: expired backups, and WAL below its trims that no kept backup, hold or
/// session needs.
fn after(world: &World, plan: &Plan) -> (Vec<Candidate>, WalCatalog) {
    let kept: BTreeSet<&BackupId> = plan.kept().map(|decided| &decided.backup).collect();
    let left: Vec<Candidate> =
        world.candidates.iter().filter(|candidate| kept.contains(&candidate.facts.id)).cloned().collect();
    let trims = below(&plan.trims);
    let mut catalog = world.catalog.clone();
    for (wal, branch) in &mut catalog.branches {
        let Some(below) = trims.get(wal) else { continue };
        let size = branch.segment_size;
        branch.segments.retain(|number, _| {
            let segment = Segment { timeline: wal.timeline, number: *number };
            let (from, to) = (segment.start(size), segment.end(size));
            let meets = |start: Lsn, end: Lsn| start < to && from < end;
            let of_backups = left
                .iter()
                .filter(|candidate| candidate.facts.wal.system_id == wal.system_id)
                .any(|candidate| meets(candidate.facts.start_lsn, candidate.facts.stop_lsn));
            let of_holds = world.holds.iter().any(|hold| match &hold.subject {
                HoldSubject::Wal { branch, start, end } => branch == wal && meets(*start, *end),
                HoldSubject::Backup(_) => false,
                HoldSubject::Stretch(stretch) => world.held(stretch).is_some_and(|(system_id, from)| {
                    wal.system_id == system_id && meets(from, stretch.end.unwrap_or(Lsn(u64::MAX)))
                }),
            });
            to > *below || of_backups || of_holds
        });
    }
    (left, catalog)
}

/// The branches and the lowest position of each that a plan leaves.
fn below(trims: &[Trimmed]) -> BTreeMap<WalBranch, Lsn> {
    trims.iter().map(|trim| (trim.wal, trim.below)).collect()
}

fn facts(candidates: &[Candidate]) -> Vec<BackupFacts> {
    candidates.iter().map(|candidate| candidate.facts.clone()).collect()
}

fn can_reach(candidates: &[Candidate], catalog: &WalCatalog, tip: WalBranch, target: Lsn) -> bool {
    let pick = Pick { target: TargetPoint::Lsn(target), timeline: TimelineChoice::Exactly(tip), backup: None };
    choose_backup(&pick, &facts(candidates), catalog).is_ok()
}

fn restorable(candidates: &[Candidate], catalog: &WalCatalog) -> BTreeSet<BackupId> {
    let lost: Vec<BackupId> =
        recovery_windows(&facts(candidates), catalog).unrestorable.into_iter().map(|lost| lost.backup).collect();
    candidates.iter().map(|candidate| candidate.facts.id.clone()).filter(|id| !lost.contains(id)).collect()
}

/// What a plan did wrong; everything is judged from the world before and after, not from the plan's own reasons.
fn fault(world: &World) -> Result<(), String> {
    let plan = plan(&world.given());
    let (left, catalog) = after(world, &plan);
    let (before_ids, after_ids) = (restorable(&world.candidates, &world.catalog), restorable(&left, &catalog));
    let kept: BTreeSet<BackupId> = left.iter().map(|candidate| candidate.facts.id.clone()).collect();
    let fail = |what: String| Err(format!("{what}\n{plan:#?}"));
    for (tip, branch) in &world.catalog.branches {
        for target in world.targets(tip, branch) {
            let is_promised = world.time_of(target) >= plan.edge;
            let could = can_reach(&world.candidates, &world.catalog, *tip, target);
            if is_promised && could && !can_reach(&left, &catalog, *tip, target) {
                return fail(format!("{target} on {tip:?} was promised and cannot be reached any more"));
            }
        }
    }
    if let Some(lost) = kept.iter().find(|id| before_ids.contains(id) && !after_ids.contains(id)) {
        return fail(format!("{lost} is kept and cannot be restored any more"));
    }
    let minimum = world.promise.minimum.max(1);
    if after_ids.len() < minimum.min(before_ids.len()) {
        return fail(format!("{} restorable backups are left of {}", after_ids.len(), before_ids.len()));
    }
    for hold in &world.holds {
        match &hold.subject {
            HoldSubject::Backup(held) if !kept.contains(held) => return fail(format!("{held} is held")),
            HoldSubject::Backup(_) => {}
            HoldSubject::Stretch(stretch) if !kept.contains(&stretch.base) => {
                return fail(format!("{} is the base of what is held", stretch.base));
            }
            HoldSubject::Stretch(stretch) => {
                for (tip, branch) in &world.catalog.branches {
                    for target in
                        world.targets(tip, branch).into_iter().filter(|at| stretch.end.is_none_or(|end| *at < end))
                    {
                        let base: Vec<Candidate> =
                            world.candidates.iter().filter(|one| one.facts.id == stretch.base).cloned().collect();
                        if can_reach(&base, &world.catalog, *tip, target) && !can_reach(&base, &catalog, *tip, target) {
                            return fail(format!("{target} on {tip:?} is held and cannot be reached any more"));
                        }
                    }
                }
            }
            HoldSubject::Wal { branch, start, end } => {
                let there = |catalog: &WalCatalog| {
                    let segments = &catalog.branches[branch].segments;
                    let size = u64::from(world::SIZE);
                    segments.range(start.0 / size..end.0.div_ceil(size)).count()
                };
                if there(&catalog) < there(&world.catalog) {
                    return fail(format!("WAL held from {start} to {end} is gone"));
                }
            }
        }
    }
    for open in &world.open {
        if let Some(parent) = open.parents.iter().find(|parent| !kept.contains(*parent)) {
            return fail(format!("{parent} is a parent of a session under way"));
        }
        let is_cut = |trim: &&Trimmed| trim.wal.system_id == open.wal.system_id && trim.below > open.wal_floor;
        if plan.trims.iter().any(|trim| is_cut(&trim)) {
            return fail(format!("session {} needs WAL from {} on", open.session, open.wal_floor));
        }
    }
    let whole: Vec<&Candidate> =
        world.candidates.iter().filter(|candidate| before_ids.contains(&candidate.facts.id)).collect();
    for (count, unit) in world.calendar_units() {
        let slots: BTreeSet<_> = whole.iter().map(|candidate| unit(candidate)).collect();
        for slot in slots.iter().rev().take(count) {
            let in_slot = |candidate: &&&Candidate| unit(candidate) == *slot;
            let kept_ones = whole.iter().filter(in_slot).filter(|candidate| kept.contains(&candidate.facts.id));
            let proven = |candidate: &&Candidate| candidate.is_proven;
            let is_there = kept_ones.clone().next().is_some();
            let is_proven = kept_ones.copied().any(|candidate| proven(&candidate));
            if !is_there || !is_proven && whole.iter().filter(in_slot).any(proven) {
                return fail(format!("the copy of {slot:?} is not kept, or one that is proven made way"));
            }
        }
    }
    let proven = |candidates: &[Candidate], among: &BTreeSet<BackupId>| {
        candidates.iter().any(|candidate| candidate.is_proven && among.contains(&candidate.facts.id))
    };
    if proven(&world.candidates, &before_ids) && !proven(&left, &after_ids) {
        return fail("no proven backup is left".to_owned());
    }
    economical(world, &plan, &left, &catalog)
}

/// Nothing stays without a reason, and a second look changes nothing.
fn economical(world: &World, plan: &Plan, left: &[Candidate], catalog: &WalCatalog) -> Result<(), String> {
    for decided in &plan.backups {
        if let Decision::Keep(whys) | Decision::BringBack(whys) = &decided.decision
            && whys.is_empty()
        {
            return Err(format!("{} is kept without a reason", decided.backup));
        }
    }
    let kept: Vec<Candidate> =
        left.iter().map(|candidate| Candidate { expired_at: None, ..candidate.clone() }).collect();
    let trimmed = below(&plan.trims);
    let again = super::plan(&Given { candidates: &kept, catalog, trimmed: &trimmed, ..world.given() });
    match again.backups.iter().find(|decided| !matches!(decided.decision, Decision::Keep(_))) {
        Some(decided) => Err(format!("{} is kept at first and not at a second look: {again:#?}", decided.backup)),
        None => Ok(()),
    }
}

fn try_worlds(seeds: std::ops::Range<u64>) {
    let (mut kept, mut expired, mut trimmed) = (0, 0, 0);
    for seed in seeds {
        let world = World::random(seed);
        if let Err(fault) = fault(&world) {
            panic!("world {seed}: {fault}\n{world:#?}");
        }
        let plan = plan(&world.given());
        kept += plan.kept().count();
        expired += plan.expiring().count();
        trimmed += plan.trims.iter().map(|trim| trim.segments).sum::<usize>();
    }
    println!("kept {kept} backups, expired {expired}, trimmed {trimmed} segments");
    assert!(kept > 0 && expired > kept / 10 && trimmed > expired, "these worlds mean little");
}

#[test]
fn no_plan_removes_what_is_needed_or_keeps_without_a_reason() {
    try_worlds(0..1_000);
    // Two backups taken at once, with a gap between what the two need.
    try_worlds(11_655..11_656);
}

#[test]
#[ignore = "it takes minutes: make proof"]
fn a_hundred_thousand_plans() {
    try_worlds(1_000..101_000);
}

fn decisions(plan: &Plan) -> Vec<(&str, String)> {
    let said = |decided: &Decided| match &decided.decision {
        Decision::Keep(whys) => whys.iter().map(Why::to_string).collect::<Vec<_>>().join("; "),
        other => format!("{other:?}"),
    };
    plan.backups.iter().map(|decided| (decided.backup.as_str(), said(decided))).collect()
}

#[test]
fn a_window_and_copies_keep_what_a_reader_of_the_policy_expects() {
    let mut world = World::daily(40);
    world.promise.window = hours(7 * 24);
    world.promise.calendar = Calendar { daily: 0, weekly: 4, monthly: 2, yearly: 1, time_zone: TimeZone::UTC };
    let plan = plan(&world.given());
    let kept: Vec<&str> = plan.kept().map(|decided| decided.backup.as_str()).collect();
    // Day 0 is 1 January 2026, a Thursday. The window goes back to day 33, 13:00; weeks end with days 24, 31 and 38, the month
    // with day 30.
    let expected: Vec<String> = [24, 30, 31].into_iter().chain(33..=40).map(|day| format!("bk_{day:03}")).collect();
    assert_eq!(kept, expected);
    let said = decisions(&plan);
    assert_eq!(said[33].1, "the recovery window from 2026-02-03 13:00:00 UTC on begins with it");
    assert_eq!(said[30].1, "monthly copy of 2026-01");
    assert_eq!(plan.trims.len(), 1);
    assert_eq!(world.time_of(plan.trims[0].below), world.candidates[33].seen_at - hours(2), "where that backup begins");
}

#[test]
fn days_begin_where_the_policy_says() {
    let mut world = World::daily(10);
    // Taken at noon in UTC: on Kiritimati, 14 hours ahead, that is the next day.
    world.promise = Promise { window: hours(1), calendar: Calendar { daily: 2, ..Calendar::none() }, ..world.promise };
    world.promise.calendar.time_zone = TimeZone::get("Pacific/Kiritimati").expect("it is known");
    let said = decisions(&plan(&world.given())).pop().expect("the newest").1;
    assert!(said.contains("daily copy of 2026-01-12"), "{said}");
}

#[test]
fn after_an_upgrade_the_old_system_is_kept_for_as_long_as_the_window_reaches_into_it() {
    // Upgraded on day 20.
    let world = |days| {
        let mut world = World::upgraded(days, 20);
        world.promise.window = hours(7 * 24);
        world
    };
    let old_ones = |world: &World| {
        let is_old = |decided: &&Decided| decided.backup.as_str() <= "bk_020";
        plan(&world.given()).kept().filter(is_old).map(|decided| decided.backup.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(old_ones(&world(24)), ["bk_017", "bk_018", "bk_019", "bk_020"]);
    assert_eq!(old_ones(&world(27)), ["bk_020"], "to its last second");
    assert!(old_ones(&world(29)).is_empty());
    let trims = plan(&world(29).given()).trims;
    assert_eq!(trims.len(), 2, "the old system's WAL goes, too: {trims:?}");
}

#[test]
fn what_lies_in_the_trash_waits_is_purged_or_comes_back() {
    let mut world = World::daily(20);
    world.promise.window = hours(5 * 24);
    let now = world.now;
    world.candidates[3].expired_at = Some(now - hours(8 * 24));
    world.candidates[4].expired_at = Some(now - hours(24));
    world.candidates[18].expired_at = Some(now - hours(24));
    let plan = plan(&world.given());
    assert_eq!(plan.backups[3].decision, Decision::Purge);
    assert_eq!(plan.backups[4].decision, Decision::Wait { until: now + hours(6 * 24) });
    assert_eq!(plan.backups[18].decision, Decision::BringBack(vec![Why::InWindow]));
}

#[test]
fn nothing_is_removed_where_the_clock_the_catalog_or_the_amount_is_doubtful() {
    let mut world = World::daily(20);
    world.promise.window = hours(17 * 24);
    assert_eq!(plan(&world.given()).refused, []);
    let early = World { now: world.now - hours(2), ..world.clone() };
    assert!(matches!(plan(&early.given()).refused[..], [Refusal::ClockBehind { .. }]));
    let mut damaged = world.clone();
    damaged.catalog.damaged.push("a segment".to_owned());
    assert!(matches!(plan(&damaged.given()).refused[..], [Refusal::CatalogDoubtful { .. }]));
    world.promise.window = hours(24);
    let refused = plan(&world.given()).refused;
    assert!(matches!(refused[..], [Refusal::TooManyBackups { would: 19, of: 21 }]), "{refused:?}");
    assert!(refused[0].is_brake());
}

#[test]
fn backups_that_claim_other_times_push_none_out() {
    let mut world = World::daily(10);
    world.promise.window = hours(3 * 24);
    let base = |world: &World| {
        let is_base = |decided: &&Decided| matches!(&decided.decision, Decision::Keep(whys) if whys.iter().any(|why| matches!(why, Why::WindowBase { .. })));
        plan(&world.given()).backups.iter().find(is_base).map(|decided| decided.backup.to_string())
    };
    assert_eq!(base(&world).as_deref(), Some("bk_007"));
    // A host whose clock is a year behind, and one whose clock is a year ahead.
    world.candidates[8].facts.stopped_at_us -= 365 * 86_400_000_000;
    assert_eq!(base(&world).as_deref(), Some("bk_007"));
    world.candidates[7].facts.stopped_at_us += 365 * 86_400_000_000;
    assert_eq!(base(&world).as_deref(), Some("bk_006"), "one more than needed");
}
