use proptest::prelude::*;
use walfleet_repository::ids::JobId;

use super::*;
use crate::jobs::samples;
use crate::jobs::work::{BackupWork, Work};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_780_000_000 + seconds).expect("in range")
}

fn job(retries: u32) -> Job {
    let work = Work::Backup(BackupWork {
        repository: "main".to_owned(),
        fast_checkpoint: true,
        read_all: false,
        compression_level: None,
        processes: None,
    });
    Job { id: JobId::generate(), retries, ..samples::queued(work, at(0)) }
}

fn failed(retryable: bool) -> Outcome {
    let error = JobError { code: "store.away".to_owned(), message: "no answer".to_owned(), exit_code: 1, retryable };
    Outcome { verdict: Verdict::Failed(error), started_at: None, finished_at: None, report: None, cost: None }
}

fn succeeded() -> Outcome {
    Outcome { verdict: Verdict::Succeeded, started_at: None, finished_at: None, report: None, cost: None }
}

const TOKEN: FencingToken = FencingToken(7);

fn offer(token: u64) -> Event {
    Event::Offer { agent: "db1".to_owned(), token: FencingToken(token) }
}

/// Applies events one after the other, a second apart; refusals and repetitions leave the job as it is.
fn after(job: Job, events: Vec<Event>) -> Job {
    events.into_iter().enumerate().fold(job, |job, (i, event)| match job.on_event(event, at(10_000 + i as i64)) {
        Step::To(next) => *next,
        Step::Unchanged | Step::Refused(_) => job,
    })
}

fn accepted() -> Event {
    Event::Accepted { token: TOKEN }
}

fn lease_lost() -> Event {
    Event::LeaseLost { reason: "silence".to_owned() }
}

fn not_in_journal() -> Event {
    Event::NotInJournal { token: TOKEN }
}

fn cancel() -> Event {
    Event::Cancel { by: "ann".to_owned() }
}

fn ended(outcome: Outcome) -> Event {
    Event::Ended { token: TOKEN, outcome }
}

fn declined(busy: bool) -> Event {
    Event::Declined { token: TOKEN, reason: "no".to_owned(), busy }
}

fn given_up(outcome: Option<Outcome>) -> Event {
    Event::GivenUp { outcome, reason: "gone".to_owned() }
}

#[test]
fn every_course_ends_where_the_diagram_says() {
    let table: Vec<(&str, u32, Vec<Event>, Phase)> = vec![
        ("the good one", 0, vec![offer(7), accepted(), ended(succeeded())], Phase::Succeeded),
        ("the answer was lost", 0, vec![offer(7), ended(succeeded())], Phase::Succeeded),
        ("a busy agent", 0, vec![offer(7), declined(true)], Phase::Queued),
        ("an agent that will never do it", 3, vec![offer(7), declined(false)], Phase::Failed),
        ("a failure that may pass", 1, vec![offer(7), accepted(), ended(failed(true))], Phase::Queued),
        ("one that will not", 1, vec![offer(7), accepted(), ended(failed(false))], Phase::Failed),
        ("no retries left", 0, vec![offer(7), accepted(), ended(failed(true))], Phase::Failed),
        ("lease lost", 0, vec![offer(7), accepted(), lease_lost()], Phase::Unknown),
        ("lease lost, it runs on", 0, vec![offer(7), accepted(), lease_lost(), accepted()], Phase::Running),
        ("lease lost, it had ended", 0, vec![offer(7), accepted(), lease_lost(), ended(succeeded())], Phase::Succeeded),
        ("lease lost, restarted", 0, vec![offer(7), accepted(), lease_lost(), not_in_journal()], Phase::Failed),
        ("the same with a retry", 1, vec![offer(7), accepted(), lease_lost(), not_in_journal()], Phase::Queued),
        ("the offer never arrived", 0, vec![offer(7), not_in_journal()], Phase::Offered),
        ("the same, found out later", 0, vec![offer(7), lease_lost(), not_in_journal()], Phase::Offered),
        ("cancelled in the queue", 3, vec![cancel()], Phase::Cancelled),
        ("cancelled while offered, not taken", 3, vec![offer(7), cancel(), declined(true)], Phase::Cancelled),
        ("cancelled while offered, never arrived", 3, vec![offer(7), cancel(), not_in_journal()], Phase::Cancelled),
        ("cancelled while offered, taken", 3, vec![offer(7), cancel(), accepted()], Phase::Running),
        ("cancelled too late", 3, vec![offer(7), accepted(), cancel(), ended(succeeded())], Phase::Succeeded),
        (
            "cancelled, failed on the way out",
            3,
            vec![offer(7), accepted(), cancel(), ended(failed(true))],
            Phase::Failed,
        ),
        ("cancelled, its agent restarted", 3, vec![offer(7), accepted(), cancel(), not_in_journal()], Phase::Cancelled),
        ("cancelled while unknown", 3, vec![offer(7), accepted(), lease_lost(), cancel()], Phase::Cancelled),
        (
            "given up, the log knows",
            0,
            vec![offer(7), accepted(), lease_lost(), given_up(Some(succeeded()))],
            Phase::Succeeded,
        ),
        ("given up", 0, vec![offer(7), accepted(), lease_lost(), given_up(None)], Phase::Failed),
        ("not given up while it runs", 0, vec![offer(7), accepted(), given_up(None)], Phase::Running),
        (
            "thought lost, and had succeeded",
            1,
            vec![offer(7), accepted(), not_in_journal(), ended(succeeded())],
            Phase::Succeeded,
        ),
        ("thought lost, and runs", 1, vec![offer(7), accepted(), not_in_journal(), accepted()], Phase::Running),
    ];
    for (course, retries, events, end) in table {
        assert_eq!(after(job(retries), events).phase(), end, "{course}");
    }
}

#[test]
fn an_attempt_that_was_replaced_changes_nothing_any_more() {
    let first = after(job(3), vec![offer(7), accepted(), lease_lost(), not_in_journal()]);
    let second = after_at(first, offer(9), at(19_000));
    assert_eq!((second.phase(), second.attempt), (Phase::Offered, 2));
    for late in [accepted(), ended(succeeded()), ended(failed(false)), declined(false), not_in_journal()] {
        let step = second.on_event(late.clone(), at(20_000));
        let stale = Refusal::Stale { token: TOKEN, newest: FencingToken(9) };
        assert_eq!(step, Step::Refused(stale), "{late:?}");
    }
    // And no attempt is begun under a token that is not newer.
    let waiting = after(job(3), vec![offer(7), declined(true)]);
    assert_eq!(waiting.on_event(offer(7), at(20_000)), Step::Refused(Refusal::OutOfPlace(Phase::Queued)));
}

#[test]
fn an_outcome_that_comes_twice_counts_once() {
    let once = after(job(2), vec![offer(7), accepted(), ended(failed(true))]);
    assert_eq!((once.phase(), once.failures), (Phase::Queued, 1));
    assert_eq!(once.on_event(ended(failed(true)), at(20_000)), Step::Unchanged);
    let over = after(job(0), vec![offer(7), accepted(), ended(failed(true))]);
    assert_eq!(over.on_event(ended(failed(true)), at(20_000)), Step::Unchanged);
    assert_eq!(over.on_event(cancel(), at(20_000)), Step::Refused(Refusal::Over(Phase::Failed)));
}

#[test]
fn retries_pause_longer_each_time_and_busy_agents_cost_none() {
    let mut current = job(5);
    let mut pauses = Vec::new();
    for token in 1..=5 {
        let now = at(token as i64 * 100_000);
        for event in [
            Event::Offer { agent: "db1".to_owned(), token: FencingToken(2 * token) },
            Event::Declined { token: FencingToken(2 * token), reason: "full".to_owned(), busy: true },
        ] {
            current = after_at(current, event, now);
        }
        let now = now + BUSY_PAUSE;
        for event in [
            Event::Offer { agent: "db1".to_owned(), token: FencingToken(2 * token + 1) },
            Event::Ended { token: FencingToken(2 * token + 1), outcome: failed(true) },
        ] {
            current = after_at(current, event, now);
        }
        let JobState::Queued { not_before, .. } = current.state else { panic!("{current:?}") };
        assert_eq!(current.on_event(offer(1000), not_before - SignedDuration::from_secs(1)), current.out_of_place());
        pauses.push(not_before.duration_since(now).as_secs());
    }
    assert_eq!(pauses, [60, 120, 240, 480, 960]);
    assert_eq!((current.failures, current.attempt), (5, 10));
}

fn after_at(job: Job, event: Event, now: Timestamp) -> Job {
    match job.on_event(event.clone(), now) {
        Step::To(next) => *next,
        other => panic!("{event:?}: {other:?}"),
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let token = (1_u64..6).prop_map(FencingToken);
    let outcome = prop::sample::select(vec![succeeded(), failed(true), failed(false)]);
    prop_oneof![
        Just(Event::Wait { reason: "host is busy".to_owned() }),
        token.clone().prop_map(|token| Event::Offer { agent: "db1".to_owned(), token }),
        token.clone().prop_map(|token| Event::Accepted { token }),
        (token.clone(), any::<bool>()).prop_map(|(token, busy)| Event::Declined {
            token,
            reason: "no".to_owned(),
            busy
        }),
        (token.clone(), outcome.clone()).prop_map(|(token, outcome)| Event::Ended { token, outcome }),
        Just(lease_lost()),
        token.prop_map(|token| Event::NotInJournal { token }),
        Just(cancel()),
        prop::option::of(outcome).prop_map(given_up),
    ]
}

proptest! {
    /// Whatever comes in whatever order: only moves of the table, tokens only grow, what is over stays, delivering the
    /// same event again changes nothing more, and a job that is over says how.
    #[test]
    fn no_order_of_events_breaks_the_machine(events in prop::collection::vec(any_event(), 1..40), retries in 0_u32..3) {
        let mut current = job(retries);
        for (i, event) in events.into_iter().enumerate() {
            let now = at(i as i64 * 5_000);
            let before = current.clone();
            if let Step::To(next) = current.on_event(event.clone(), now) {
                prop_assert!(is_transition_valid(before.phase(), next.phase()));
                prop_assert!(!before.is_over());
                prop_assert!(next.token >= before.token && next.attempt >= before.attempt);
                prop_assert!(next.failures <= retries);
                prop_assert_eq!(next.is_over(), next.finished_at.is_some());
                prop_assert!(!next.is_over() || next.outcome.is_some());
                let again = next.on_event(event.clone(), now);
                // Only cancelling is worth saying twice: the second time, nobody can be asked any more.
                prop_assert!(!matches!(again, Step::To(_)), "{:?} twice: {:?}", event, again);
                current = *next;
            }
        }
    }
}
