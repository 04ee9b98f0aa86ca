//! The runner against work that does as it is told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use super::order::{BackupOrder, Checkpoint, WorkOrder};
use super::report::VerifyReport;
use super::*;
use crate::failure::ExitCode;

/// What each cluster's job does.
#[derive(Clone, Copy)]
enum Script {
    Succeed,
    Fail,
    Panic,
    UntilCancelled,
    Deaf,
}

#[derive(Default)]
struct Scripted {
    scripts: BTreeMap<&'static str, Script>,
    starts: AtomicU32,
}

#[async_trait]
impl Work for Scripted {
    async fn run(&self, order: JobOrder, progress: Progress, cancel: CancellationToken) -> Result<Report, Failure> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        progress.enter("copy", 100);
        match self.scripts[order.cluster.as_str()] {
            Script::Succeed => {
                Ok(Report::Verify(VerifyReport { packs: 1, segments: 0, bytes: 0, findings: Vec::new() }))
            }
            Script::Fail => Err(Failure::new("store.unreachable", ExitCode::Failed, Remedy::Retry, "no answer")),
            Script::Panic => panic!("scripted"),
            Script::UntilCancelled => {
                cancel.cancelled().await;
                Err(Failure::cancelled())
            }
            Script::Deaf => std::future::pending().await,
        }
    }
}

struct Unheard;

impl JobObserver for Unheard {
    fn ended(&self, _: WorkKind, _: &JobOutcome) {}
}

struct Bench {
    folder: tempfile::TempDir,
    work: Arc<Scripted>,
    jobs: Arc<Jobs>,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let scripts = BTreeMap::from([
        ("good", Script::Succeed),
        ("bad", Script::Fail),
        ("ugly", Script::Panic),
        ("long", Script::UntilCancelled),
        ("deaf", Script::Deaf),
    ]);
    let work = Arc::new(Scripted { scripts, ..Scripted::default() });
    let journal = Journal::open(folder.path(), Timestamp::now()).unwrap();
    let jobs = Jobs::new(journal, Arc::clone(&work) as Arc<dyn Work>, Arc::new(Unheard));
    Bench { folder, work, jobs }
}

fn order(job: &str, fencing_token: u64, cluster: &str) -> JobOrder {
    JobOrder {
        job: job.parse().unwrap(),
        attempt: 1,
        fencing_token,
        cluster: cluster.parse().unwrap(),
        traceparent: None,
        past: Vec::new(),
        work: WorkOrder::Backup(BackupOrder {
            repository: "main".into(),
            run: job.into(),
            checkpoint: Checkpoint::Spread,
            read_all: false,
            compression_level: None,
            processes: None,
        }),
    }
}

async fn outcome(jobs: &Jobs, job: &str) -> JobOutcome {
    let mut ends = jobs.ends();
    let job: JobId = job.parse().unwrap();
    loop {
        // Journalled first, then taken from what runs, then announced.
        let running = jobs.now_running().iter().any(|running| running.job == job);
        if let Some(outcome) = jobs.outcome(&job).filter(|_| !running) {
            return outcome;
        }
        tokio::time::timeout(Duration::from_secs(10), ends.changed()).await.expect("the job ends").unwrap();
    }
}

#[tokio::test]
async fn a_job_runs_once_however_often_it_is_offered() {
    let bench = bench();
    assert_eq!(bench.jobs.offer(order("job_a", 1, "good")).await, Answer::Start);
    assert_eq!(bench.jobs.offer(order("job_a", 1, "good")).await, Answer::AlreadyTaken);
    let first = outcome(&bench.jobs, "job_a").await;
    assert!(matches!(first.ending, Ending::Succeeded(_)));
    assert_eq!(bench.jobs.offer(order("job_a", 1, "good")).await, Answer::AlreadyTaken);
    bench.jobs.acknowledge(first.job.clone(), 1).await;
    assert_eq!(bench.jobs.offer(order("job_a", 1, "good")).await, Answer::AlreadyTaken);
    assert_eq!(bench.work.starts.load(Ordering::SeqCst), 1);
    assert!(bench.jobs.unsettled().is_empty());
}

#[tokio::test]
async fn failures_and_panics_are_outcomes() {
    let bench = bench();
    bench.jobs.offer(order("job_a", 1, "bad")).await;
    bench.jobs.offer(order("job_b", 2, "ugly")).await;
    let Ending::Failed { code, exit_code, retryable, .. } = outcome(&bench.jobs, "job_a").await.ending else {
        panic!("expected a failure");
    };
    assert_eq!((code.as_str(), exit_code, retryable), ("store.unreachable", 1, true));
    assert!(matches!(
        outcome(&bench.jobs, "job_b").await.ending,
        Ending::Failed { code, retryable: true, .. } if code == "agent.panicked"
    ));
    assert!(bench.jobs.now_running().is_empty());
}

#[tokio::test]
async fn one_backup_per_instance_and_cancelling_frees_it() {
    let bench = bench();
    bench.jobs.offer(order("job_a", 5, "long")).await;
    assert!(matches!(bench.jobs.offer(order("job_b", 6, "long")).await, Answer::Refused { busy: true, .. }));
    bench.jobs.cancel(&"job_a".parse().unwrap(), 4);
    assert_eq!(bench.jobs.now_running().len(), 1, "an older token cancels nothing");
    bench.jobs.cancel(&"job_a".parse().unwrap(), 5);
    assert_eq!(outcome(&bench.jobs, "job_a").await.ending, Ending::Cancelled);
    assert_eq!(bench.jobs.offer(order("job_b", 6, "long")).await, Answer::Start);
}

#[tokio::test]
async fn a_newer_attempt_stops_the_older_before_it_starts() {
    let bench = bench();
    bench.jobs.offer(order("job_a", 5, "long")).await;
    let second = JobOrder { attempt: 2, ..order("job_a", 9, "long") };
    assert_eq!(bench.jobs.offer(second.clone()).await, Answer::Superseding);
    assert_eq!(outcome(&bench.jobs, "job_a").await.ending, Ending::Cancelled);
    assert_eq!(bench.jobs.offer(second).await, Answer::Start);
    assert!(matches!(bench.jobs.offer(order("job_a", 5, "long")).await, Answer::Refused { busy: false, .. }));
}

#[tokio::test]
async fn stopping_ends_jobs_as_interrupted_and_names_the_stragglers() {
    let bench = bench();
    bench.jobs.offer(order("job_a", 1, "long")).await;
    bench.jobs.offer(order("job_b", 2, "deaf")).await;
    let stragglers = bench.jobs.stop(Duration::from_millis(300)).await;
    assert_eq!(stragglers, vec!["job_b".parse::<JobId>().unwrap()]);
    assert!(matches!(bench.jobs.offer(order("job_c", 3, "good")).await, Answer::Refused { busy: true, .. }));

    let journal = Journal::open(bench.folder.path(), Timestamp::now()).unwrap();
    for job in ["job_a", "job_b"] {
        let outcome = journal.get(&job.parse().unwrap()).unwrap().outcome().unwrap();
        assert!(matches!(outcome.ending, Ending::Failed { code, .. } if code == "agent.restarted"), "{job}");
    }
}
