//! `list`: what lies in a repository, and what can be recovered from it.

use jiff::Timestamp;
use serde::Serialize;
use walfleet_repository::ids::ClusterName;

use crate::cli::{ListArgs, print};
use crate::facts::RecoveryWindow;
use crate::facts::repository::view;
use crate::failure::Failure;
use crate::jobs::report::BackupReport;

#[derive(Serialize)]
struct Listed {
    cluster: ClusterName,
    as_of: Timestamp,
    /// Oldest first.
    backups: Vec<BackupReport>,
    recovery: Vec<RecoveryWindow>,
    /// What in it does not read.
    problem: Option<String>,
}

pub fn list(args: &ListArgs) -> Result<(), Failure> {
    super::run_async(&super::quiet(), |_| async move {
        let mut opened = super::open::open(&args.repository)?;
        let Some(name) = &args.cluster else {
            let mut clusters = Vec::new();
            for repository in opened.access.repositories.values() {
                let repository = repository.open().await?;
                let known = repository.list_clusters().await;
                clusters.extend(known.map_err(|error| crate::access::repository_failure(&error))?);
            }
            clusters.sort();
            clusters.dedup();
            return print::output(args.output.format, &clusters, |clusters| {
                let rows: Vec<_> = clusters.iter().map(|cluster| vec![cluster.to_string()]).collect();
                print::table(&["CLUSTER"], &rows)
            });
        };
        let cluster = opened.cluster(name)?.clone();
        // A cluster that this key does not open is refused, not shown as empty.
        opened.access.open(&cluster.repository, name.clone()).await?;
        let view = view(&opened.access, &cluster).await?;
        let listed = Listed {
            cluster: name.clone(),
            as_of: Timestamp::now(),
            backups: view.backups,
            recovery: view.windows,
            problem: view.problem,
        };
        print::output(args.output.format, &listed, table)
    })
}

fn table(listed: &Listed) -> String {
    let rows: Vec<Vec<String>> = listed
        .backups
        .iter()
        .map(|backup| {
            vec![
                backup.id.to_string(),
                print::time(backup.finished_at, listed.as_of),
                backup.timeline.to_string(),
                backup.stop_lsn.to_string(),
                print::bytes(backup.cluster_bytes),
                print::bytes(backup.stored_bytes),
                backup.state.name().to_owned(),
                backup.member.clone(),
            ]
        })
        .collect();
    let heads = ["BACKUP", "FINISHED", "TIMELINE", "STOP LSN", "SIZE", "STORED", "STATE", "MEMBER"];
    let mut text = print::table(&heads, &rows);
    text += "\n";
    text += &windows(listed);
    if let Some(problem) = &listed.problem {
        text += &format!("\nproblem: {problem}\n");
    }
    text
}

fn windows(listed: &Listed) -> String {
    let time = |at: Option<Timestamp>| at.map_or("no commit".into(), |at| print::time(at, listed.as_of));
    let mut rows = Vec::new();
    for window in &listed.recovery {
        for range in &window.ranges {
            rows.push(vec![
                "recoverable".into(),
                time(range.from),
                time(range.to),
                format!("{} to {}", range.from_lsn, range.to_lsn),
                range.timeline.to_string(),
            ]);
        }
        for gap in &window.gaps {
            let what = if gap.acknowledged { "gap (acknowledged)" } else { "GAP" };
            let lsns = format!("{} to {}", gap.from_lsn, gap.to_lsn);
            rows.push(vec![what.into(), time(gap.from), time(gap.to), lsns, gap.timeline.to_string()]);
        }
    }
    if rows.is_empty() {
        return "nothing can be recovered: there is no backup whose WAL is whole\n".into();
    }
    print::table(&["", "FROM", "TO", "LSN", "TIMELINE"], &rows) + &notes(listed)
}

/// What somebody said of gaps.
fn notes(listed: &Listed) -> String {
    let mut text = String::new();
    for gap in listed.recovery.iter().flat_map(|window| &window.gaps) {
        let said = [("lost", &gap.recorded), ("acknowledged", &gap.acknowledgement)];
        for (word, note) in said.into_iter().filter_map(|(word, note)| Some((word, note.as_ref()?))) {
            text += &format!("{}: {word} by {}: {}\n", gap.from_lsn, note.by, note.reason);
        }
    }
    text
}
