//! The fleet as this controller sees it: who is connected, what each last said, what jobs are at.
//!
//! Liveness and progress are memory only; last-known facts are stored at a low rate. `clusters` makes clusters of them,
//! `protection` judges those; both are pure. Nothing here decides what to do.

pub mod clusters;
pub mod link;
pub mod observed;
pub mod protection;
pub mod recovery;
#[cfg(test)]
pub mod samples;
pub mod store;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::Instant;
use walfleet_repository::ids::JobId;

pub use clusters::{AgentSeen, Assembly, ClusterSeen, Enrolled, MemberSeen, Pin};
pub use link::{Link, LinkId, ToAgent};
pub use observed::{AgentObserved, FactsObserved, HelloObserved, InstanceObserved, InstanceRole};

use crate::config::{Config, RetentionConfig};
use crate::jobs::FencingToken;

/// The paces of the fleet. One place, so that tests can be quick.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub heartbeat: Duration,
    pub facts_interval: Duration,
    /// A stream that is silent for this long is closed.
    pub lost_after: Duration,
    /// An agent not heard for this long has lost the lease of its jobs.
    pub lease: Duration,
    /// An offer that is not answered within this is sent again.
    pub offer: Duration,
    /// A fresh stream must say hello within this.
    pub hello: Duration,
    /// Facts that changed are stored at most this often.
    pub store_interval: Duration,
    /// How long a lost attempt's agent may take to come back before the repository's log is asked.
    pub patience: Duration,
    /// The reconciler runs at least this often.
    pub tick: Duration,
    /// How long an agent's right to write lasts.
    pub writer: Duration,
    /// How long jobs that are over are kept.
    pub history: Duration,
    pub retention: RetentionTiming,
}

/// The paces of retention.
#[derive(Clone, Copy, Debug)]
pub struct RetentionTiming {
    /// Between two plans of one cluster.
    pub every: SignedDuration,
    /// How long what keeps less must have stood.
    pub notice: SignedDuration,
    /// How long somebody may go on who reads what is to be removed.
    pub grace: SignedDuration,
    /// Objects per second and cluster.
    pub removals: u32,
}

impl RetentionTiming {
    pub fn of(config: &RetentionConfig) -> RetentionTiming {
        // At most 30 days: validated.
        let seconds = |seconds: u64| SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
        RetentionTiming {
            every: seconds(config.every_seconds),
            notice: seconds(config.notice_seconds),
            grace: seconds(config.grace_seconds),
            removals: config.removals_per_second,
        }
    }
}

impl Timing {
    pub fn of(config: &Config) -> Timing {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Timing {
            heartbeat: seconds(config.agents.heartbeat_seconds),
            facts_interval: seconds(config.agents.facts_interval_seconds),
            lost_after: seconds(config.agents.lost_after_seconds),
            lease: seconds(config.jobs.lease_seconds),
            offer: seconds(config.jobs.offer_seconds),
            hello: Duration::from_secs(10),
            // A fleet of 10,000 then makes at most 170 writes of a few kilobytes a second.
            store_interval: Duration::from_secs(60),
            // Longer than a host takes to reboot and recover its disks.
            patience: Duration::from_secs(30 * 60),
            tick: seconds(config.jobs.reconcile_seconds),
            writer: config.certificates.writer(),
            history: Duration::from_secs(u64::from(config.jobs.history_days) * 86_400),
            retention: RetentionTiming::of(&config.retention),
        }
    }
}

/// What a running job is at. Memory only.
#[derive(Clone, PartialEq, Debug)]
pub struct Progress {
    pub attempt: u32,
    pub token: FencingToken,
    pub phase: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub at: Timestamp,
    /// Of those done, what need not be read.
    pub spared_bytes: u64,
    pub bytes_per_second: Option<u64>,
    pub left_seconds: Option<u64>,
    pub still_seconds: u64,
    pub store_requests: u64,
    pub expected: Option<Expected>,
}

/// What the agent expects of the whole job, and why.
#[derive(Clone, PartialEq, Debug)]
pub struct Expected {
    pub seconds: f64,
    pub basis: String,
}

#[derive(Default)]
struct Known {
    /// Shared with readers; replaced, not changed, while any of them holds it.
    observed: Arc<AgentObserved>,
    last_seen: Option<Timestamp>,
    link: Option<Link>,
    /// It told facts over this stream.
    told: bool,
    /// What the newest heartbeat said is running.
    running: Vec<(JobId, FencingToken)>,
    /// When it was last heard on any stream of this process.
    heard: Option<Instant>,
    changed_since_stored: bool,
    stored: Option<Instant>,
}

/// Shared by the streams, the reconciler and the readers. Locks are held for memory operations only.
pub struct Fleet {
    pub timing: Timing,
    started: Instant,
    agents: Mutex<BTreeMap<String, Known>>,
    progress: Mutex<BTreeMap<JobId, Progress>>,
    /// Something was seen that a plan or a reader may depend on.
    changes: watch::Sender<u64>,
    /// A job's progress moved.
    progressed: watch::Sender<u64>,
}

impl Fleet {
    /// `stored`: the last-known facts, from [`store::load_agents`].
    pub fn new(timing: Timing, stored: BTreeMap<String, AgentObserved>) -> Arc<Fleet> {
        let agents = stored
            .into_iter()
            .map(|(name, observed)| {
                let last_seen = observed.last_seen;
                (name, Known { observed: Arc::new(observed), last_seen, ..Known::default() })
            })
            .collect();
        Arc::new(Fleet {
            timing,
            started: Instant::now(),
            agents: Mutex::new(agents),
            progress: Mutex::default(),
            changes: watch::Sender::new(0),
            progressed: watch::Sender::new(0),
        })
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub fn subscribe_progress(&self) -> watch::Receiver<u64> {
        self.progressed.subscribe()
    }

    fn agents(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        // Nothing under the lock can panic half-way through a change that matters.
        self.agents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// A stream said hello. An older stream of the same agent is told to end: the newer one knows better where the agent
    /// is.
    pub fn attach(&self, agent: &str, hello: HelloObserved, link: Link, now: Timestamp) {
        let mut agents = self.agents();
        let known = agents.entry(agent.to_owned()).or_default();
        if let Some(older) = known.link.replace(link) {
            older.close();
        }
        let observed = Arc::make_mut(&mut known.observed);
        observed.hello = Some(hello);
        observed.last_seen = Some(now);
        known.last_seen = Some(now);
        known.running.clear();
        known.told = false;
        known.heard = Some(Instant::now());
        known.changed_since_stored = true;
        // A new connection is worth a write at once: versions and recipients hang on it.
        known.stored = None;
        drop(agents);
        self.changed();
    }

    /// A stream ended. Nothing, if a newer one took its place.
    pub fn detach(&self, agent: &str, link: LinkId) {
        let mut agents = self.agents();
        if let Some(known) = agents.get_mut(agent)
            && known.link.as_ref().is_some_and(|current| current.id() == link)
        {
            known.link = None;
            drop(agents);
            self.changed();
        }
    }

    /// Something came over the stream: renews the lease, if the stream is still the agent's newest.
    pub fn heard(&self, agent: &str, link: LinkId, now: Timestamp) {
        if let Some(known) = self.agents().get_mut(agent)
            && known.link.as_ref().is_some_and(|current| current.id() == link)
        {
            known.heard = Some(Instant::now());
            known.last_seen = Some(now);
        }
    }

    /// What a heartbeat said is running.
    pub fn running(&self, agent: &str, running: Vec<(JobId, FencingToken)>) {
        let mut agents = self.agents();
        if let Some(known) = agents.get_mut(agent)
            && known.running != running
        {
            known.running = running;
            drop(agents);
            self.changed();
        }
    }

    /// Every attempt that a connected agent's newest heartbeat names, with the agent.
    pub fn all_running(&self) -> Vec<(String, JobId, FencingToken)> {
        let agents = self.agents();
        let connected = agents.iter().filter(|(_, known)| known.link.is_some());
        connected
            .flat_map(|(name, known)| known.running.iter().map(|(job, token)| (name.clone(), job.clone(), *token)))
            .collect()
    }

    /// Whether the agent's newest heartbeat names the attempt; `None` if it is not connected.
    pub fn says_it_runs(&self, agent: &str, job: &JobId, token: FencingToken) -> Option<bool> {
        let agents = self.agents();
        let known = agents.get(agent).filter(|known| known.link.is_some())?;
        Some(known.running.iter().any(|(running, of)| running == job && *of == token))
    }

    pub fn observe(&self, agent: &str, facts: FactsObserved) {
        let mut agents = self.agents();
        let known = agents.entry(agent.to_owned()).or_default();
        if known.observed.facts.as_ref().is_none_or(|held| held.instances != facts.instances) {
            known.changed_since_stored = true;
        }
        Arc::make_mut(&mut known.observed).facts = Some(facts);
        known.told = true;
        drop(agents);
        self.changed();
    }

    pub fn progress(&self, job: &JobId, progress: Progress) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).insert(job.clone(), progress);
        self.progressed.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub fn progress_of(&self, job: &JobId) -> Option<Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).get(job).cloned()
    }

    /// Drops the progress of jobs that are over.
    pub fn keep_progress_of(&self, active: impl Fn(&JobId) -> bool) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).retain(|job, _| active(job));
    }

    /// The agent's stream, if it has one here.
    pub fn link(&self, agent: &str) -> Option<Link> {
        self.agents().get(agent).and_then(|known| known.link.clone())
    }

    /// Every agent ever heard of, joined with what identity knows of each member.
    pub fn seen(&self, enrolled: BTreeMap<String, Enrolled>) -> BTreeMap<String, AgentSeen> {
        let agents = self.agents();
        let names: std::collections::BTreeSet<&String> = agents.keys().chain(enrolled.keys()).collect();
        names
            .into_iter()
            .map(|name| {
                let known = agents.get(name);
                let seen = AgentSeen {
                    observed: known.map(|known| known.observed.clone()).unwrap_or_default(),
                    connected: known.is_some_and(|known| known.link.is_some()),
                    vouches: known.is_some_and(|known| known.link.is_some() && known.told),
                    last_seen: known.and_then(|known| known.last_seen),
                    enrolled: enrolled.get(name).cloned().unwrap_or_default(),
                };
                (name.clone(), seen)
            })
            .collect()
    }

    /// Why the lease of the agent's jobs is over; `None`: it holds.
    pub fn lease_lost(&self, agent: &str) -> Option<String> {
        let heard = self.agents().get(agent).and_then(|known| known.heard);
        match heard {
            Some(heard) if heard.elapsed() > self.timing.lease => {
                Some(format!("agent {agent} was last heard {}s ago", heard.elapsed().as_secs()))
            }
            // After a start, agents have as long to come back as they may be silent.
            None if self.started.elapsed() > self.timing.lease => {
                Some(format!("agent {agent} did not come back after the controller's start"))
            }
            Some(_) | None => None,
        }
    }

    /// What has changed and is due to be stored. The caller stores it; a failure is made good by the next change.
    pub fn take_unstored(&self) -> Vec<(String, Arc<AgentObserved>)> {
        let mut taken = Vec::new();
        for (name, known) in self.agents().iter_mut().filter(|(_, known)| known.changed_since_stored) {
            if known.stored.is_none_or(|at| at.elapsed() >= self.timing.store_interval) {
                known.changed_since_stored = false;
                known.stored = Some(Instant::now());
                Arc::make_mut(&mut known.observed).last_seen = known.last_seen;
                taken.push((name.clone(), known.observed.clone()));
            }
        }
        taken
    }

    /// Closes the stream of an agent that was revoked.
    pub fn disconnect(&self, agent: &str) {
        if let Some(link) = self.link(agent) {
            link.close();
        }
    }
}
