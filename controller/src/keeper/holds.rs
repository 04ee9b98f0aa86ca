//! Holds: what an operator wants kept whatever retention says. They stand in the repository, where every path that removes
//! anything honours them.

use jiff::Timestamp;
use walfleet_repository::cluster_log::{Author, ClusterLog, ClusterState, LogError};
use walfleet_repository::format::log_entry::{Action, Hold, HoldSubject};
use walfleet_repository::ids::{BackupId, ClusterName, HoldId};
use walfleet_repository::lineage;
use walfleet_repository::retention::gather::{Gathered, Known};
use walfleet_repository::retention::stretch::{NothingLeft, stretches};

use super::{Keeper, KeeperError};
use crate::resources::{RepositorySpec, RetentionSpec};

/// What is to be held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    Backup(BackupId),
    /// Any second of it. `to`: `None`, without end.
    Stretch {
        from: Timestamp,
        to: Option<Timestamp>,
    },
}

/// By whom, why and how long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Terms {
    pub owner: String,
    pub reason: String,
    pub until: Option<Timestamp>,
}

/// What came of placing or releasing a hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Held {
    /// Durable in the repository. One for each way of the WAL that the stretch lies on.
    Done(Vec<Hold>),
    /// The repository knows no such backup or hold.
    Unknown,
    /// What is to be held is not all there.
    NothingLeft(NothingLeft),
    /// Others went on writing: some of it may be held, and not all.
    Busy,
    /// It is not an operator's.
    NotYours,
}

impl Keeper {
    pub async fn place_hold(
        &self,
        (name, spec): (&str, &RepositorySpec),
        cluster: &ClusterName,
        (wanted, terms): (&Wanted, &Terms),
        now: Timestamp,
    ) -> Result<Held, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let mut log = repository.cluster_log(cluster);
        let hold = |subject: HoldSubject| Hold {
            hold: HoldId::generate(),
            subject,
            reason: terms.reason.clone(),
            owner: terms.owner.clone(),
            until_us: terms.until.map(Timestamp::as_microsecond),
        };
        match wanted {
            Wanted::Backup(backup) => {
                let hold = hold(HoldSubject::Backup(backup.clone()));
                let mut is_there = false;
                let place = |state: &ClusterState| {
                    is_there = state.session(backup).is_some_and(|session| session.committed().is_some());
                    let is_new = !state.holds().any(|held| held.hold == hold.hold);
                    (is_there && is_new).then(|| Action::Hold(hold.clone()))
                };
                log.append_unless_done(self.author(), place).await?;
                Ok(if is_there { Held::Done(vec![hold]) } else { Held::Unknown })
            }
            Wanted::Stretch { from, to } => {
                let gathered = Gathered::read(&repository, &mut log, &Known::default()).await?;
                let promise = RetentionSpec::least().promise();
                let found = match stretches(&gathered.given(now, &promise, &[]), *from, *to) {
                    Ok(found) => found,
                    Err(nothing) => return Ok(Held::NothingLeft(nothing)),
                };
                let holds: Vec<Hold> = found.into_iter().map(|found| hold(HoldSubject::Stretch(found))).collect();
                self.append_all(&mut log, gathered.sequence, &holds).await
            }
        }
    }

    /// All of them, right behind what they were chosen on.
    async fn append_all(&self, log: &mut ClusterLog, sequence: u64, holds: &[Hold]) -> Result<Held, KeeperError> {
        for (behind, hold) in (sequence..).zip(holds) {
            let mut is_there = false;
            let place = |state: &ClusterState| {
                is_there = state.holds().any(|held| held.hold == hold.hold);
                (!is_there && state.next() == behind).then(|| Action::Hold(hold.clone()))
            };
            log.append_unless_done(self.author(), place).await?;
            if !is_there && !log.state().holds().any(|held| held.hold == hold.hold) {
                return Ok(Held::Busy);
            }
        }
        Ok(Held::Done(holds.to_vec()))
    }

    /// A cluster's, in order of their ids.
    pub async fn holds(
        &self,
        (name, spec): (&str, &RepositorySpec),
        cluster: &ClusterName,
        now: Timestamp,
    ) -> Result<Vec<Hold>, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let mut log = repository.cluster_log(cluster);
        Ok(log.refresh().await?.holds().cloned().collect())
    }

    pub async fn release_hold(
        &self,
        (name, spec): (&str, &RepositorySpec),
        cluster: &ClusterName,
        hold: &HoldId,
        now: Timestamp,
    ) -> Result<Held, KeeperError> {
        let repository = self.find(name, spec, now).await?;
        let mut found: Option<Hold> = None;
        let release = |state: &ClusterState| {
            let held = state.holds().find(|held| held.hold == *hold).cloned();
            let is_ours = held.as_ref().is_some_and(|held| held.owner != lineage::OWNER);
            found = held.or(found.take());
            is_ours.then(|| Action::Release { hold: hold.clone() })
        };
        repository.cluster_log(cluster).append_unless_done(self.author(), release).await?;
        Ok(match found {
            None => Held::Unknown,
            Some(held) if held.owner == lineage::OWNER => Held::NotYours,
            Some(held) => Held::Done(vec![held]),
        })
    }

    /// Releases those whose time is over.
    pub(super) async fn release_over(&self, log: &mut ClusterLog, now: Timestamp) -> Result<(), LogError> {
        let is_over = |hold: &Hold| hold.until_us.is_some_and(|until| until <= now.as_microsecond());
        let next = |state: &ClusterState| {
            let over = state.holds().find(|hold| is_over(hold))?;
            tracing::info!(hold = %over.hold, owner = over.owner, "a hold's time is over");
            Some(Action::Release { hold: over.hold.clone() })
        };
        while log.state().holds().any(is_over) {
            log.append_unless_done(self.author(), next).await?;
        }
        Ok(())
    }

    fn author(&self) -> Author<'_> {
        Author::keeper(self.reconciler.keeper.signer(), self.reconciler.epoch)
    }
}
