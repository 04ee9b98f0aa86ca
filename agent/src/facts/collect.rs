//! Looking: at the servers of this host every few seconds, at what the repositories hold of them every half minute or
//! so and after each job. The two do not wait for each other, and no instance waits for another.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;

use super::repository::{ClusterWatch, RepositoryView, nothing};
use super::server::{Seen, Versions, assemble, look, strangers};
use super::{Facts, InstanceFacts};
use crate::access::{Access, AccessError, ClusterAccess, InstanceAccess};
use crate::archiving::Archiving;
use crate::config::Config;
use crate::identity::connect::chain;
use crate::jobs::Jobs;

/// The controller's own interval is longer; this is how soon a change of role or a failing archiver is noticed.
const SERVERS: Duration = Duration::from_secs(10);

/// Between two looks at repositories: see [`pause`].
const REPOSITORIES: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(900);

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
        loop {
            let present = access.borrow_and_update().clone();
            let members = members(&self.config, present.as_deref());
            let instances = self.instances(members, views, &mut versions).await;
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
        loop {
            let present = access.borrow_and_update().clone();
            let mut requests = 0;
            if let Some(present) = present {
                requests = look_at_clusters(present, &mut watches, views).await;
            }
            tokio::select! {
                () = tokio::time::sleep(pause(requests)) => {}
                changed = access.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Keys, certificates or places may have changed.
                    watches.clear();
                }
                _ = ends.changed() => {}
            }
        }
    }

    async fn instances(&self, members: Members, views: &Views, versions: &mut Versions) -> Vec<InstanceFacts> {
        let shipping: BTreeMap<_, _> = self.archiving.statuses().into_iter().collect();
        let looks: Vec<_> = members.values().cloned().map(look).collect();
        let mut instances = Vec::new();
        for ((cluster, instance), look) in members.iter().zip(join_all(looks).await) {
            let view = views.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).cloned();
            let (server, files, major) = (look.server, look.files, look.major);
            let seen = Seen { server, files, major, shipping: shipping.get(cluster), view };
            instances.push(assemble(cluster, instance, seen));
        }
        let owned = members.into_values().map(|instance| instance.data_dir).collect();
        instances.extend(strangers(owned, versions).await);
        instances
    }
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

/// Looks at every cluster that lives here, all at once; returns what it cost.
async fn look_at_clusters(access: Arc<Access>, watches: &mut Watches, views: &Views) -> u64 {
    let members: Vec<ClusterAccess> =
        access.clusters.values().filter(|cluster| cluster.instance.is_some()).cloned().collect();
    let looks: Vec<_> = members
        .into_iter()
        .map(|cluster| {
            let watch = watches.remove(&cluster.name);
            look_at_cluster(Arc::clone(&access), cluster, watch)
        })
        .collect();
    let mut requests: u64 = 0;
    for (cluster, watch, looked) in join_all(looks).await {
        if let Some(watch) = watch {
            watches.insert(cluster.clone(), watch);
        }
        let mut views = views.lock().unwrap_or_else(PoisonError::into_inner);
        let former = views.entry(cluster).or_default();
        match looked {
            Ok(view) => {
                requests = requests.saturating_add(view.requests);
                *former = view;
            }
            // What was last seen stays, with its own time beside it.
            Err(problem) => former.problem = Some(problem),
        }
    }
    requests
}

type ClusterLook = (ClusterName, Option<ClusterWatch>, Result<RepositoryView, String>);

async fn look_at_cluster(access: Arc<Access>, cluster: ClusterAccess, watch: Option<ClusterWatch>) -> ClusterLook {
    let looking = async {
        let watch = match watch {
            Some(watch) => Some(watch),
            None => ClusterWatch::open(&access, &cluster).await?,
        };
        let Some(mut watch) = watch else { return Ok((None, nothing(&cluster))) };
        let view = watch.look().await?;
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

/// Until the next look: the more requests one takes, the more seldom. A cluster with a hundred thousand segments costs
/// some hundred requests a look, and so at most 1200 an hour; requests are money at most stores.
fn pause(requests: u64) -> Duration {
    Duration::from_secs(requests.saturating_mul(3)).clamp(REPOSITORIES, LONGEST_PAUSE)
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

    #[test]
    fn looks_that_cost_more_come_more_seldom() {
        for (requests, seconds) in [(0, 30), (10, 30), (100, 300), (u64::MAX, 900)] {
            assert_eq!(pause(requests), Duration::from_secs(seconds), "{requests}");
        }
    }
}
