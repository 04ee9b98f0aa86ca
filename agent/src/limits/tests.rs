//! Work that waits, and what makes it wait no longer. Bounds are from above only: a busy machine is slower, never faster.

use std::time::Instant;

use walfleet_repository::limits::{ByteRate, CpuShare};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn rate(bytes_per_second: u64) -> Option<ByteRate> {
    Some(ByteRate::from_bytes_per_second(bytes_per_second).unwrap())
}

/// A host that owes minutes of reading and sending.
fn in_debt() -> (Arc<HostLimits>, CancellationToken, Allowance) {
    let limits = HostLimits::new(LimitsSpec { read: rate(100_000), upload: rate(100_000), ..LimitsSpec::NONE });
    let cancel = CancellationToken::new();
    let allowance = limits.allowance(&cancel);
    allowance.read(20_000_000);
    limits.note_upload(20_000_000);
    (limits, cancel, allowance)
}

#[test]
fn a_limit_that_is_changed_holds_for_work_that_waits_already() {
    let (limits, _cancel, allowance) = in_debt();
    let waiting = std::thread::spawn(move || allowance.read(1));
    std::thread::sleep(SECOND / 10);
    assert!(!waiting.is_finished());
    limits.set(LimitsSpec { read: rate(1_000_000_000), ..LimitsSpec::NONE });
    let changed = Instant::now();
    waiting.join().unwrap();
    assert!(changed.elapsed() < 10 * SECOND);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_waits_for_nothing_and_sends_nothing_more() {
    let (_limits, cancel, allowance) = in_debt();
    let (reader, sender) = (allowance.clone(), allowance.clone());
    let reading = tokio::task::spawn_blocking(move || reader.read(1));
    let sending = tokio::spawn(async move { sender.upload(1).await });
    tokio::time::sleep(SECOND / 10).await;
    assert!(!reading.is_finished() && !sending.is_finished());
    cancel.cancel();
    let cancelled = Instant::now();
    reading.await.unwrap();
    assert_eq!(sending.await.unwrap(), Err(Stopped));
    assert_eq!(allowance.upload(1).await, Err(Stopped));
    assert!(cancelled.elapsed() < 10 * SECOND);
}

#[test]
fn all_jobs_of_a_host_share_one_limit() {
    let limits = HostLimits::new(LimitsSpec { read: rate(10_000_000), ..LimitsSpec::NONE });
    let began = Instant::now();
    let job = || {
        let allowance = limits.allowance(&CancellationToken::new());
        let mut taken = 0;
        while began.elapsed() < SECOND / 2 {
            allowance.read(100_000);
            taken += 100_000;
        }
        taken
    };
    let taken: u64 = std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..4).map(|_| scope.spawn(job)).collect();
        jobs.into_iter().map(|job| job.join().unwrap()).sum()
    });
    let most = 10_000_000.0 * began.elapsed().as_secs_f64() + 4.0 * 100_000.0 + 1_000_000.0;
    assert!((taken as f64) <= most && taken > 400_000, "{taken} of {most}");
}

#[test]
fn threads_together_work_no_more_than_their_share_of_the_cores() {
    let percent = u32::try_from(40 / cores()).unwrap().max(1);
    let share = CpuShare::from_percent(percent).unwrap();
    let limits = HostLimits::new(LimitsSpec { cpu: Some(share), ..LimitsSpec::NONE });
    let began = Instant::now();
    let clock = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
    };
    let burn = || {
        let allowance = limits.allowance(&CancellationToken::new());
        while began.elapsed() < SECOND {
            let before = clock();
            while clock() - before < SECOND / 500 {}
            allowance.work();
        }
        clock()
    };
    let burnt: Duration = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(burn)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let granted = began.elapsed().mul_f64(f64::from(percent) / 100.0 * cores() as f64);
    assert!(burnt < granted + SECOND / 5, "{burnt:?} of {granted:?}");
}

/// Of the calling thread, as the kernel has it (proc_pid_stat(5), field 19; the name in field 2 may hold spaces).
fn nice() -> i32 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(16).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_and_all_threads_they_make_have_a_low_priority_and_what_they_hand_back_has_not() {
    let own = nice();
    let bulk = threads::BulkThreads::new(&HostLimits::new(LimitsSpec::NONE)).unwrap();
    let normal = bulk.normal().clone();
    let seen = bulk.run(async move {
        let task = tokio::spawn(async { nice() }).await.unwrap();
        let blocking = tokio::task::spawn_blocking(nice).await.unwrap();
        let thread = std::thread::spawn(nice).join().unwrap();
        let handed_back = crate::tasks::settled(normal.spawn(async { nice() })).await;
        ([nice(), task, blocking, thread], handed_back)
    });
    assert_eq!(seen.await, ([threads::NICE; 4], own));
    assert_eq!(nice(), own);
}
