//! Brings the fleet from what is seen to what is wanted, again and again.
//!
//! Level-triggered: a pass takes no hint about what changed, reads everything, and does what is still to do; a pass that
//! failed half-way is made good by the next one. It runs when facts, jobs, members or documents change, and on a timer.
//!
//! A pass, in this order: store what was seen · pin new clusters · end lost leases · make due runs, and gaps without a backup behind them, into jobs · offer
//! queued jobs · send offers, cancels and desired states to the streams of this controller · prune history.

pub mod deliver;
pub mod desired;
pub mod gap_backups;
pub mod leases;
pub mod measure;
pub mod report;
pub mod schedules;
pub mod spools;
pub mod writers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;

use crate::fleet::clusters::{self, AgentSeen, Assembly, Enrolled, Pin};
use crate::fleet::{Fleet, store};
use crate::identity::{KeeperKey, Role, Roster};
use crate::jobs::dispatch::{self, Decision};
use crate::jobs::{Event, Job, JobStoreError, Jobs};
use crate::resources::stored::Catalog;
use crate::state::{RowError, State, StateError};

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Row(#[from] RowError),
    #[error(transparent)]
    Job(#[from] JobStoreError),
    #[error(transparent)]
    Writer(#[from] writers::WriterError),
}

impl From<StateError> for ReconcileError {
    fn from(error: StateError) -> ReconcileError {
        ReconcileError::Row(error.into())
    }
}

/// All that a pass, and every reader, looks at: consistent enough, since whatever changes meanwhile is seen next time.
pub struct Picture {
    pub now: Timestamp,
    pub agents: BTreeMap<String, AgentSeen>,
    pub pins: BTreeMap<ClusterName, Pin>,
    pub catalog: Catalog,
}

impl Picture {
    pub fn assemble(&self) -> Assembly<'_> {
        clusters::assemble(self.now, &self.agents, &self.pins, &self.catalog)
    }
}

/// What one pass did, for logs, metrics and tests.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct PassReport {
    pub leases_lost: usize,
    pub runs_created: usize,
    pub offered: usize,
    pub waiting: usize,
    pub desired_changed: usize,
    /// What went wrong; the next pass tries again.
    pub problems: Vec<String>,
}

/// The fleet's state and its actors. One per process, shared by the reconciler and the calls.
pub struct Reconciler {
    pub state: State,
    pub fleet: Arc<Fleet>,
    pub jobs: Jobs,
    pub roster: Arc<Roster>,
    pub keeper: Arc<KeeperKey>,
    /// Grows with every start of a controller (with etcd: every election); agents refuse an older one.
    pub epoch: u64,
    /// Counts changes of declared documents.
    documents: watch::Sender<u64>,
    /// What was already sent to which stream, and since when a job is missing from heartbeats.
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    delivered: deliver::Delivered,
    missing: leases::Missing,
    told: deliver::KnownTold,
    /// Clusters whose jobs changed since their history was pruned.
    last_pruned: BTreeMap<ClusterName, usize>,
}

/// Changes come in bursts; one pass serves a burst.
const SETTLE: Duration = Duration::from_millis(50);
/// A pass is followed by a rest of this many times its length: a large fleet that always changes takes a quarter of a
/// core, not all of it.
const REST: u32 = 3;

impl Reconciler {
    pub fn new(
        state: State,
        fleet: Arc<Fleet>,
        jobs: Jobs,
        roster: Arc<Roster>,
        keeper: Arc<KeeperKey>,
        epoch: u64,
    ) -> Arc<Reconciler> {
        let documents = watch::Sender::new(0);
        Arc::new(Reconciler { state, fleet, jobs, roster, keeper, epoch, documents, memory: Mutex::default() })
    }

    /// Documents were applied or deleted.
    pub fn documents_changed(&self) {
        self.documents.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub fn subscribe_documents(&self) -> watch::Receiver<u64> {
        self.documents.subscribe()
    }

    /// Runs until cancelled. A pass under way is finished: it is short, and each of its writes stands alone.
    pub async fn run(&self, cancel: &CancellationToken) {
        let mut facts = self.fleet.subscribe();
        let mut jobs = self.jobs.subscribe();
        let mut members = self.roster.changes();
        let mut documents = self.subscribe_documents();
        let mut failing = false;
        while !cancel.is_cancelled() {
            facts.borrow_and_update();
            jobs.borrow_and_update();
            members.borrow_and_update();
            documents.borrow_and_update();
            let begun = tokio::time::Instant::now();
            let report = self.pass(Timestamp::now()).await;
            let rest = SETTLE.max(begun.elapsed() * REST);
            match (report.problems.is_empty(), failing) {
                (false, false) => {
                    tracing::error!(problems = ?report.problems, "reconciliation fails; it goes on trying")
                }
                (true, true) => tracing::info!("reconciliation works again"),
                _ => {}
            }
            failing = !report.problems.is_empty();
            // All arms only wait; dropping them loses nothing, since the next pass reads everything.
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(self.fleet.timing.tick) => continue,
                _ = facts.changed() => {}
                _ = jobs.changed() => {}
                _ = members.changed() => {}
                _ = documents.changed() => {}
            }
            cancel.run_until_cancelled(tokio::time::sleep(rest)).await;
        }
    }

    pub async fn picture(&self, now: Timestamp) -> Result<Picture, RowError> {
        Ok(Picture {
            now,
            agents: self.fleet.seen(self.enrolled()),
            pins: store::load_pins(&self.state).await?,
            catalog: Catalog::load(&self.state).await?,
        })
    }

    fn enrolled(&self) -> BTreeMap<String, Enrolled> {
        let time = |micros: i64| Timestamp::from_microsecond(micros).ok();
        self.roster
            .members()
            .into_iter()
            .filter(|member| member.role == Role::Agent)
            .map(|member| {
                let enrolled = Enrolled {
                    joined_at: time(member.joined_at_us),
                    certificate_not_after: time(member.certificate_not_after_us),
                    revoked: member.revoked_at_us.is_some(),
                    labels: member.labels,
                };
                (member.name.to_string(), enrolled)
            })
            .collect()
    }

    /// One pass. Never fails as a whole: what goes wrong stands in the report.
    pub async fn pass(&self, now: Timestamp) -> PassReport {
        let mut memory = self.memory.lock().await;
        let mut report = PassReport::default();
        if let Err(error) = self.steps(now, &mut memory, &mut report).await {
            report.problems.push(in_full(&error));
        }
        report
    }

    async fn steps(&self, now: Timestamp, memory: &mut Memory, report: &mut PassReport) -> Result<(), ReconcileError> {
        for (agent, observed) in self.fleet.take_unstored() {
            // One agent's facts that cannot be stored must not keep the fleet from its work.
            if let Err(error) = store::store_agent(&self.state, &agent, &observed).await {
                report.problems.push(format!("store the facts of agent {agent}: {}", in_full(&error)));
            }
        }
        let picture = self.picture(now).await?;
        let assembly = picture.assemble();
        for (cluster, pin) in &assembly.new_pins {
            if !picture.pins.contains_key(cluster) {
                let (system_identifier, agent) = (pin.system_identifier, &pin.discovered_by);
                tracing::info!(%cluster, system_identifier, agent, "found a cluster");
            }
            store::store_pin(&self.state, cluster, pin).await?;
        }
        let jobs = self.jobs.active().await?;
        report.leases_lost = leases::end_lost(self, &jobs, &mut memory.missing, now).await?;
        report.runs_created = schedules::make_runs(self, &assembly, &jobs, now).await?;
        let jobs = self.jobs.active().await?;
        report.runs_created += gap_backups::make_runs(self, &assembly, &jobs, now).await?;
        let jobs = self.jobs.active().await?;
        self.dispatch(&picture, &assembly, &jobs, report).await?;
        let jobs = self.jobs.active().await?;
        report.desired_changed = deliver::desired(self, &picture, &assembly, &jobs, &mut memory.told).await?;
        deliver::orders(self, &jobs, &mut memory.delivered);
        self.fleet.keep_progress_of(|job| jobs.iter().any(|active| active.id == *job));
        self.prune(&assembly, &mut memory.last_pruned, &jobs, now).await
    }

    async fn dispatch(
        &self,
        picture: &Picture,
        assembly: &Assembly<'_>,
        jobs: &[Job],
        report: &mut PassReport,
    ) -> Result<(), ReconcileError> {
        for (job, decision) in dispatch::plan(picture.now, jobs, &picture.agents, assembly) {
            match decision {
                Decision::Offer { agent } => {
                    let applied = self.jobs.offer(&job, &agent, picture.now).await?;
                    if applied.changed {
                        report.offered += 1;
                        tracing::info!(%job, agent, attempt = applied.job.attempt, "offered a job");
                    }
                }
                Decision::Wait { reason } => {
                    report.waiting += 1;
                    self.jobs.apply(&job, Event::Wait { reason }, picture.now).await?;
                }
            }
        }
        Ok(())
    }

    /// Looks at a cluster's history only when the number of its active jobs fell (then one has joined the history), and
    /// once after the start.
    async fn prune(
        &self,
        assembly: &Assembly<'_>,
        last: &mut BTreeMap<ClusterName, usize>,
        jobs: &[Job],
        now: Timestamp,
    ) -> Result<(), ReconcileError> {
        let before = now.checked_sub(self.fleet.timing.history).unwrap_or(Timestamp::MIN);
        for cluster in assembly.clusters.keys() {
            let active = jobs.iter().filter(|job| job.cluster == *cluster).count();
            if last.insert(cluster.clone(), active).is_none_or(|had| had > active) {
                self.jobs.prune(cluster, before).await?;
            }
        }
        Ok(())
    }
}

/// The epoch of this start: more than any before, durably.
///
/// Not below the seconds since 1970, so that it is also more than that of a controller whose state is lost or newer than
/// this one: its epochs are in the repositories' logs and with the agents, which obey and believe no older one.
pub async fn next_epoch(state: &State) -> Result<u64, RowError> {
    const KEY: &str = "controller/epoch";
    loop {
        let row = state.row::<u64>(KEY).await?;
        let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
        let epoch = row.as_ref().map_or(0, |row| row.value).saturating_add(1).max(now);
        match state.update_row(KEY, row.map_or(0, |row| row.mod_revision), &epoch).await {
            Ok(_) => return Ok(epoch),
            Err(RowError::Conflict { .. }) => continue,
            Err(error) => return Err(error),
        }
    }
}

/// An error with its sources, in one line per cause.
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        // A transparent wrapper says what its source says, and some of the repository's errors end with it.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
