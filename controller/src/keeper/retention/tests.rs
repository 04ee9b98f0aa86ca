use walfleet_repository::cluster_log::{Author, SessionState};
use walfleet_repository::format::log_entry::{Action, Open};
use walfleet_repository::format::reference::{PackUse, SessionPacks};
use walfleet_repository::ids::{BackupId, Digest, DomainId, PackId};
use walfleet_repository::layout;
use walfleet_repository::postgres::{Lsn, Segment};
use walfleet_repository::retention;
use walfleet_repository::retention::gather::{Gathered, Known};

use super::super::holds::{Held, Terms, Wanted};
use super::super::tests::{Room, branch, orders, part, room};
use super::*;
use crate::resources::Span;
use crate::resources::stored::Catalog;

/// With a pack of its own, consistent in a segment that is there.
async fn back_up(room: &Room, name: &str, number: u64) -> BackupId {
    let id: BackupId = name.parse().expect("an id");
    let repository = room.repository().await;
    let store = repository.store();
    let mut part = part(&id);
    (part.start_lsn, part.stop_lsn) = (Lsn(number << 24), Lsn((number << 24) + 9));
    let pack = PackId([number as u8; 32]);
    let packs = vec![PackUse { pack, stored_bytes: 100, used_bytes: 100 }];
    part.sessions = vec![SessionPacks { session: id.clone(), cluster: None, packs }];
    let segment = Segment { timeline: branch().timeline, number };
    let key = layout::wal_segment(&orders(), &branch(), segment, part.segment_size);
    store.put_new(&key, vec![7; 1000].into()).await.expect("the store answers");
    let open = Open { session: id.clone(), parents: vec![], run: None, wal: branch(), wal_floor: part.start_lsn };
    room.append(Action::Open(open)).await;
    store.put_new(&layout::pack(&orders(), &id, pack), vec![8; 100].into()).await.expect("the store answers");
    store.put_new(&layout::manifest(&orders(), &id), vec![9; 100].into()).await.expect("the store answers");
    let object = part.seal(&room.agent, repository.id());
    let reference_digest = Digest(*blake3::hash(&object).as_bytes());
    store.put_new(&layout::reference(&orders(), &id), object).await.expect("the store answers");
    room.append(Action::Commit { session: id.clone(), manifest_digest: Digest([3; 32]), reference_digest }).await;
    id
}

struct Policy {
    room: Room,
    due: Due,
}

fn least() -> RetentionSpec {
    RetentionSpec { trash: Span::hours(7 * 24), ..RetentionSpec::least() }.in_zone("UTC")
}

impl Policy {
    /// The window is an hour long, and one backup is always kept. In force after the first day.
    async fn declared() -> Policy {
        let room = room().await;
        let catalog = Catalog::load(&room.keeper.reconciler.state).await.expect("rows");
        let spec = catalog.repositories.get("main").expect("it is declared").clone();
        let due = Due { cluster: orders(), repository: "main".to_owned(), spec, wanted: Some(least()) };
        room.append(Action::Begin { domain: DomainId([1; 16]), key_commitment: [2; 32] }).await;
        Policy { room, due }
    }

    fn at(&self, hours: i64) -> Timestamp {
        self.room.now + SignedDuration::from_hours(hours)
    }

    /// A turn so many hours from now.
    async fn turn(&self, hours: i64) -> Turn {
        let cancel = CancellationToken::new();
        let turned = self.room.keeper.keep_cluster(&self.due, self.at(hours), &cancel);
        turned.await.expect("it is done")
    }

    async fn packs(&self) -> usize {
        self.room.repository().await.store().list(&layout::packs(&orders())).await.expect("a listing").len()
    }

    async fn keeper_entry(&self, action: Action) {
        let author = Author::keeper(self.room.keeper.reconciler.keeper.signer(), self.room.keeper.reconciler.epoch);
        let mut left = Some(action);
        let repository = self.room.repository().await;
        repository.cluster_log(&orders()).append_unless_done(author, |_| left.take()).await.expect("it is allowed");
    }

    async fn hold(&self, wanted: Wanted, until: Option<i64>) -> Held {
        let terms =
            Terms { owner: "ann".to_owned(), reason: "an audit".to_owned(), until: until.map(|hours| self.at(hours)) };
        let (cluster, place) = (orders(), ("main", &self.due.spec));
        let placing = self.room.keeper.place_hold(place, &cluster, (&wanted, &terms), self.room.now);
        placing.await.expect("the store answers")
    }
}

#[tokio::test]
async fn what_no_policy_wants_goes_to_the_trash_then_out_of_the_log_and_last_out_of_the_store() {
    let policy = Policy::declared().await;
    let (first, second) = (back_up(&policy.room, "bk_1", 1).await, back_up(&policy.room, "bk_2", 2).await);
    let third = back_up(&policy.room, "bk_3", 3).await;
    let turn = policy.turn(0).await;
    assert!(turn.plan.is_none(), "it has not stood for a day yet");
    let held = policy.hold(Wanted::Backup(second.clone()), Some(30 + 9 * 24)).await;
    assert!(matches!(&held, Held::Done(holds) if holds.len() == 1), "{held:?}");
    assert_eq!(policy.hold(Wanted::Backup("bk_9".parse().expect("an id")), None).await, Held::Unknown);
    assert_eq!(policy.turn(30).await.made, 2, "the first goes, and the WAL before the third");
    let state = async |backup: &BackupId| policy.room.session(backup).await;
    assert!(matches!(state(&first).await, SessionState::Expired(..)));
    assert!(matches!((state(&second).await, state(&third).await), (SessionState::Live(_), SessionState::Live(_))));
    // What was written now has the store's present time, whatever the keeper's clock was told.
    policy.turn(30 + 5 * 24).await;
    assert!(matches!(state(&first).await, SessionState::Expired(..)));
    let turn = policy.turn(30 + 8 * 24).await;
    assert_eq!(turn.made, 1);
    assert_eq!(state(&first).await, SessionState::Purged);
    assert!(turn.collected.waiting.is_some(), "whoever reads it has a day: {turn:?}");
    assert_eq!(policy.packs().await, 3);
    let turn = policy.turn(30 + 10 * 24).await;
    assert_eq!((turn.collected.removed_objects, policy.packs().await), (3, 2), "pack, manifest and segment");
    assert!(matches!(state(&second).await, SessionState::Expired(..)), "the hold's time is over");
}

#[tokio::test]
async fn a_backup_comes_back_out_of_the_trash_and_one_that_is_gone_does_not() {
    let policy = Policy::declared().await;
    let first = back_up(&policy.room, "bk_1", 1).await;
    back_up(&policy.room, "bk_2", 2).await;
    let Policy { room, due } = &policy;
    let bring = async |backup: &BackupId| {
        let cluster = orders();
        let asked = room.keeper.bring_back("main", &due.spec, &cluster, backup, room.now);
        asked.await.expect("the store answers")
    };
    assert!(matches!(bring(&first).await, Brought::Not { .. }));
    assert_eq!(bring(&"bk_9".parse().expect("an id")).await, Brought::Unknown);
    policy.keeper_entry(Action::Expire { backup: first.clone(), reason: String::new() }).await;
    assert_eq!(bring(&first).await, Brought::Back);
    assert!(matches!(room.session(&first).await, SessionState::Live(_)));
    policy.keeper_entry(Action::Expire { backup: first.clone(), reason: String::new() }).await;
    policy.keeper_entry(Action::Purge { backup: first.clone() }).await;
    assert!(matches!(bring(&first).await, Brought::Not { .. }));
}

#[tokio::test]
async fn a_removal_far_larger_than_usual_waits_for_a_word_that_counts_once() {
    let policy = Policy::declared().await;
    for number in 1..=6 {
        back_up(&policy.room, &format!("bk_{number}"), number).await;
    }
    policy.turn(0).await;
    let turn = policy.turn(30).await;
    let plan = turn.plan.expect("it is in force");
    assert_eq!((plan.expiring().count(), turn.made), (5, 0), "{:?}", plan.refused);
    let release = async |hours: i64| {
        let (cluster, wanted) = (orders(), least());
        let released = policy.room.keeper.release("main", &cluster, (&wanted, &plan), "ann", policy.at(hours));
        released.await.expect("rows");
    };
    release(30).await;
    assert_eq!(policy.turn(30 + 25).await.made, 0, "a day is over");
    release(55).await;
    assert_eq!(policy.turn(56).await.made, 6, "five backups and the WAL");
    let row = policy.room.keeper.reconciler.state.row::<release::Released>(&release::key("main", &orders())).await;
    assert!(row.expect("rows").is_none());
}

#[tokio::test]
async fn a_policy_that_keeps_less_acts_after_a_day_or_by_a_word() {
    let mut policy = Policy::declared().await;
    for number in 1..=3 {
        back_up(&policy.room, &format!("bk_{number}"), number).await;
    }
    let more = RetentionSpec { minimum: 3, ..least() };
    policy.due.wanted = Some(more.clone());
    policy.turn(0).await;
    assert_eq!(policy.turn(30).await.plan.expect("it is in force").expiring().count(), 0);
    policy.due.wanted = Some(least());
    assert_eq!(policy.turn(31).await.made, 0);
    let keeper = &policy.room.keeper;
    let cluster = orders();
    let wanted = least();
    let planned = keeper.plan_retention("main", &policy.due.spec, &cluster, &wanted, policy.at(32));
    let planned = planned.await.expect("the store answers");
    assert_eq!((planned.plan.expiring().count(), planned.acts_from), (2, Some(policy.at(31 + 24))));
    policy.due.wanted = Some(more);
    policy.turn(33).await;
    policy.due.wanted = Some(least());
    assert_eq!(policy.turn(56).await.made, 0, "it was taken back in between");
    let keeper = &policy.room.keeper;
    keeper.release("main", &cluster, (&least(), &planned.plan), "ann", policy.at(57)).await.expect("rows");
    assert_eq!(policy.turn(57).await.made, 2, "the WAL was gone before");
}

#[tokio::test]
async fn a_held_stretch_outlives_the_backup_behind_it_and_a_session_that_nobody_ends_does_not() {
    let policy = Policy::declared().await;
    for number in 1..=3 {
        back_up(&policy.room, &format!("bk_{number}"), number).await;
    }
    policy.turn(0).await;
    // By the servers' clock, which is behind, and by the store's.
    let taken = Timestamp::from_microsecond(1_780_000_001_000_000).expect("a time");
    let stretch = Wanted::Stretch { from: Timestamp::now(), to: None };
    let held = policy.hold(stretch, None).await;
    let Held::Done(holds) = &held else { panic!("{held:?}") };
    let base = holds[0].backup().expect("it has one").clone();
    let before = Wanted::Stretch { from: taken - SignedDuration::from_hours(1), to: None };
    assert!(matches!(policy.hold(before, None).await, Held::NothingLeft(_)));
    policy.turn(30).await;
    assert!(matches!(policy.room.session(&base).await, SessionState::Live(_)));
    let holds = policy.room.keeper.holds(("main", &policy.due.spec), &orders(), policy.room.now).await;
    assert_eq!(holds.expect("the store answers").len(), 1);
    let session: BackupId = "bk_4".parse().expect("an id");
    let open = Open { session: session.clone(), parents: vec![], run: None, wal: branch(), wal_floor: Lsn(4 << 24) };
    policy.room.append(Action::Open(open)).await;
    policy.turn(13 * 24).await;
    assert!(matches!(policy.room.session(&session).await, SessionState::Open));
    policy.turn(15 * 24).await;
    assert!(matches!(policy.room.session(&session).await, SessionState::Aborted { .. }));
}

/// Between the plan and its entries an agent began a backup on a parent that the plan lets go of.
#[tokio::test]
async fn a_plan_ends_where_somebody_else_has_written() {
    let policy = Policy::declared().await;
    let first = back_up(&policy.room, "bk_1", 1).await;
    back_up(&policy.room, "bk_2", 2).await;
    let repository = policy.room.repository().await;
    let mut log = repository.cluster_log(&orders());
    let gathered = Gathered::read(&repository, &mut log, &Known::default()).await.expect("it reads");
    let plan = retention::plan(&gathered.given(policy.at(30), &least().promise(), &[]));
    assert_eq!(plan.expiring().count(), 1);
    let parents = vec![first.clone()];
    let session: BackupId = "bk_3".parse().expect("an id");
    let open = Open { session, parents, run: None, wal: branch(), wal_floor: Lsn(3 << 24) };
    policy.room.append(Action::Open(open)).await;
    assert_eq!(policy.room.keeper.carry_out(&mut log, &gathered, &plan).await.expect("it reads"), 0);
    assert!(matches!(policy.room.session(&first).await, SessionState::Live(_)));
}
