//! Searches for a moment in the WAL: orders of operators inward and on to the agent, reports held to a bound.

use prost::Message;
use walfleet_proto::job::v1 as pb;

use crate::jobs::target::TimelineChoice;
use crate::jobs::work::WalFindWork;
use crate::wire::{WireError, bounded, recovery, required_time_in};

/// Transactions kept of a report, as the contract says.
const MOST_TRANSACTIONS: usize = 500;

/// Of an encoded report: it is stored in hexadecimal, in a value of 1 MiB at most.
const MOST_BYTES: usize = 384 << 10;

/// A month on either side: more is no search for a moment.
const MOST_WITHIN_SECONDS: u64 = 31 * 86_400;

/// An operator's order. An empty repository: `repository`, the cluster's own.
pub fn wal_find_in(order: pb::WalFindOrder, repository: &str) -> Result<WalFindWork, WireError> {
    let timeline = recovery::timeline_in(&order.timeline)?;
    if timeline == TimelineChoice::Current {
        let problem = "each backup has its own\nHINT: say latest, a number, or a branch.";
        return Err(WireError::new("timeline", problem));
    }
    if order.within_seconds > MOST_WITHIN_SECONDS {
        let problem = format!("{} is more than a month", order.within_seconds);
        return Err(WireError::new("within_seconds", problem));
    }
    Ok(WalFindWork {
        repository: if order.repository.is_empty() { repository.to_owned() } else { order.repository },
        around: required_time_in("around_us", order.around_us)?,
        within_seconds: order.within_seconds,
        timeline,
        limit: Some(order.limit).filter(|limit| *limit != 0),
        all: order.all,
    })
}

pub(super) fn order_out(work: &WalFindWork) -> pb::WalFindOrder {
    pb::WalFindOrder {
        repository: work.repository.clone(),
        around_us: work.around.as_microsecond(),
        within_seconds: work.within_seconds,
        timeline: recovery::timeline_out(work.timeline),
        limit: work.limit.unwrap_or_default(),
        all: work.all,
    }
}

/// What is left out can be told from the count of commits.
pub(super) fn bounded_report(mut report: pb::WalFindReport) -> pb::WalFindReport {
    report.notes.truncate(50);
    report.notes.iter_mut().for_each(|note| *note = bounded(std::mem::take(note)));
    report.transactions.truncate(MOST_TRANSACTIONS);
    while report.encoded_len() > MOST_BYTES && !report.transactions.is_empty() {
        report.transactions.truncate(report.transactions.len() / 2);
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_comes_through_as_it_was_asked() {
        let order = pb::WalFindOrder {
            repository: String::new(),
            around_us: 1_780_000_000_000_000,
            within_seconds: 300,
            timeline: "2-0f3c".to_owned(),
            limit: 7,
            all: true,
        };
        let work = wal_find_in(order.clone(), "main").unwrap();
        assert_eq!(order_out(&work), pb::WalFindOrder { repository: "main".to_owned(), ..order });
        for (bad, says) in [
            (pb::WalFindOrder { timeline: "current".to_owned(), ..pb::WalFindOrder::default() }, "timeline"),
            (pb::WalFindOrder { timeline: "0".to_owned(), ..pb::WalFindOrder::default() }, "timeline"),
            (pb::WalFindOrder { around_us: i64::MAX, ..pb::WalFindOrder::default() }, "around_us"),
            (pb::WalFindOrder { within_seconds: u64::MAX, ..pb::WalFindOrder::default() }, "within_seconds"),
        ] {
            assert_eq!(wal_find_in(bad, "main").unwrap_err().field, says);
        }
    }

    #[test]
    fn a_report_stays_below_what_is_stored_under_one_key() {
        let long = pb::FoundTransaction { what: "x".repeat(4000), ..pb::FoundTransaction::default() };
        let report = pb::WalFindReport { transactions: vec![long; 600], commits: 600, ..pb::WalFindReport::default() };
        let kept = bounded_report(report);
        assert!((1..200).contains(&kept.transactions.len()), "{}", kept.transactions.len());
        assert!(kept.encoded_len() <= MOST_BYTES && kept.commits == 600);
        let short = pb::FoundTransaction { what: "deletes 5 rows of 5/16384".to_owned(), ..Default::default() };
        let report = pb::WalFindReport { transactions: vec![short; 600], ..pb::WalFindReport::default() };
        assert_eq!(bounded_report(report).transactions.len(), MOST_TRANSACTIONS);
    }
}
