//! Lost attempts against a real repository in a folder: the log decides.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use walfleet_repository::cluster_log::{Author, Decision, SessionState};
use walfleet_repository::format::log_entry::{Action, Open};
use walfleet_repository::format::manifest::Counters;
use walfleet_repository::format::reference::ReferencePart;
use walfleet_repository::ids::{BackupId, ClusterName, Digest, DomainId};
use walfleet_repository::key_file::{KeyFile, KeyKind};
use walfleet_repository::layout;
use walfleet_repository::postgres::{Branch, Lsn, SegmentSize, SystemId, Timeline, WalBranch};
use walfleet_repository::signature::{Certificate, Signer};
use walfleet_repository::store::Creation;

use super::*;
use crate::fleet::{Fleet, Timing};
use crate::identity::{KeeperKey, Roster};
use crate::jobs::work::{BackupWork, Work};
use crate::jobs::{Event, Job, Jobs, NewJob, Phase};
use crate::reconcile::next_epoch;
use crate::resources::{document, stored};
use crate::state::embedded::Options;
use crate::state::{State, Txn};

pub(super) struct Room {
    folder: tempfile::TempDir,
    pub keeper: Arc<Keeper>,
    pub agent: Signer,
    pub now: Timestamp,
}

pub(super) fn orders() -> ClusterName {
    "orders".parse().expect("a name")
}

pub(super) async fn room() -> Room {
    let folder = tempfile::tempdir().expect("a folder");
    KeeperKey::create(folder.path(), "test", &KeyFile::generate(KeyKind::Recovery).expect("a key")).expect("fresh");
    let key = Arc::new(KeeperKey::load(folder.path()).expect("a key"));
    let state = State::open(&folder.path().join("state"), Options::default()).expect("a fresh state");
    let long = Duration::from_secs(3600);
    let timing = Timing {
        heartbeat: long,
        facts_interval: long,
        lost_after: long,
        lease: long,
        offer: long,
        hello: long,
        store_interval: long,
        patience: Duration::from_secs(60),
        tick: long,
        writer: long,
        history: long,
        retention: crate::fleet::RetentionTiming::of(&crate::config::RetentionConfig::default()),
    };
    let fleet = Fleet::new(timing, BTreeMap::new());
    let roster = Roster::open(state.clone()).await.expect("rows");
    let epoch = next_epoch(&state).await.expect("a state");
    let (signer, _) = Signer::generate();
    let now = Timestamp::now();
    let until = (now + SignedDuration::from_hours(24 * 30)).as_microsecond();
    let chain = key.writer_chain("db1", signer.public_key(), vec![orders()], until);
    let chain = chain.iter().map(|bytes| Certificate::decode(bytes).expect("ours")).collect();
    let agent = signer.with_chain(chain).expect("ours");
    let url = folder.path().join("repository");
    let text =
        format!("apiVersion: walfleet/v1\nkind: Repository\nname: main\nspec: {{url: 'file://{}'}}\n", url.display());
    let planned = stored::plan(&state, document::parse(&text).expect("good")).await.expect("rows");
    stored::commit(&state, 0, &planned, "ann", now).await.expect("nobody else");
    let jobs = Jobs::open(state.clone()).await.expect("rows");
    let reconciler = Reconciler::new(state, fleet, jobs, roster, key, epoch);
    let keeper = Keeper::new(reconciler);
    keeper.round(now).await;
    assert_eq!(keeper.notices(), Vec::<String>::new());
    Room { folder, keeper, agent, now }
}

impl Room {
    pub async fn repository(&self) -> Repository {
        let url = format!("file://{}", self.folder.path().join("repository").display());
        let store = Store::open(&url, &StoreOptions::default()).expect("it is there");
        Repository::open(store, None).await.expect("it is there")
    }

    /// A backup whose agent is gone, with what it left in the log.
    async fn unknown_job(&self, retries: u32) -> (Job, BackupId) {
        let jobs = &self.keeper.reconciler.jobs;
        let new = NewJob {
            cluster: orders(),
            work: Work::Backup(BackupWork {
                repository: "main".to_owned(),
                fast_checkpoint: true,
                read_all: false,
                compression_level: None,
                processes: None,
            }),
            on: None,
            requested_by: "ann".to_owned(),
            run: None,
            idempotency_key: None,
            traceparent: String::new(),
            retries,
        };
        let job = jobs.create(new, Txn::new(), self.now).await.expect("rows").expect("nothing stands against it");
        let offered = jobs.offer(&job.id, "db1", self.now).await.expect("rows").job;
        let accepted = Event::Accepted { token: offered.token };
        jobs.apply(&job.id, accepted, self.now).await.expect("rows");
        let lost = Event::LeaseLost { reason: "silence".to_owned() };
        let job = jobs.apply(&job.id, lost, self.now).await.expect("rows").job;
        let session = BackupId::generate();
        let open = Open {
            session: session.clone(),
            parents: vec![],
            run: Some(job.id.to_string()),
            wal: branch(),
            wal_floor: Lsn(0x300_0000),
        };
        self.append(Action::Begin { domain: DomainId([1; 16]), key_commitment: [2; 32] }).await;
        self.append(Action::Open(open)).await;
        (job, session)
    }

    pub async fn append(&self, action: Action) {
        let repository = self.repository().await;
        let mut log = repository.cluster_log(&orders());
        let mut action = Some(action);
        log.append::<Infallible>(Author::host(&self.agent), |_| match action.take() {
            Some(action) => Decision::Append(action),
            None => Decision::Nothing,
        })
        .await
        .expect("it is allowed");
    }

    pub async fn session(&self, session: &BackupId) -> SessionState {
        let repository = self.repository().await;
        let mut log = repository.cluster_log(&orders());
        log.refresh().await.expect("it reads").session(session).expect("it was opened").state.clone()
    }

    /// The keeper's round after `minutes`, and the job then.
    async fn after(&self, job: &Job, minutes: i64) -> Job {
        self.keeper.round(self.now + SignedDuration::from_mins(minutes)).await;
        assert_eq!(self.keeper.notices(), Vec::<String>::new());
        self.keeper.reconciler.jobs.get(&job.id).await.expect("it is there")
    }
}

pub(super) fn branch() -> WalBranch {
    WalBranch { system_id: SystemId(7), timeline: Timeline::new(1).expect("it is one"), branch: Branch::default() }
}

/// What a backup's agent says of it, without a key.
pub(super) fn part(backup: &BackupId) -> ReferencePart {
    ReferencePart {
        backup: backup.clone(),
        cluster: orders(),
        domain: DomainId([1; 16]),
        key_version: 1,
        server_version_num: 170_000,
        wal: branch(),
        start_lsn: Lsn(0x300_0000),
        stop_lsn: Lsn(0x300_0100),
        started_at_us: 1_780_000_000_000_000,
        stopped_at_us: 1_780_000_001_000_000,
        member: "db1".to_owned(),
        parents: vec![],
        counters: Counters::default(),
        damaged_page_count: 0,
        segment_size: SegmentSize::new(16 << 20).expect("the usual"),
        seen_at_us: None,
        sessions: vec![],
    }
}

#[tokio::test]
async fn an_attempt_given_up_can_commit_no_more() {
    let room = room().await;
    let (job, session) = room.unknown_job(0).await;
    assert_eq!(room.after(&job, 0).await.phase(), Phase::Unknown, "its agent has time to come back");
    assert_eq!(room.session(&session).await, SessionState::Open);
    let over = room.after(&job, 5).await;
    assert_eq!(over.phase(), Phase::Failed);
    assert!(matches!(room.session(&session).await, SessionState::Aborted { .. }));
}

#[tokio::test]
async fn an_attempt_that_had_committed_has_succeeded() {
    let room = room().await;
    let (job, session) = room.unknown_job(2).await;
    let repository = room.repository().await;
    let part = part(&session);
    let object = part.seal(&room.agent, repository.id());
    let reference_digest = Digest(*blake3::hash(&object).as_bytes());
    let created = repository.store().create(&layout::reference(&orders(), &session), object).await;
    assert_eq!(created.expect("the store answers"), Creation::Created);
    room.append(Action::Commit { session: session.clone(), manifest_digest: Digest([3; 32]), reference_digest }).await;
    let over = room.after(&job, 5).await;
    assert_eq!(over.phase(), Phase::Succeeded);
    let reported = room.keeper.reconciler.jobs.reported_backups();
    assert_eq!(reported.get(&orders()).map(|reported| reported.backup.id.clone()), Some(session));
}

#[tokio::test]
async fn what_a_lost_attempt_left_open_does_not_stand_in_the_next_ones_way() {
    let room = room().await;
    let (job, session) = room.unknown_job(2).await;
    let lost = Event::NotInJournal { token: job.token };
    room.keeper.reconciler.jobs.apply(&job.id, lost, room.now).await.expect("rows");
    assert_eq!(room.after(&job, 0).await.phase(), Phase::Queued);
    assert!(matches!(room.session(&session).await, SessionState::Aborted { .. }));
}
