//! Plans: made, shown, let pass and carried out.

use jiff::Timestamp;
use walfleet_repository::cluster_log::{Author, ClusterLog, ClusterState, Outcome, SessionState};
use walfleet_repository::format::log_entry::Action;
use walfleet_repository::ids::{BackupId, ClusterName};
use walfleet_repository::open::Repository;
use walfleet_repository::retention::gather::{GatherError, Gathered, Known};
use walfleet_repository::retention::guards::SKEW;
use walfleet_repository::retention::{self, Decision, Plan, Refusal};
use walfleet_repository::store::probe;

use super::release::{self, Released};
use super::standing::{self, Standing};
use super::{Due, Keeper, KeeperError};
use crate::resources::{RepositorySpec, RetentionSpec};
use crate::state::Row;

/// What a policy comes to.
#[derive(Clone, Debug)]
pub struct Planned {
    pub plan: Plan,
    /// It keeps less than what is in force, and counts from then on.
    pub acts_from: Option<Timestamp>,
}

/// What came of bringing a backup back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Brought {
    Back,
    /// The repository knows no such backup.
    Unknown,
    Not {
        why: String,
    },
}

impl Planned {
    /// Whether an operator's word is needed, or makes it act sooner.
    pub fn can_be_released(&self) -> bool {
        self.acts_from.is_some() || self.plan.refused.iter().any(Refusal::is_brake)
    }
}

impl Keeper {
    /// What would be done now by what the policy says, in force or not.
    pub async fn plan_retention(
        &self,
        name: &str,
        spec: &RepositorySpec,
        cluster: &ClusterName,
        wanted: &RetentionSpec,
        now: Timestamp,
    ) -> Result<Planned, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let gathered = Gathered::read(&repository, &mut repository.cluster_log(cluster), &Known::default()).await?;
        let doubts = doubts(&repository).await?;
        let plan = retention::plan(&gathered.given(now, &wanted.promise(), &doubts));
        let before = self.reconciler.state.row::<Standing>(&standing::key(name, cluster)).await?;
        let notice = self.timing().notice;
        let standing = before.map(|row| row.value).unwrap_or_default().after(wanted, notice, now);
        Ok(Planned { plan, acts_from: standing.asked.map(|asked| asked.since + notice) })
    }

    /// Lets a plan pass that the brake holds back, or that keeps less than before, with the next look, which comes at once.
    pub async fn release(
        &self,
        name: &str,
        cluster: &ClusterName,
        (wanted, plan): (&RetentionSpec, &Plan),
        by: &str,
        now: Timestamp,
    ) -> Result<(), KeeperError> {
        let (state, key) = (&self.reconciler.state, release::key(name, cluster));
        let before = state.row::<Released>(&key).await?.map_or(0, |row| row.mod_revision);
        state.update_row(&key, before, &Released::now(plan, by, now)).await?;
        let key = standing::key(name, cluster);
        let before = state.row::<Standing>(&key).await?.map_or(0, |row| row.mod_revision);
        state.update_row(&key, before, &Standing::of(wanted)).await?;
        self.look_again(cluster);
        Ok(())
    }

    /// Takes a backup out of the trash. It stays for as long as retention wants it, which is asked anew with the next plan.
    pub async fn bring_back(
        &self,
        name: &str,
        spec: &RepositorySpec,
        cluster: &ClusterName,
        backup: &BackupId,
        now: Timestamp,
    ) -> Result<Brought, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
        let mut found = Brought::Unknown;
        let undelete = |state: &ClusterState| {
            found = brought(state, backup);
            (found == Brought::Back).then(|| Action::Undelete { backup: backup.clone() })
        };
        repository.cluster_log(cluster).append_unless_done(author, undelete).await?;
        Ok(found)
    }

    /// Makes the plan of what is in force, and its entries. Returns it, and how many were made.
    pub(super) async fn keep_promise(
        &self,
        repository: &Repository,
        log: &mut ClusterLog,
        due: &Due,
        (in_force, doubts): (&RetentionSpec, &[String]),
        now: Timestamp,
    ) -> Result<(Option<Plan>, usize), KeeperError> {
        let gathered = Gathered::read(repository, log, &Known::default()).await?;
        let plan = retention::plan(&gathered.given(now, &in_force.promise(), doubts));
        let released = self.released(due, &plan, now).await?;
        let mut made = 0;
        if plan.refused.is_empty() || released.is_some() {
            made = self.carry_out(log, &gathered, &plan).await?;
            // The word counts once: until all of it is done.
            if let Some(row) = released.filter(|_| made == actions(&plan).len()) {
                self.reconciler.state.delete_row(&row).await?;
            }
        }
        Ok((Some(plan), made))
    }

    /// An operator's word that lets this plan pass.
    async fn released(&self, due: &Due, plan: &Plan, now: Timestamp) -> Result<Option<Row<Released>>, KeeperError> {
        let row = self.reconciler.state.row::<Released>(&release::key(&due.repository, &due.cluster)).await?;
        Ok(row.filter(|row| !plan.refused.is_empty() && row.value.lets_pass(plan, now)))
    }

    /// Makes a plan's entries, for as long as nobody else writes; returns how many.
    pub(super) async fn carry_out(
        &self,
        log: &mut ClusterLog,
        gathered: &Gathered,
        plan: &Plan,
    ) -> Result<usize, KeeperError> {
        let author = Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch);
        let mut made = 0;
        for action in actions(plan) {
            let behind = gathered.sequence + made as u64;
            let next = |state: &ClusterState| (state.next() == behind).then(|| action.clone());
            match log.append_unless_done(author, next).await? {
                Outcome::Appended { .. } => made += 1,
                Outcome::Nothing => break,
            }
        }
        Ok(made)
    }
}

/// Why the times that a plan compares cannot be compared: a clock that is ahead would cut the window short, and end the trash's days
/// and readers' time too soon. Of a store in a folder the clock is this host's.
pub(super) async fn doubts(repository: &Repository) -> Result<Vec<String>, KeeperError> {
    let before = Timestamp::now();
    let theirs = probe::clock(repository.store()).await.map_err(GatherError::from)?;
    let after = Timestamp::now();
    let is_near = theirs >= before - SKEW && theirs <= after + SKEW;
    let doubt = || format!("the store's clock says {theirs}, and here it is {after}\nHINT: set the one that is wrong.");
    Ok((!is_near).then(doubt).into_iter().collect())
}

/// What can be done for a backup that somebody wants back.
fn brought(state: &ClusterState, backup: &BackupId) -> Brought {
    let not = |why: &str| Brought::Not { why: why.to_owned() };
    match state.session(backup).map(|session| &session.state) {
        None => Brought::Unknown,
        Some(SessionState::Expired(..)) => Brought::Back,
        Some(SessionState::Live(_)) => not("it is not in the trash"),
        Some(SessionState::Open) => not("it is still being taken"),
        Some(SessionState::Aborted { .. }) => not("it was never finished"),
        Some(SessionState::Purged) => not("it is removed for good: its days in the trash are over"),
    }
}

/// What is brought back goes first, so that at no moment less is there than is wanted.
fn actions(plan: &Plan) -> Vec<Action> {
    let of = |wanted: fn(&Decision) -> bool| {
        plan.backups.iter().filter(move |decided| wanted(&decided.decision)).map(|decided| decided.backup.clone())
    };
    let mut actions: Vec<Action> = Vec::new();
    actions.extend(of(|decision| matches!(decision, Decision::BringBack(_))).map(|backup| Action::Undelete { backup }));
    let edge = plan.edge.strftime("%Y-%m-%d %H:%M:%S UTC");
    let reason = format!("older than the recovery window, which begins at {edge}, and no copy that is promised");
    actions.extend(
        of(|decision| *decision == Decision::Expire).map(|backup| Action::Expire { backup, reason: reason.clone() }),
    );
    actions.extend(of(|decision| *decision == Decision::Purge).map(|backup| Action::Purge { backup }));
    actions.extend(plan.trims.iter().map(|trim| Action::Trim { branch: trim.wal, lsn: trim.below }));
    actions
}
