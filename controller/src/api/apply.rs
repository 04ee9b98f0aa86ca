//! What applying or deleting documents would mean for the fleet: what must not be, and what follows.

use std::collections::BTreeSet;

use jiff::Timestamp;
use tonic::Status;

use crate::fleet::clusters::{ClusterSeen, assemble};
use crate::policy::Binding;
use crate::reconcile::desired;
use crate::reconcile::report::Overview;
use crate::resources::Kind;
use crate::resources::stored::{Catalog, Dangling};

/// A document that names a repository nobody declares, or a replica.
pub fn refuse_dangling(after: &Catalog) -> Result<(), Status> {
    let refused = |found: Dangling, why: &str| {
        let Dangling { kind, name, field, repository } = found;
        Err(Status::invalid_argument(format!("{kind} {name:?}: spec.{field}: {repository:?} {why}")))
    };
    if let Some(dangling) = after.dangling() {
        return refused(dangling, "is not declared\nHINT: declare it as a Repository, in the same file if you like.");
    }
    match after.misplaced() {
        Some(misplaced) => refused(misplaced, "is a replica\nHINT: name the repository that it is a replica of."),
        None => Ok(()),
    }
}

/// A cluster that several policies would select. Ties that were there before are not held against what mends others.
pub fn refuse_ties(overview: &Overview, after: &Catalog) -> Result<(), Status> {
    let picture = &overview.picture;
    let before = picture.assemble();
    let next = assemble(picture.now, &picture.agents, &picture.pins, after);
    for (name, cluster) in &next.clusters {
        let Binding::Tied(policies) = &cluster.binding else { continue };
        let was = before.clusters.get(name).map(|cluster| &cluster.binding);
        if was != Some(&cluster.binding) {
            return Err(Status::invalid_argument(format!(
                "policies {} would all select cluster {name}\nHINT: narrow spec.selector until one is left, for example with name!={name}.",
                policies.join(" and ")
            )));
        }
    }
    Ok(())
}

/// Something still refers to it, or hangs on it.
pub fn refuse_referred(overview: &Overview, kind: Kind, name: &str) -> Result<(), Status> {
    let catalog = &overview.picture.catalog;
    if kind == Kind::Repository
        && let Some(dangling) = catalog.clone().without(kind, name).dangling()
    {
        return Err(Status::failed_precondition(format!(
            "{} {:?} names it in spec.{}\nHINT: change or delete that first.",
            dangling.kind, dangling.name, dangling.field
        )));
    }
    if kind == Kind::Repository {
        let assembly = overview.picture.assemble();
        if let Some(cluster) = assembly.clusters.values().find(|cluster| cluster.repository == Some(name)) {
            return Err(Status::failed_precondition(format!(
                "the WAL of {} still goes there\nHINT: bind it by a policy with another repository first.",
                cluster.name
            )));
        }
    }
    if kind == Kind::Policy {
        let assembly = overview.picture.assemble();
        let bound = assembly.clusters.values().filter(|cluster| cluster.binding.policy() == Some(name));
        let bound: Vec<&str> = bound.map(|cluster| cluster.name.as_str()).collect();
        if !bound.is_empty() {
            return Err(Status::failed_precondition(format!(
                "it binds {}, which would be left without schedule and repository\nHINT: apply it with a selector that leaves them out first, for example name notin ({}).",
                bound.join(", "),
                bound.join(",")
            )));
        }
    }
    Ok(())
}

/// Lines told of one application at most: a fleet of ten thousand is not listed one by one.
const MOST_LINES: usize = 60;

/// What would be different for clusters, one line each.
pub fn consequences(overview: &Overview, after: &Catalog) -> Vec<String> {
    let picture = &overview.picture;
    let before = picture.assemble();
    let next = assemble(picture.now, &picture.agents, &picture.pins, after);
    let names: BTreeSet<_> = before.clusters.keys().chain(next.clusters.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        let (old, new) = (before.clusters.get(name), next.clusters.get(name));
        for line in differences(overview, after, old, new) {
            lines.push(format!("{name}: {line}"));
        }
    }
    let surplus = lines.len().saturating_sub(MOST_LINES);
    if surplus > 0 {
        lines.truncate(MOST_LINES);
        lines.push(format!("and {surplus} more"));
    }
    lines
}

fn differences(
    overview: &Overview,
    after: &Catalog,
    old: Option<&ClusterSeen<'_>>,
    new: Option<&ClusterSeen<'_>>,
) -> Vec<String> {
    let agents = &overview.picture.agents;
    let none = || "none".to_owned();
    let mut lines = Vec::new();
    let mut compare = |what: &str, old: Option<String>, new: Option<String>| {
        if old != new {
            lines.push(format!("{what} moves from {} to {}", old.unwrap_or_else(none), new.unwrap_or_else(none)));
        }
    };
    let policy = |cluster: Option<&ClusterSeen<'_>>| cluster?.binding.policy().map(str::to_owned);
    compare("policy", policy(old), policy(new));
    let repository = |cluster: Option<&ClusterSeen<'_>>| cluster?.repository.map(str::to_owned);
    compare("repository", repository(old), repository(new));
    let url = |catalog: &Catalog, cluster: Option<&ClusterSeen<'_>>| {
        Some(catalog.repositories.get(cluster?.repository?)?.url.clone())
    };
    if repository(old) == repository(new) {
        compare("repository's place", url(&overview.picture.catalog, old), url(after, new));
    }
    let next_backup = |cluster: Option<&ClusterSeen<'_>>| overview.next_backup(cluster?).map(at_the_second);
    compare("next backup", next_backup(old), next_backup(new));
    let shipping = |cluster: Option<&ClusterSeen<'_>>| Some(cluster?.policy?.wal.in_words());
    compare("WAL by streaming", shipping(old), shipping(new));
    let names = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(", ");
    let hosts = |cluster: Option<&ClusterSeen<'_>>| {
        cluster.map(|cluster| desired::restore_hosts(cluster, agents)).unwrap_or_default()
    };
    let (had, have) = (hosts(old), hosts(new));
    let (gained, lost): (BTreeSet<_>, BTreeSet<_>) =
        (have.difference(&had).cloned().collect(), had.difference(&have).cloned().collect());
    if !gained.is_empty() {
        lines.push(format!("{} may restore it from now on, and get its key", names(&gained)));
    }
    if !lost.is_empty() {
        lines.push(format!("{} may restore it no more (a key once given is not taken back)", names(&lost)));
    }
    let members = |cluster: Option<&ClusterSeen<'_>>| -> BTreeSet<String> {
        cluster.map(|cluster| desired::members(cluster).into_keys().collect()).unwrap_or_default()
    };
    let (had, have) = (members(old), members(new));
    let left: BTreeSet<String> = had.difference(&have).cloned().collect();
    if !left.is_empty() {
        lines.push(format!("{} no more belongs to it, and ships no WAL", names(&left)));
    }
    lines
}

fn at_the_second(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}
