//! `doctor`: says what keeps this host from being protected.

use crate::cli::{DoctorArgs, print, usage};
use crate::config::Config;
use crate::doctor::examine::{Probe, examine};
use crate::doctor::{Diagnosis, Verdict};
use crate::failure::{ExitCode, Failure, Remedy};

pub fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config).map_err(usage)?;
    super::run_async(&super::quiet(), |_| async move {
        let probe = if args.no_probe { Probe::No } else { Probe::Yes };
        let diagnosis = examine(&config, &super::program(), probe).await;
        print::output(args.output.format, &diagnosis, table)?;
        if diagnosis.healthy {
            return Ok(());
        }
        let count = diagnosis.findings.iter().filter(|finding| finding.verdict == Verdict::Fix).count();
        let message = format!("{count} of {} checks need attention", diagnosis.findings.len());
        Err(Failure::new("doctor.unhealthy", ExitCode::Failed, Remedy::Operator, message))
    })
}

fn table(diagnosis: &Diagnosis) -> String {
    let rows: Vec<Vec<String>> = diagnosis
        .findings
        .iter()
        .map(|finding| {
            // One line each in the table; the whole message is in the JSON.
            let message = finding.message.lines().next().unwrap_or_default().to_owned();
            vec![finding.subject.clone(), finding.check.to_owned(), finding.verdict.word().to_owned(), message]
        })
        .collect();
    let mut text = print::table(&["OF", "CHECK", "VERDICT", "FOUND"], &rows);
    let wanting = diagnosis.findings.iter().filter(|finding| finding.verdict != Verdict::Ok);
    for finding in wanting {
        let fix = finding.fix.as_deref().unwrap_or_default();
        text += &format!("\n{} {} {}\n  {fix}\n", finding.verdict.word(), finding.subject, finding.check);
    }
    text
}
