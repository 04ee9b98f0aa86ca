//! `wal find`: which transactions committed around a moment, and how to restore to just before each.

use jiff::Timestamp;
use serde::Serialize;
use walfleet_repository::ids::{ClusterName, JobId};

use crate::cli::progress::ProgressLines;
use crate::cli::wal::FindArgs;
use crate::cli::{print, time, usage};
use crate::failure::Failure;
use crate::jobs::Work;
use crate::jobs::order::{JobOrder, WalFindOrder, WorkOrder};
use crate::jobs::report::Report;
use crate::progress::Progress;
use crate::wal::find::report::{CommitPoint, FindReport};
use crate::wal::find::select::Show;
use crate::wal::find::{FEW_LISTED, MOST_LISTED};

#[derive(Serialize)]
struct Found<'a> {
    cluster: &'a ClusterName,
    #[serde(flatten)]
    report: &'a FindReport,
    omitted: u64,
}

pub fn find(args: FindArgs) -> Result<(), Failure> {
    let around = time::parse(&args.around, &time::host_zone()).map_err(usage)?;
    let (show, most) = if args.all { (Show::All, MOST_LISTED) } else { (Show::Notable, FEW_LISTED) };
    super::run_async(&super::quiet(), |cancel| async move {
        let mut opened = super::open::open(&args.repository)?;
        let repository = opened.cluster(&args.cluster)?.repository.name.clone();
        let order = WalFindOrder {
            repository,
            around,
            within: args.within,
            timeline: args.timeline,
            limit: args.limit.map_or(most, |limit| limit as usize),
            show,
        };
        let order = JobOrder::of_a_person(JobId::generate(), args.cluster.clone(), WorkOrder::WalFind(order));
        let progress = Progress::new();
        let lines = ProgressLines::show("wal find", progress.clone());
        let report = opened.work()?.run(order, progress.clone(), cancel).await?;
        drop(lines);
        let Report::WalFind(report) = report else {
            return Err(super::failed("the work answered with something else than a search"));
        };
        let found = Found { cluster: &args.cluster, report: &report, omitted: report.omitted() };
        print::output(args.output.format, &found, table)
    })
}

fn table(found: &Found<'_>) -> String {
    let report = found.report;
    let mut text = String::new();
    if report.transactions.is_empty() {
        text += &format!("no commit is stored between {} and {}\n", precise(report.from), precise(report.to));
    } else {
        let rows: Vec<Vec<String>> = report
            .transactions
            .iter()
            .map(|one| {
                let restore = one.restore.clone().or_else(|| one.not_restorable.clone());
                vec![
                    precise(one.committed_at),
                    one.xid.to_string(),
                    one.lsn.to_string(),
                    print::bytes(one.wal_bytes),
                    one.what.clone(),
                    restore.unwrap_or_default(),
                ]
            })
            .collect();
        text += &print::table(&["COMMITTED", "XID", "LSN", "WAL", "WHAT IT DID", "RESTORE TO JUST BEFORE"], &rows);
    }
    let omitted = match found.omitted {
        0 => String::new(),
        count => format!("{count} more commits between {} and {}", precise(report.from), precise(report.to)),
    };
    let beside = |point: &Option<CommitPoint>| match point {
        Some(point) => format!("{} (xid {}, ending at {})", precise(point.at), point.xid, point.lsn),
        None => "none is known".to_owned(),
    };
    let fields = [
        ("not listed", omitted),
        ("commit before", beside(&report.before)),
        ("commit after", beside(&report.after)),
        ("notes", report.notes.join("; ")),
    ];
    let fields: Vec<_> = fields.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    text += "\n";
    text += &print::fields(&fields);
    text
}

/// To the microsecond: beside a commit a second is too coarse.
fn precise(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S%.f UTC").to_string()
}
