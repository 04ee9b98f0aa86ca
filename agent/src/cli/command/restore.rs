//! `restore`: brings a cluster back, here.

use std::path::PathBuf;

use walfleet_repository::ids::JobId;

use crate::cli::cost::{self, Costed};
use crate::cli::progress::ProgressLines;
use crate::cli::{RestoreArgs, print, usage};
use crate::failure::Failure;
use crate::jobs::Work;
use crate::jobs::order::{JobOrder, RestoreOrder, WorkOrder};
use crate::jobs::report::{Report, RestoreReport};
use crate::progress::Progress;

pub fn restore(args: RestoreArgs) -> Result<(), Failure> {
    let target = args.target.target()?;
    let data_dir = std::path::absolute(&args.data_dir).map_err(usage)?;
    let mut tablespaces = std::collections::BTreeMap::new();
    for (old, new) in args.tablespaces {
        let new = PathBuf::from(new);
        if !new.is_absolute() {
            return Err(usage(format!("--tablespace {old}={}: the new location is an absolute path", new.display())));
        }
        tablespaces.insert(old, new);
    }
    super::run_async(&super::quiet(), |cancel| async move {
        let mut opened = super::open::open(&args.repository)?;
        let repository = opened.cluster(&args.cluster)?.repository.name.clone();
        let order = RestoreOrder {
            repository,
            target,
            data_dir,
            tablespaces,
            backup: args.backup,
            start: args.start,
            keep_archiving: args.keep_archiving,
            port: args.port,
            delta: args.delta,
            standby: false,
            apply_delay: None,
            plan_only: args.plan,
            complete: Vec::new(),
        };
        let order = JobOrder::of_a_person(JobId::generate(), args.cluster, WorkOrder::Restore(order));
        let progress = Progress::new();
        let lines = ProgressLines::show("restore", progress.clone());
        let report = opened.work()?.run(order, progress.clone(), cancel).await?;
        drop(lines);
        let cost = &progress.cost();
        match &report {
            Report::Restore(report) => {
                print::output(args.output.format, &Costed { report, spared_bytes: None, cost }, table)
            }
            _ => Err(super::failed("the work answered with something else than a restore")),
        }
    })
}

fn table(costed: &Costed<'_, RestoreReport>) -> String {
    let report = costed.report;
    let at_most = if report.at_most { "at most " } else { "" };
    let fetched = if report.is_planned() { "to fetch" } else { "fetched" };
    let mut fields = vec![
        ("data directory", report.data_dir.display().to_string()),
        ("state", report.server_state.clone()),
        ("backup", report.backup.to_string()),
        (
            "WAL",
            format!(
                "{} to {}, timeline {}: {} in {} segment{}",
                report.wal_from_lsn,
                report.wal_to_lsn,
                report.timeline,
                print::bytes(report.wal_bytes),
                report.wal_segments,
                if report.wal_segments == 1 { "" } else { "s" }
            ),
        ),
        ("cluster size", print::bytes(report.cluster_bytes)),
        (fetched, format!("{at_most}{} in {} requests", print::bytes(report.fetched_bytes), report.store_requests)),
    ];
    if report.is_planned() {
        fields.push((
            "would take",
            match (report.estimated_seconds, &report.estimated_from) {
                (Some(seconds), Some(from)) => format!("{at_most}about {}, as {from}", print::seconds(seconds)),
                _ => "not known: neither a restore nor a backup that read everything is known".to_owned(),
            },
        ));
    }
    if report.copy_seconds > 0.0 {
        fields.push(("copied in", print::seconds(report.copy_seconds)));
    }
    if report.replay_seconds > 0.0 {
        fields.push(("replayed in", print::seconds(report.replay_seconds)));
    }
    if let Some(lsn) = &report.reached_lsn {
        let commit =
            report.reached_commit.map(|at| format!(", last commit {}", at.strftime("%Y-%m-%d %H:%M:%S%.f UTC")));
        fields.push(("stands at", format!("{lsn}{}", commit.unwrap_or_default())));
    }
    if let Some(connection) = &report.connection {
        fields.push(("connect with", format!("psql \"{connection}\"")));
    }
    if !report.is_planned() {
        fields.extend(cost::fields(costed.cost));
    }
    fields.extend(report.notes.iter().map(|note| ("note", note.clone())));
    print::fields(&fields)
}
