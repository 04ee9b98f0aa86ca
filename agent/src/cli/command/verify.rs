//! `verify`: checks what the repository holds. Damage is a failure of the command.

use walfleet_repository::ids::JobId;

use crate::cli::cost::{self, Costed};
use crate::cli::progress::ProgressLines;
use crate::cli::{VerifyArgs, print};
use crate::failure::{ExitCode, Failure, Remedy};
use crate::jobs::Work;
use crate::jobs::order::{JobOrder, VerifyOrder, WorkOrder};
use crate::jobs::report::{Report, VerifyReport};
use crate::progress::Progress;

pub fn verify(args: VerifyArgs) -> Result<(), Failure> {
    super::run_async(&super::quiet(), |cancel| async move {
        let mut opened = super::open::open(&args.repository)?;
        let repository = opened.cluster(&args.cluster)?.repository.name.clone();
        let order = VerifyOrder { repository, backup: args.backup, deep: args.deep };
        let order = JobOrder::of_a_person(JobId::generate(), args.cluster, WorkOrder::Verify(order));
        let progress = Progress::new();
        let lines = ProgressLines::show("verify", progress.clone());
        let report = opened.work()?.run(order, progress.clone(), cancel).await?;
        drop(lines);
        let Report::Verify(report) = report else {
            return Err(super::failed("the work answered with something else than a verification"));
        };
        let costed = Costed { report: &report, spared_bytes: None, cost: &progress.cost() };
        print::output(args.output.format, &costed, table)?;
        match report.findings.len() {
            0 => Ok(()),
            count => {
                let message = format!("{count} objects are damaged or missing");
                Err(Failure::new("verify.damaged", ExitCode::Failed, Remedy::Operator, message))
            }
        }
    })
}

fn table(costed: &Costed<'_, VerifyReport>) -> String {
    let report = costed.report;
    let mut fields = vec![
        ("packs", report.packs.to_string()),
        ("WAL segments", report.segments.to_string()),
        ("bytes", print::bytes(report.bytes)),
        ("damaged", report.findings.len().to_string()),
    ];
    fields.extend(cost::fields(costed.cost));
    let mut text = print::fields(&fields);
    let rows: Vec<Vec<String>> = report
        .findings
        .iter()
        .map(|finding| {
            let backups: Vec<String> = finding.backups.iter().map(ToString::to_string).collect();
            vec![finding.object.clone(), finding.problem.clone(), backups.join(" ")]
        })
        .collect();
    if !rows.is_empty() {
        text += "\n";
        text += &print::table(&["OBJECT", "PROBLEM", "BACKUPS"], &rows);
    }
    text
}
