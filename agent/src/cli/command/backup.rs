//! `backup`: takes one now.

use walfleet_repository::ids::JobId;

use crate::cli::progress::ProgressLines;
use crate::cli::{BackupArgs, print};
use crate::failure::Failure;
use crate::jobs::Work;
use crate::jobs::order::{BackupOrder, Checkpoint, JobOrder, WorkOrder};
use crate::jobs::report::{BackupReport, Report};
use crate::progress::Progress;

pub fn backup(args: BackupArgs) -> Result<(), Failure> {
    super::run_async(&super::quiet(), |cancel| async move {
        let mut opened = super::open::open(&args.repository)?;
        opened.set_instance(&args.cluster, args.data_dir.as_deref(), args.connection)?;
        let repository = opened.cluster(&args.cluster)?.repository.name.clone();
        let job = JobId::generate();
        let order = BackupOrder {
            repository,
            run: job.to_string(),
            checkpoint: if args.fast { Checkpoint::Fast } else { Checkpoint::Spread },
            read_all: args.read_all,
            compression_level: args.compression_level,
            processes: args.processes,
        };
        let order = JobOrder::of_a_person(job, args.cluster, WorkOrder::Backup(order));
        let progress = Progress::new();
        let lines = ProgressLines::show("backup", progress.clone());
        let report = opened.work()?.run(order, progress, cancel).await?;
        drop(lines);
        match report {
            Report::Backup(report) => print::output(args.output.format, &report, table),
            _ => Err(super::failed("the work answered with something else than a backup")),
        }
    })
}

fn table(report: &BackupReport) -> String {
    let took = report.finished_at.duration_since(report.started_at).as_secs_f64();
    print::fields(&[
        ("backup", report.id.to_string()),
        ("cluster", report.cluster.to_string()),
        ("consistent from", format!("{} to {}, timeline {}", report.start_lsn, report.stop_lsn, report.timeline)),
        ("took", print::seconds(took)),
        ("cluster size", print::bytes(report.cluster_bytes)),
        ("read", print::bytes(report.read_bytes)),
        ("new", print::bytes(report.new_bytes)),
        ("stored", format!("{} in {} requests", print::bytes(report.stored_bytes), report.store_requests)),
        ("damaged pages", report.damaged_pages.to_string()),
        ("unexplained", format!("{} slots changed past the WAL", report.unexplained_slots)),
    ])
}
