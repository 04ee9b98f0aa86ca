//! What a change of documents means for what is kept: told before it acts.

use std::time::Duration;

use futures::StreamExt;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::retention::Plan;

use super::{Api, now};
use crate::fleet::clusters::assemble;
use crate::keeper::retention::{Planned, policy_says};
use crate::reconcile::report::Overview;
use crate::resources::stored::Catalog;
use crate::resources::{RepositorySpec, RetentionSpec};

/// Plans made for one change: each reads what a cluster holds.
const MOST: usize = 40;
const AT_ONCE: usize = 8;
/// For all of them: less than callers wait for ours.
const PATIENCE: Duration = Duration::from_secs(15);

/// A cluster of which something else is to be kept.
struct Changed {
    cluster: ClusterName,
    was: Option<RetentionSpec>,
    is: Option<RetentionSpec>,
    place: Option<(String, RepositorySpec)>,
}

impl Api {
    /// One line for each cluster of which something else is to be kept.
    pub(super) async fn kept_otherwise(&self, overview: &Overview, after: &Catalog) -> Vec<String> {
        let changed = changed(overview, after);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let lines = changed.into_iter().enumerate().map(|(at, changed)| async move {
            let planned = match (&changed.is, &changed.place) {
                (Some(is), Some((name, spec))) if at < MOST => {
                    let plan = self.keeper.plan_retention(name, spec, &changed.cluster, is, now());
                    tokio::time::timeout_at(deadline, plan).await.ok().and_then(Result::ok)
                }
                _ => None,
            };
            line(&changed, planned.as_ref())
        });
        let lines: Vec<_> = lines.collect();
        futures::stream::iter(lines).buffered(AT_ONCE).collect().await
    }
}

fn changed(overview: &Overview, after: &Catalog) -> Vec<Changed> {
    let picture = &overview.picture;
    let before = picture.assemble();
    let next = assemble(picture.now, &picture.agents, &picture.pins, after);
    let of = |cluster: &ClusterName| before.clusters.get(cluster).and_then(policy_says);
    let all = next.clusters.values().map(|cluster| Changed {
        cluster: cluster.name.clone(),
        was: of(&cluster.name),
        is: policy_says(cluster),
        // Only what lies where it lay before can be looked at.
        place: cluster.repository.and_then(|name| {
            let spec =
                picture.catalog.repositories.get(name).filter(|spec| after.repositories.get(name) == Some(spec))?;
            Some((name.to_owned(), spec.clone()))
        }),
    });
    all.filter(|changed| changed.was != changed.is).collect()
}

fn line(changed: &Changed, planned: Option<&Planned>) -> String {
    let words =
        |spec: &Option<RetentionSpec>| spec.as_ref().map_or_else(|| "everything".to_owned(), ToString::to_string);
    let what =
        format!("{}: what is kept moves from {} to {}", changed.cluster, words(&changed.was), words(&changed.is));
    let goes = match (planned, &changed.is) {
        (Some(planned), _) => {
            let when = planned.acts_from.map(|at| format!(", from {} on", at.strftime("%Y-%m-%d %H:%M UTC")));
            format!("{}{}", removes(&planned.plan), when.unwrap_or_default())
        }
        (None, None) => return what,
        (None, Some(_)) => "what goes could not be told".to_owned(),
    };
    format!("{what}; {goes}")
}

/// In words, what a plan lets go of.
fn removes(plan: &Plan) -> String {
    let expiring: Vec<_> = plan.expiring().collect();
    let segments: usize = plan.trims.iter().map(|trim| trim.segments).sum();
    let day = |at: jiff::Timestamp| at.strftime("%Y-%m-%d").to_string();
    let backups = match (expiring.first(), expiring.last()) {
        (Some(first), Some(last)) if expiring.len() > 1 => {
            format!("{} backups of {} to {} go to the trash", expiring.len(), day(first.seen_at), day(last.seen_at))
        }
        (Some(only), _) => format!("the backup of {} goes to the trash", day(only.seen_at)),
        _ => "no backup goes".to_owned(),
    };
    match segments {
        0 => backups,
        count => format!("{backups}, and {count} segments of WAL go"),
    }
}
