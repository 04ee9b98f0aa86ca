//! Pieces of WAL segments that whole segments have taken the place of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use jiff::{SignedDuration, Timestamp};
use walfleet_repository::ids::ClusterName;
use walfleet_repository::layout;
use walfleet_repository::open::Repository;
use walfleet_repository::postgres::Lsn;
use walfleet_repository::superseded;

use super::Keeper;
use crate::reconcile::in_full;

/// Between two rounds in one repository: a handful of listings for each cluster whose WAL went on.
const EVERY: SignedDuration = SignedDuration::from_secs(600);

/// How long after its WAL last went on a cluster has pieces to remove: they are left for an hour.
const GOES_ON: SignedDuration = SignedDuration::from_hours(2);

/// Between two rounds over all that lies in a repository, whoever tells of it.
const EVERYTHING: SignedDuration = SignedDuration::from_hours(24);

/// Of one repository.
#[derive(Default)]
pub(super) struct Cleaned {
    at: Option<Timestamp>,
    everything_at: Option<Timestamp>,
    /// How far each cluster's WAL was stored, as its agents say, and when that was first seen.
    stored: BTreeMap<ClusterName, (Option<Lsn>, Timestamp)>,
}

/// What a round is to look at.
#[derive(PartialEq, Eq, Debug)]
enum Scope {
    Nothing,
    Clusters(BTreeSet<ClusterName>),
    Everything,
}

impl Cleaned {
    fn scope(&mut self, stored: BTreeMap<ClusterName, Option<Lsn>>, now: Timestamp) -> Scope {
        self.stored.retain(|cluster, _| stored.contains_key(cluster));
        for (cluster, lsn) in stored {
            let known = self.stored.entry(cluster).or_insert((lsn, now));
            if known.0 != lsn {
                *known = (lsn, now);
            }
        }
        let is_over = |since: Option<Timestamp>, length| since.is_none_or(|at| now.duration_since(at) >= length);
        if !is_over(self.at, EVERY) {
            return Scope::Nothing;
        }
        self.at = Some(now);
        if is_over(self.everything_at, EVERYTHING) {
            return Scope::Everything;
        }
        let goes_on = self.stored.iter().filter(|(_, (_, since))| now.duration_since(*since) <= GOES_ON);
        Scope::Clusters(goes_on.map(|(cluster, _)| cluster.clone()).collect())
    }
}

impl Keeper {
    /// What cannot be removed now, for want of the right to, say, costs a little space and is tried again.
    pub(super) async fn remove_superseded(&self, name: &str, repository: &Repository, now: Timestamp) {
        let stored = self.stored(name, now).await;
        let scope = {
            let mut cleaned = self.cleaned.lock().unwrap_or_else(PoisonError::into_inner);
            cleaned.entry(name.to_owned()).or_default().scope(stored, now)
        };
        let store = repository.store();
        let is_everything = scope == Scope::Everything;
        let clusters = match scope {
            Scope::Nothing => return,
            Scope::Clusters(clusters) => clusters,
            Scope::Everything => match store.list_level(&layout::clusters()).await {
                Ok(level) => level.folders.iter().filter_map(layout::parse_cluster).collect(),
                Err(error) => {
                    return tracing::warn!(repository = name, error = in_full(&error), "cannot list clusters");
                }
            },
        };
        for cluster in clusters {
            match superseded::remove(store, &cluster, now).await {
                Ok(removed) if removed.pieces > 0 => {
                    let (pieces, bytes) = (removed.pieces, removed.bytes);
                    tracing::info!(repository = name, %cluster, pieces, bytes, "removed superseded pieces of WAL");
                }
                Ok(_) => {}
                Err(error) => {
                    let error = in_full(&error);
                    tracing::warn!(repository = name, %cluster, error, "superseded pieces of WAL are left for now");
                }
            }
        }
        // Unless this took too long and was cut off.
        if is_everything
            && let Some(cleaned) = self.cleaned.lock().unwrap_or_else(PoisonError::into_inner).get_mut(name)
        {
            cleaned.everything_at = Some(now);
        }
    }

    /// How far the WAL of the clusters that lie in a repository is stored.
    async fn stored(&self, name: &str, now: Timestamp) -> BTreeMap<ClusterName, Option<Lsn>> {
        let picture = match self.reconciler.picture(now).await {
            Ok(picture) => picture,
            Err(error) => {
                tracing::warn!(error = in_full(&error), "cannot see which clusters write WAL");
                return BTreeMap::new();
            }
        };
        let assembly = picture.assemble();
        let here = assembly.clusters.values().filter(|cluster| cluster.repository == Some(name));
        here.map(|cluster| {
            let archives = cluster.members.iter().filter_map(|member| member.instance.archive.as_ref());
            (cluster.name.clone(), archives.filter_map(|archive| archive.durable_lsn).max())
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_looks_at_clusters_whose_wal_goes_on_and_once_a_day_at_everything() {
        let begun = Timestamp::now();
        let (orders, other): (ClusterName, ClusterName) = ("orders".parse().unwrap(), "other".parse().unwrap());
        let mut cleaned = Cleaned::default();
        let stored = |lsn: u64| [(orders.clone(), Some(Lsn(lsn))), (other.clone(), Some(Lsn(7)))].into();
        assert_eq!(cleaned.scope(stored(1), begun), Scope::Everything);
        let cut_off = begun + SignedDuration::from_mins(10);
        assert_eq!(cleaned.scope(stored(1), cut_off), Scope::Everything, "it was cut off");
        cleaned.everything_at = Some(begun);
        cleaned.at = Some(begun);
        let mut at = |minute: i64, lsn: u64| cleaned.scope(stored(lsn), begun + SignedDuration::from_mins(minute));
        assert_eq!(at(9, 2), Scope::Nothing);
        assert_eq!(at(10, 2), Scope::Clusters([orders.clone(), other.clone()].into()));
        assert_eq!(at(125, 3), Scope::Clusters([orders.clone()].into()));
        assert_eq!(at(240, 3), Scope::Clusters([orders.clone()].into()));
        assert_eq!(at(300, 3), Scope::Clusters(BTreeSet::new()));
        assert_eq!(at(24 * 60, 3), Scope::Everything);
    }
}
