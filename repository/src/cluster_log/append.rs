//! Appending: decide on exactly the prefix that the new entry follows.

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{ClusterLog, ClusterState, LogError, Verdict};
use crate::format::log_entry::{Action, Entry};
use crate::format::root::AppendMode;
use crate::layout;
use crate::signature::Signer;
use crate::store::Creation;

/// How often someone else may be first before we give up. Each loss means that another writer made progress, and a log
/// gets a handful of entries an hour.
const MOST_ROUNDS: u32 = 100;

/// Who appends.
#[derive(Clone, Copy, Debug)]
pub struct Author<'a> {
    pub signer: &'a Signer,
    /// A keeper's election revision; 0 for all others.
    pub keeper_epoch: u64,
}

impl<'a> Author<'a> {
    /// A host, or whoever has the recovery key.
    pub fn host(signer: &'a Signer) -> Author<'a> {
        Author { signer, keeper_epoch: 0 }
    }

    pub fn keeper(signer: &'a Signer, keeper_epoch: u64) -> Author<'a> {
        Author { signer, keeper_epoch }
    }
}

/// What to do about a state of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision<E> {
    Append(Action),
    /// It is as wanted already.
    Nothing,
    Refuse(E),
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Appended { sequence: u64 },
    Nothing,
}

/// Why nothing was appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError<E: std::error::Error + 'static> {
    #[error(transparent)]
    Log(#[from] LogError),
    /// The decision was to refuse.
    #[error(transparent)]
    Refused(E),
}

impl ClusterLog {
    /// Reads on, decides and appends, again and again until one prefix was both decided on and followed.
    ///
    /// `decide` is called once for every prefix it gets to see, and must come to `Nothing` when it finds its own work
    /// done: after a retryable error, and when the future was dropped, the entry may be there or not.
    pub async fn append<E: std::error::Error + 'static>(
        &mut self,
        author: Author<'_>,
        mut decide: impl FnMut(&ClusterState) -> Decision<E>,
    ) -> Result<Outcome, AppendError<E>> {
        for round in 0..MOST_ROUNDS {
            if round > 0 {
                tokio::time::sleep(pause(round)).await;
            }
            self.read_on().await?;
            let action = match decide(&self.state) {
                Decision::Append(action) => action,
                Decision::Nothing => return Ok(Outcome::Nothing),
                Decision::Refuse(error) => return Err(AppendError::Refused(error)),
            };
            if let Some(sequence) = self.create_next(author, action).await? {
                return Ok(Outcome::Appended { sequence });
            }
        }
        Err(LogError::Busy { cluster: self.cluster.clone(), rounds: MOST_ROUNDS }.into())
    }

    /// The same where nothing is ever refused: `None` is for a state that is as wanted already.
    pub async fn append_unless_done(
        &mut self,
        author: Author<'_>,
        mut action: impl FnMut(&ClusterState) -> Option<Action>,
    ) -> Result<Outcome, LogError> {
        let decide = |state: &ClusterState| match action(state) {
            Some(action) => Decision::<Infallible>::Append(action),
            None => Decision::Nothing,
        };
        match self.append(author, decide).await {
            Ok(outcome) => Ok(outcome),
            Err(AppendError::Log(error)) => Err(error),
            Err(AppendError::Refused(never)) => match never {},
        }
    }

    /// Creates the entry right after the prefix this handle has read; `None`: someone else was first.
    async fn create_next(&mut self, author: Author<'_>, action: Action) -> Result<Option<u64>, LogError> {
        let cluster = self.cluster.clone();
        if self.append_mode == AppendMode::Sequenced {
            return Err(LogError::Sequenced { cluster });
        }
        let signer = author.signer;
        let writer = match self.trust.verify_chain(signer.public_key(), signer.chain()) {
            Ok(writer) => writer,
            Err(source) => return Err(LogError::Writer { cluster, source }),
        };
        let entry = Entry {
            cluster: cluster.clone(),
            sequence: self.state.next(),
            nonce: rand::random(),
            at_us: now_us(),
            keeper_epoch: author.keeper_epoch,
            action,
        };
        // What every reader would pass over is not written in the first place.
        if let Err(source) = self.state.judge(&entry, &writer) {
            return Err(LogError::Void { cluster, source });
        }
        // The end may have been taken for granted by a cheap read; not so when something is built on it.
        if !self.ends_here().await? {
            return Ok(None);
        }
        let key = layout::log_entry(&cluster, entry.sequence);
        let object = entry.seal(signer, self.trust.repository_id);
        // A lost reply is settled in there by reading back: the nonce makes these bytes ours alone.
        match self.store.create(&key, object).await {
            Ok(Creation::Created) => {
                let verdict = self.state.apply(&entry, &writer);
                debug_assert_eq!(verdict, Verdict::Accepted, "the entry was judged on this very state");
                self.confirmed_end = Some(self.state.next());
                self.memory.keep(&self.cluster, &self.state);
                Ok(Some(entry.sequence))
            }
            Ok(Creation::AlreadyThere) => Ok(None),
            Err(source) => Err(self.store_error(source)),
        }
    }
}

/// A little longer after every loss, at random, so that many who begin at once do not stay in step.
fn pause(round: u32) -> Duration {
    Duration::from_millis(5 * u64::from(round.min(20))).mul_f64(rand::random())
}

fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
