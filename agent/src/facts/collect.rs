//! Looking: at the servers of this host every few seconds, at what the repositories hold of them as [`super::pace`] says and
//! after each job. The two do not wait for each other, and no instance waits for another.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;

use super::pace::{Found, Pace, Signs, Stored};
use super::repository::{ClusterWatch, RepositoryView, nothing};
use super::server::{Look, Seen, Versions, assemble, look, strangers};
use super::trend::{Sample, Trend};
use super::{Facts, InstanceFacts, unstreamed};
use crate::access::{Access, AccessError, ClusterAccess, InstanceAccess};
use crate::archiving::{Archiving, Shipping};
use crate::config::Config;
use crate::identity::connect::chain;
use crate::jobs::Jobs;
use crate::wal::breaks;
use crate::wal::fill::Missing;

/// The controller's own interval is longer; this is how soon a change of role or a failing archiver is noticed.
const SERVERS: Duration = Duration::from_secs(10);

/// Between two looks at what this host knows by itself, to see whether a repository is to be looked at.
const PACE: Duration = Duration::from_secs(5);

/// Between two times that receiving begins anew since what was stored is gone: what is there may not let it be mended.
const ANEW: Duration = Duration::from_secs(300);

/// For one repository's answers.
const REPOSITORY_DEADLINE: Duration = Duration::from_secs(120);

/// Looks, and publishes what it saw.
pub struct Collector {
    pub config: Arc<Config>,
    pub access: watch::Receiver<Option<Arc<Access>>>,
    pub archiving: Arc<Archiving>,
    pub jobs: Arc<Jobs>,
    pub facts: watch::Sender<Arc<Facts>>,
}

type Members = BTreeMap<ClusterName, InstanceAccess>;

/// What changes over time, by cluster.
type Trends = HashMap<ClusterName, Trend>;

type Views = Mutex<BTreeMap<ClusterName, RepositoryView>>;

impl Collector {
    /// Looks until told to stop; nothing is unknown then, since it only reads.
    pub async fn run(&self, stop: CancellationToken) {
        let views = Views::default();
        let looking = async { tokio::join!(self.look_at_servers(&views), self.look_at_repositories(&views)) };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = looking => {}
        }
    }

    async fn look_at_servers(&self, views: &Views) {
        let mut access = self.access.clone();
        let mut versions = Versions::new();
        let mut trends = Trends::new();
        loop {
            let present = access.borrow_and_update().clone();
            let members = members(&self.config, present.as_deref());
            let instances = self.instances(members, views, &mut versions, &mut trends).await;
            self.facts.send_replace(Arc::new(Facts { at: Timestamp::now(), instances }));
            tokio::select! {
                () = tokio::time::sleep(SERVERS) => {}
                changed = access.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn look_at_repositories(&self, views: &Views) {
        let (mut access, mut ends) = (self.access.clone(), self.jobs.ends());
        let mut watches = Watches::new();
        let mut paces = Paces::new();
        let mut begun_anew: HashMap<ClusterName, Instant> = HashMap::new();
        let mut are_all_due = true;
        loop {
            let present = access.borrow_and_update().clone();
            if let Some(present) = present {
                let due = self.due(&present, &paces, are_all_due);
                for (cluster, pace) in look_at_clusters(present, due, &mut watches, &paces, views).await {
                    let (missing, has_lost_end) = missing(views, &cluster);
                    if !missing.is_empty() {
                        self.archiving.fill(&cluster, missing);
                    }
                    if has_lost_end && begun_anew.get(&cluster).is_none_or(|at| at.elapsed() >= ANEW) {
                        self.archiving.begin_anew(&cluster);
                        begun_anew.insert(cluster.clone(), Instant::now());
                    }
                    paces.insert(cluster, pace);
                }
            }
            are_all_due = false;
            tokio::select! {
                () = tokio::time::sleep(PACE) => {}
                changed = access.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Keys, certificates or places may have changed.
                    watches.clear();
                    paces.clear();
                }
                _ = ends.changed() => are_all_due = true,
            }
        }
    }

    /// The clusters that live here and are to be looked at now, with what is known of them before the look.
    fn due(&self, access: &Access, paces: &Paces, are_all_due: bool) -> Vec<(ClusterAccess, Signs)> {
        let shipping: BTreeMap<_, _> = self.archiving.statuses().into_iter().collect();
        let members = access.clusters.values().filter(|cluster| cluster.instance.is_some());
        let with_signs = members.map(|cluster| {
            // A shipper that is being made just now says nothing.
            let before = || paces.get(&cluster.name).map(Pace::signs).cloned().unwrap_or_default();
            (cluster.clone(), shipping.get(&cluster.name).map_or_else(before, Signs::of))
        });
        let now = Instant::now();
        with_signs
            .filter(|(cluster, signs)| {
                are_all_due || paces.get(&cluster.name).is_none_or(|pace| pace.is_due(now, signs))
            })
            .collect()
    }

    async fn instances(
        &self,
        members: Members,
        views: &Views,
        versions: &mut Versions,
        trends: &mut Trends,
    ) -> Vec<InstanceFacts> {
        let shipping: BTreeMap<_, _> = self.archiving.statuses().into_iter().collect();
        // Before the looks: so what of a primary's own WAL is seen to be stored is never ahead of where it is seen to be.
        let mut views = views.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let slot = &self.config.wal.slot;
        let looks: Vec<_> = members.values().cloned().map(|instance| look(instance, slot.clone())).collect();
        let mut instances = Vec::new();
        for ((cluster, instance), look) in members.iter().zip(join_all(looks).await) {
            let view = views.remove(cluster);
            let Look { server, kept, files, major } = look;
            let ready_bytes = files.ready_bytes;
            let looked = view.as_ref().map_or(0, |view| view.requests_ever);
            let seen = Seen { server, files, major, shipping: shipping.get(cluster), view };
            let mut facts = assemble(cluster, instance, seen);
            facts.problems.extend(break_problem(&self.config, cluster));
            let standing = (self.archiving.streams_nothing(cluster), facts.archive.stream.phase.is_well());
            facts.problems.extend(kept.as_ref().and_then(|kept| unstreamed::kept_for_nothing(kept, slot, standing)));
            let kept_bytes = (ready_bytes, kept.map_or(0, |kept| kept.bytes));
            let trend = trends.entry(cluster.clone()).or_default();
            note_trend(trend, &mut facts, kept_bytes, (shipping.get(cluster), looked));
            instances.push(facts);
        }
        let owned = members.into_values().map(|instance| instance.data_dir).collect();
        instances.extend(strangers(owned, versions).await);
        instances
    }
}

/// What this host has let go of, as long as the repository does not tell of it.
fn break_problem(config: &Config, cluster: &ClusterName) -> Option<String> {
    match breaks::current(&config.state_dir, cluster) {
        Ok(found) => found?.problem(),
        Err(error) => Some(chain(&error)),
    }
}

fn note_trend(
    trend: &mut Trend,
    facts: &mut InstanceFacts,
    (ready_bytes, slot_bytes): (u64, u64),
    (shipping, looked): (Option<&Shipping>, u64),
) {
    trend.note(Sample {
        at: Timestamp::now(),
        current_lsn: facts.current_lsn,
        durable_lsn: facts.archive.durable_lsn,
        is_streamed: facts.archive.stream.phase.is_well(),
        slot_bytes,
        pg_wal_bytes: facts.archive.pg_wal_bytes,
        ready_bytes,
        requests: shipping.map_or(0, |shipping| shipping.requests) + looked,
        stored_bytes: shipping.map_or(0, Shipping::stored_bytes),
    });
    facts.archive.last_hour = trend.last_hour();
    let full_in = trend.full_in(facts.archive.pg_wal_free_bytes);
    facts.archive.pg_wal_full_in_seconds = full_in.map(|full_in| full_in.as_secs().unsigned_abs());
}

/// The instances of this host by cluster: the configuration's, whether or not the controller knows of them yet, since
/// it learns of them from here; and those that only the controller named.
fn members(config: &Config, access: Option<&Access>) -> Members {
    let configured = config.instances.iter().map(|instance| {
        let access = InstanceAccess { data_dir: instance.data_dir.clone(), connection: instance.connection.clone() };
        (instance.cluster.clone(), access)
    });
    let named = access
        .into_iter()
        .flat_map(|access| access.clusters.values())
        .filter_map(|cluster| Some((cluster.name.clone(), cluster.instance.clone()?)));
    named.chain(configured).collect()
}

/// Clusters opened before, by name.
type Watches = HashMap<ClusterName, ClusterWatch>;

/// When each is looked at next.
type Paces = HashMap<ClusterName, Pace>;

fn missing(views: &Views, cluster: &ClusterName) -> (Vec<Missing>, bool) {
    let views = views.lock().unwrap_or_else(PoisonError::into_inner);
    views.get(cluster).map(|view| (view.missing.clone(), view.has_lost_end)).unwrap_or_default()
}

/// Looks at these clusters, all at once.
async fn look_at_clusters(
    access: Arc<Access>,
    due: Vec<(ClusterAccess, Signs)>,
    watches: &mut Watches,
    paces: &Paces,
    views: &Views,
) -> Vec<(ClusterName, Pace)> {
    let begun = Instant::now();
    let looks: Vec<_> = due
        .into_iter()
        .map(|(cluster, signs)| {
            let watch = watches.remove(&cluster.name);
            let access = Arc::clone(&access);
            async move {
                let looked = look_at_cluster(access, cluster, (watch, signs.stored())).await;
                (looked, signs)
            }
        })
        .collect();
    let mut looked_at = Vec::new();
    for ((cluster, watch, looked), signs) in join_all(looks).await {
        if let Some(watch) = watch {
            watches.insert(cluster.clone(), watch);
        }
        let mut views = views.lock().unwrap_or_else(PoisonError::into_inner);
        let former = views.entry(cluster.clone()).or_default();
        let came_to = match looked {
            Ok(view) => {
                let came_to = (Found::between(former, &view), view.requests);
                let requests_ever = former.requests_ever + view.requests;
                *former = RepositoryView { requests_ever, ..view };
                came_to
            }
            // What was last seen stays, with its own time beside it.
            Err(problem) => {
                former.problem = Some(problem);
                (Found::Trouble, 0)
            }
        };
        let pace = Pace::after(paces.get(&cluster), begun, signs, came_to);
        looked_at.push((cluster, pace));
    }
    looked_at
}

type ClusterLook = (ClusterName, Option<ClusterWatch>, Result<RepositoryView, String>);

async fn look_at_cluster(
    access: Arc<Access>,
    cluster: ClusterAccess,
    (watch, stored): (Option<ClusterWatch>, &[Stored]),
) -> ClusterLook {
    let looking = async {
        let watch = match watch {
            Some(watch) => Some(watch),
            None => ClusterWatch::open(&access, &cluster).await?,
        };
        let Some(mut watch) = watch else { return Ok((None, nothing(&cluster))) };
        let view = watch.look(stored).await?;
        Ok::<_, AccessError>((Some(watch), view))
    };
    let name = cluster.name.clone();
    match tokio::time::timeout(REPOSITORY_DEADLINE, looking).await {
        Ok(Ok((watch, view))) => (name, watch, Ok(view)),
        Ok(Err(error)) => (name, None, Err(chain(&error))),
        Err(_) => {
            let seconds = REPOSITORY_DEADLINE.as_secs();
            (name, None, Err(format!("repository {}: no answer within {seconds} s", cluster.repository.name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::InstanceConfig;

    #[test]
    fn a_configured_instance_is_looked_at_before_the_controller_knows_of_it() {
        let instance = InstanceConfig {
            cluster: "orders".parse().unwrap(),
            data_dir: "/data".into(),
            connection: None,
            lineage: crate::config::Lineage::Shared,
        };
        let config = Config { instances: vec![instance], ..Config::default() };
        let members = members(&config, None);
        assert_eq!(members.into_keys().map(|name| name.to_string()).collect::<Vec<_>>(), ["orders"]);
    }
}
