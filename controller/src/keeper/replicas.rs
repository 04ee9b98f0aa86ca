//! Replicas: what comes to a repository is brought to its other places.
//!
//! In two lanes, so that terabytes of backups never hold up the newest WAL: that, whenever agents tell that more is stored; and
//! backups with the older WAL, which take no more of the network than the document allows. What they saw and did is memory only:
//! all that matters lies in the places themselves ([`walfleet_repository::replicate`]).

mod bandwidth;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;
use walfleet_repository::cluster_log::Author;
use walfleet_repository::ids::{BackupId, ClusterName};
use walfleet_repository::open::Repository;
use walfleet_repository::postgres::Lsn;
use walfleet_repository::replicate::Copier;
use walfleet_repository::replicate::wal::{Part, WalProgress};

use self::bandwidth::Bandwidth;
use super::{Keeper, KeeperError};
use crate::fleet::ClusterSeen;
use crate::reconcile::in_full;
use crate::resources::{RepositorySpec, Span};

/// Between two looks at what is due.
const ROUND: Duration = Duration::from_secs(2);

/// Between two looks at a cluster of which no agent tells anything new.
const IDLE: SignedDuration = SignedDuration::from_mins(10);

/// After a failure.
const AGAIN: SignedDuration = SignedDuration::from_secs(30);

/// Between two comparisons of all that lies in both places: a gap that was filled late is found then.
const EVERYTHING: SignedDuration = SignedDuration::from_hours(6);

/// Clusters at once, of the newest WAL and of the rest.
const NEWEST_AT_ONCE: usize = 8;
const REST_AT_ONCE: usize = 2;

/// A replica's part of a cluster.
pub type Place = (String, ClusterName);

/// What is known of one.
#[derive(Clone, Default, Debug)]
pub struct Replicated {
    /// All the WAL that the first place had then is there.
    complete_as_of: Option<Timestamp>,
    /// Live backups that are not; `None`: nobody looked yet.
    pub lacking: Option<usize>,
    /// What does not read in the first place.
    pub damaged: Vec<String>,
    /// Backups of which nothing is known there, since their reference parts do not read.
    pub unreadable: Vec<String>,
    /// Why the last try failed, of either lane.
    pub problem: Option<String>,
    /// How far it may trail.
    rpo: Option<Span>,
    newest: Lane,
    rest: Lane,
    progress: WalProgress,
}

/// When one lane was last at it, and what agents had told then.
#[derive(Clone, Default, Debug)]
struct Lane {
    at: Option<Timestamp>,
    told: Option<Told>,
    failed: Option<String>,
    everything_at: Option<Timestamp>,
}

/// What agents tell of a cluster, as far as bringing it depends on it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Told {
    stored: Option<Lsn>,
    newest_backup: Option<BackupId>,
}

/// A cluster that is to be brought somewhere.
#[derive(Clone)]
struct Route {
    place: Place,
    source: (String, RepositorySpec),
    target: RepositorySpec,
    told: Told,
    /// When agents told that, as far as it is known.
    told_at: Option<Timestamp>,
}

impl Replicated {
    /// As of when all WAL is there; of one that was not brought all of it yet, of no moment.
    pub fn complete_as_of(&self) -> Option<Timestamp> {
        self.complete_as_of.filter(|_| self.rest.everything_at.is_some())
    }

    fn is_whole(&self) -> bool {
        self.lacking == Some(0) && self.unreadable.is_empty() && self.rest.everything_at.is_some()
    }

    /// Whether it trails farther than is promised.
    pub fn is_late(&self, rpo: Span, now: Timestamp) -> bool {
        let promised = SignedDuration::from_secs(i64::try_from(rpo.as_seconds()).unwrap_or(i64::MAX));
        self.complete_as_of().is_none_or(|at| now.duration_since(at) > promised)
    }
}

impl Replicated {
    /// Agents have told nothing new since all of it was brought.
    fn hear(&mut self, route: &Route) {
        self.rpo = route.target.rpo;
        if self.newest.failed.is_none()
            && self.newest.told.as_ref() == Some(&route.told)
            && self.complete_as_of.is_some()
        {
            self.complete_as_of = self.complete_as_of.max(route.told_at);
        }
    }
}

impl Lane {
    fn is_due(&self, told: &Told, now: Timestamp) -> bool {
        let Some(at) = self.at else { return true };
        let since = now.duration_since(at);
        match &self.failed {
            Some(_) => since >= AGAIN,
            None => self.told.as_ref() != Some(told) || since >= IDLE,
        }
    }

    fn done(&mut self, told: &Told, failed: Option<String>, now: Timestamp) {
        self.at = Some(now);
        self.told = Some(told.clone());
        self.failed = failed;
    }
}

impl Keeper {
    /// Runs until cancelled.
    pub async fn replicate(&self, cancel: &CancellationToken) {
        let newest = async {
            loop {
                self.newest_round(Timestamp::now()).await;
                tokio::time::sleep(ROUND).await;
            }
        };
        let rest = async {
            loop {
                self.rest_round(Timestamp::now()).await;
                tokio::time::sleep(ROUND).await;
            }
        };
        // Whatever is under way is dropped: every step is a creation that can be made again.
        cancel.run_until_cancelled(async { tokio::join!(newest, rest) }).await;
    }

    /// By replica and cluster.
    pub fn replicated(&self) -> BTreeMap<Place, Replicated> {
        self.replicated.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One line for each cluster that is not as it should be in a replica.
    pub(super) fn replica_notices(&self) -> Vec<String> {
        let (replicated, now) = (self.replicated(), Timestamp::now());
        let line = |((replica, cluster), seen): (&Place, &Replicated)| {
            let problem = seen.problem.clone().or_else(|| {
                let first = seen.unreadable.first().or(seen.damaged.first())?;
                Some(format!(
                    "{} objects cannot be brought, since they are damaged, the first: {first}",
                    seen.unreadable.len() + seen.damaged.len()
                ))
            });
            let late = || {
                let rpo = seen.rpo.filter(|rpo| seen.is_late(*rpo, now))?;
                let at = seen.complete_as_of().map_or_else(|| "no moment".to_owned(), |at| format!("{at:.0}"));
                Some(format!("it has all WAL as of {at}, and may trail by {rpo}"))
            };
            let problem = problem.or_else(late);
            Some(format!("replica {replica}, cluster {cluster}: {}", problem?))
        };
        replicated.iter().filter_map(line).collect()
    }

    pub(super) async fn newest_round(&self, now: Timestamp) {
        let due = self.due_routes(now, |seen| &seen.newest).await;
        let turns = due.into_iter().map(|route| async move {
            let done = self.bring_newest(&route).await;
            self.note_replicated(&route, now, |seen| &mut seen.newest, done);
        });
        futures::stream::iter(turns).for_each_concurrent(NEWEST_AT_ONCE, |turn| turn).await;
    }

    pub(super) async fn rest_round(&self, now: Timestamp) {
        let due = self.due_routes(now, |seen| &seen.rest).await;
        let turns = due.into_iter().map(|route| async move {
            let done = self.bring_rest(&route, now).await;
            self.note_replicated(&route, now, |seen| &mut seen.rest, done);
        });
        futures::stream::iter(turns).for_each_concurrent(REST_AT_ONCE, |turn| turn).await;
    }

    async fn due_routes(&self, now: Timestamp, lane: fn(&Replicated) -> &Lane) -> Vec<Route> {
        let routes = match self.routes(now).await {
            Ok(routes) => routes,
            Err(error) => {
                tracing::warn!(error = in_full(&error), "cannot see what is to be brought to replicas");
                return Vec::new();
            }
        };
        let mut seen = self.replicated.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|place, _| routes.iter().any(|route| route.place == *place));
        for route in &routes {
            if let Some(seen) = seen.get_mut(&route.place) {
                seen.hear(route);
            }
        }
        let is_due = |route: &Route| seen.get(&route.place).is_none_or(|seen| lane(seen).is_due(&route.told, now));
        routes.iter().filter(|route| is_due(route)).cloned().collect()
    }

    async fn routes(&self, now: Timestamp) -> Result<Vec<Route>, KeeperError> {
        let picture = self.reconciler.picture(now).await?;
        let assembly = picture.assemble();
        let repositories = &picture.catalog.repositories;
        let replicas = repositories.iter().filter_map(|(name, spec)| Some((name, spec, spec.replica_of.as_ref()?)));
        let mut routes = Vec::new();
        for (name, target, source) in replicas {
            let Some(spec) = repositories.get(source) else { continue };
            let clusters = assembly.clusters.values().filter(|cluster| cluster.repository == Some(source));
            routes.extend(clusters.map(|cluster| Route {
                place: (name.clone(), cluster.name.clone()),
                source: (source.clone(), spec.clone()),
                target: target.clone(),
                told: told(cluster),
                told_at: told_at(cluster),
            }));
        }
        Ok(routes)
    }

    async fn places(&self, route: &Route) -> Result<(Repository, Repository), KeeperError> {
        let now = Timestamp::now();
        let (source, spec) = &route.source;
        let source = self.find(source, spec, now).await?;
        let target = self.find(&route.place.0, &route.target, now).await?;
        Ok((source, target))
    }

    async fn bring_newest(&self, route: &Route) -> Result<(), KeeperError> {
        let (source, target) = self.places(route).await?;
        let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
        let copier = Copier { source: &source, target: &target, author };
        let cluster = &route.place.1;
        if !copier.is_begun(cluster).await? && !copier.begin(cluster).await? {
            return Ok(());
        }
        let mut progress = self.with_replicated(&route.place, |seen| seen.progress.clone());
        let copied = copier.copy_wal(cluster, Part::Newest, &mut progress).await?;
        self.with_replicated(&route.place, |seen| {
            seen.complete_as_of = progress.complete_as_of;
            seen.progress = progress;
            seen.damaged.retain(|known| !copied.damaged.contains(known));
            seen.damaged.extend(copied.damaged);
        });
        Ok(())
    }

    async fn bring_rest(&self, route: &Route, now: Timestamp) -> Result<(), KeeperError> {
        let (source, target) = self.places(route).await?;
        let source = match route.target.bandwidth {
            Some(rate) => source.paced(Arc::new(Bandwidth::of(rate))),
            None => source,
        };
        let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
        let copier = Copier { source: &source, target: &target, author };
        let cluster = &route.place.1;
        if !copier.begin(cluster).await? {
            return Ok(());
        }
        copier.give_up(cluster).await?;
        let lacking = copier.lacking(cluster).await?;
        let (mut left, mut failed) = (lacking.backups.len(), None);
        self.with_replicated(&route.place, |seen| {
            seen.lacking = Some(left);
            seen.unreadable = lacking.damaged;
        });
        // One that cannot be brought keeps none of the others.
        for backup in &lacking.backups {
            let id = &backup.reference.backup;
            match copier.copy_backup(cluster, backup).await {
                Ok(copied) => {
                    tracing::info!(replica = route.place.0, %cluster, backup = %id, ?copied, "brought a backup");
                    left -= 1;
                }
                Err(error) => failed = failed.or(Some(error)),
            }
            self.with_replicated(&route.place, |seen| seen.lacking = Some(left));
        }
        copier.copy_holds(cluster).await?;
        let everything_at = self.with_replicated(&route.place, |seen| seen.rest.everything_at);
        if everything_at.is_none_or(|at| now.duration_since(at) >= EVERYTHING) {
            let copied = copier.copy_wal(cluster, Part::All, &mut WalProgress::default()).await?;
            self.with_replicated(&route.place, |seen| {
                seen.rest.everything_at = Some(now);
                seen.damaged = copied.damaged;
            });
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Whether a replica was brought all that it is to have.
    pub(super) fn is_whole_replica(&self, place: &Place) -> bool {
        self.with_replicated(place, |seen| seen.is_whole())
    }

    fn with_replicated<T>(&self, place: &Place, change: impl FnOnce(&mut Replicated) -> T) -> T {
        let mut seen = self.replicated.lock().unwrap_or_else(PoisonError::into_inner);
        change(seen.entry(place.clone()).or_default())
    }

    fn note_replicated(
        &self,
        route: &Route,
        now: Timestamp,
        lane: fn(&mut Replicated) -> &mut Lane,
        done: Result<(), KeeperError>,
    ) {
        let failed = done.err().map(|error| in_full(&error));
        self.with_replicated(&route.place, |seen| {
            lane(seen).done(&route.told, failed, now);
            let problem = seen.newest.failed.clone().or_else(|| seen.rest.failed.clone());
            if problem != seen.problem {
                let (replica, cluster) = &route.place;
                match &problem {
                    Some(problem) => tracing::error!(replica, %cluster, problem, "cannot bring it to a replica"),
                    None => tracing::info!(replica, %cluster, "it comes to its replica again"),
                }
            }
            seen.problem = problem;
        });
    }
}

/// All who store WAL have told what they stored by then; `None`: one of them is silent.
fn told_at(cluster: &ClusterSeen<'_>) -> Option<Timestamp> {
    let archiving = cluster.members.iter().filter(|member| member.instance.archive.is_some());
    let told: Option<Vec<Timestamp>> = archiving.map(|member| member.vouches.then_some(member.facts_at)).collect();
    told?.into_iter().min()
}

fn told(cluster: &ClusterSeen<'_>) -> Told {
    let archives = cluster.members.iter().filter_map(|member| member.instance.archive.as_ref());
    let backups = cluster.members.iter().flat_map(|member| &member.instance.backups);
    Told {
        stored: archives.filter_map(|archive| archive.durable_lsn).max(),
        newest_backup: backups.map(|backup| backup.id.clone()).max(),
    }
}
