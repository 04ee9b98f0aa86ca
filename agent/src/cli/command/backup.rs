//! `backup`: takes one now.

use walfleet_repository::ids::JobId;

use crate::cli::cost::{self, Costed};
use crate::cli::progress::ProgressLines;
use crate::cli::{BackupArgs, print};
use crate::failure::Failure;
use crate::jobs::Work;
use crate::jobs::order::{BackupOrder, BackupPlanOrder, Checkpoint, JobOrder, WorkOrder};
use crate::jobs::report::{BackupPlanReport, BackupReport, Report};
use crate::progress::Progress;

pub fn backup(args: BackupArgs) -> Result<(), Failure> {
    super::run_async(&super::quiet(), |cancel| async move {
        let mut opened = super::open::open(&args.repository)?;
        opened.set_instance(&args.cluster, args.data_dir.as_deref(), args.connection)?;
        let repository = opened.cluster(&args.cluster)?.repository.name.clone();
        let job = JobId::generate();
        let work = match args.plan {
            true => WorkOrder::BackupPlan(BackupPlanOrder { repository, read_all: args.read_all }),
            false => WorkOrder::Backup(BackupOrder {
                repository,
                run: job.to_string(),
                checkpoint: if args.fast { Checkpoint::Fast } else { Checkpoint::Spread },
                read_all: args.read_all,
                compression_level: args.compression_level,
                processes: args.processes,
            }),
        };
        let order = JobOrder::of_a_person(job, args.cluster, work);
        let progress = Progress::new();
        let lines = ProgressLines::show("backup", progress.clone());
        let report = opened.work()?.run(order, progress.clone(), cancel).await?;
        drop(lines);
        let cost = &progress.cost();
        match &report {
            Report::Backup(report) => {
                let costed = Costed { report, spared_bytes: Some(report.spared_bytes()), cost };
                print::output(args.output.format, &costed, table)
            }
            Report::BackupPlan(plan) => print::output(args.output.format, plan, plan_table),
            _ => Err(super::failed("the work answered with something else than a backup")),
        }
    })
}

/// What a figure is told of whose kind nothing is known.
const NOT_KNOWN: &str = "not known";

fn plan_table(plan: &BackupPlanReport) -> String {
    let size = |bytes: Option<u64>| bytes.map_or(NOT_KNOWN.to_owned(), print::bytes);
    let read = match &plan.read_all_because {
        Some(because) => format!("{}: everything, since {because}", size(plan.read_bytes)),
        None => size(plan.read_bytes),
    };
    let requests = plan.store_requests.map(|requests| format!(" in {requests} requests")).unwrap_or_default();
    let took = match (plan.estimated_seconds, &plan.estimated_from) {
        (Some(seconds), Some(from)) => format!("about {}, as {from}", print::seconds(seconds)),
        _ => "not known: no such backup was taken yet".to_owned(),
    };
    let mut fields = vec![
        ("cluster size", print::bytes(plan.cluster_bytes)),
        ("would read", read),
        ("would store", size(plan.stored_bytes) + &requests),
        ("would take", took),
    ];
    fields.extend(plan.notes.iter().map(|note| ("note", note.clone())));
    print::fields(&fields)
}

fn table(costed: &Costed<'_, BackupReport>) -> String {
    let report = costed.report;
    let read = match &report.read_all_because {
        Some(because) => format!("{}: everything, since {because}", print::bytes(report.read_bytes)),
        None => {
            let spared = print::bytes(report.spared_bytes());
            format!("{}; {spared} known to be as before", print::bytes(report.read_bytes))
        }
    };
    let took = report.finished_at.duration_since(report.started_at).as_secs_f64();
    let mut fields = vec![
        ("backup", report.id.to_string()),
        ("cluster", report.cluster.to_string()),
        ("consistent from", format!("{} to {}, timeline {}", report.start_lsn, report.stop_lsn, report.timeline)),
        ("took", print::seconds(took)),
        ("cluster size", print::bytes(report.cluster_bytes)),
        ("read", read),
        ("new", print::bytes(report.new_bytes)),
        ("stored", format!("{} in {} requests", print::bytes(report.stored_bytes), report.store_requests)),
        ("damaged pages", report.damaged_pages.to_string()),
        ("unexplained", format!("{} slots changed past the WAL", report.unexplained_slots)),
    ];
    fields.extend(cost::fields(costed.cost));
    print::fields(&fields)
}
