//! Whose WAL is streamed: one receiver for each instance of this host whose cluster wants it. The receiving itself is
//! `wal::receive`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::shipping::{self, ShippingSpec};
use walfleet_repository::signature::Certificate;

use crate::access::{Access, InstanceAccess, RepositoryAccess};
use crate::archiving::{Archiving, Receiving};
use crate::config::Config;
use crate::identity::connect::chain;
use crate::spool::Spool;
use crate::wal::let_go::{Guard, Shipped};
use crate::wal::receive::{
    LONGEST_UNANSWERED, ReceiveError, ReceiveOptions, Receiver, StreamStatus, Synchronous, UNANSWERED,
};

/// How long until an instance whose repository could not be opened is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Without the repository, before that is asked again.
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);

/// How often it is seen whether all receivers still run: the longest pause that a bug in one makes, and the shortest between
/// two that it ends.
const LOOK: Duration = Duration::from_secs(10);

/// A repository that does not answer is told of after so long, where nothing is done without it.
const TOLD_AFTER: Duration = Duration::from_secs(10);
const NO_ANSWER: &str = "the repository does not answer";

pub struct Streaming {
    pub config: Arc<Config>,
    pub access: watch::Receiver<Option<Arc<Access>>>,
    pub archiving: Arc<Archiving>,
    /// Absent on a host without a controller.
    pub spool: Option<Arc<Spool>>,
}

/// How long a receiver may take to end before its slot is dropped: it tries to store what it has.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What a receiver was made with: if that changes, another is made, as its shipper is.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Terms {
    cluster: ClusterName,
    instance: InstanceAccess,
    repository: Arc<RepositoryAccess>,
    compression_level: i32,
    shipping: ShippingSpec,
    key_file: PathBuf,
    chain: Vec<Certificate>,
}

struct Running<T> {
    terms: T,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Streaming {
    /// Receives until told to stop; then what was received is stored, up to a deadline.
    pub async fn run(&self, stop: CancellationToken) {
        keep_running(self.access.clone(), |access| wanted(access.as_deref()), |terms| self.begin(terms), stop).await;
    }

    fn begin(&self, terms: Terms) -> Running<Terms> {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let guard = Guard {
            cluster: terms.cluster.clone(),
            instance: terms.instance.clone(),
            slot: self.config.wal.slot.clone(),
            limit: terms.shipping.let_go_at.unwrap_or_default(),
            state_dir: self.config.state_dir.clone(),
        };
        let options = ReceiveOptions {
            slot: self.config.wal.slot.clone(),
            interval: terms.shipping.piece_interval.unwrap_or_default().duration(),
            synchronous: match terms.shipping.synchronous.unwrap_or_default() {
                shipping::Synchronous::Off => Synchronous::Off,
                shipping::Synchronous::Repository => Synchronous::Repository,
                shipping::Synchronous::Spool => Synchronous::Spool(terms.shipping.without_peer.unwrap_or_default()),
            },
            parallel: self.config.wal.parallel_uploads as usize,
        };
        let source = Source {
            archiving: Arc::clone(&self.archiving),
            instance: terms.instance.clone(),
            cluster: terms.cluster.clone(),
            options,
            spool: self.spool.clone(),
        };
        let task = tokio::spawn(async move { guarded(&source, &guard, stopped).await });
        Running { terms, stop, task }
    }
}

/// One receiver for each that is wanted. One that ended by itself, which a bug alone does, is begun anew at the next look.
async fn keep_running<A, T: PartialEq>(
    mut access: watch::Receiver<A>,
    wanted: impl Fn(&A) -> BTreeMap<PathBuf, T>,
    begin: impl Fn(T) -> Running<T>,
    stop: CancellationToken,
) {
    let mut running: BTreeMap<PathBuf, Running<T>> = BTreeMap::new();
    loop {
        let wanted = wanted(&access.borrow_and_update());
        for (data_dir, _) in running.iter().filter(|(_, receiver)| receiver.task.is_finished()) {
            tracing::error!(data_dir = %data_dir.display(), "the task that receives WAL has ended by a bug, and is begun anew");
        }
        let ended = running.extract_if(.., |data_dir, receiver| {
            wanted.get(data_dir) != Some(&receiver.terms) || receiver.task.is_finished()
        });
        end(ended.map(|(_, receiver)| receiver).collect()).await;
        for (data_dir, terms) in wanted {
            running.entry(data_dir).or_insert_with(|| begin(terms));
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = access.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    end(running.into_values().collect()).await;
}

/// Whose WAL is received, and how.
struct Source {
    archiving: Arc<Archiving>,
    instance: InstanceAccess,
    cluster: ClusterName,
    options: ReceiveOptions,
    spool: Option<Arc<Spool>>,
}

impl Source {
    fn receiver(&self, Receiving { shipper, breaks, kept }: Receiving) -> Receiver {
        Receiver {
            instance: self.instance.clone(),
            shipper,
            breaks,
            options: self.options.clone(),
            spool: self.spool.clone(),
            cluster: self.cluster.clone(),
            kept,
        }
    }

    fn shipped(&self) -> Shipped {
        let of_cluster = self.archiving.statuses().into_iter().filter(|(cluster, _)| *cluster == self.cluster);
        let statuses: Vec<_> = of_cluster.map(|(_, shipping)| shipping).collect();
        Shipped {
            stored: statuses.iter().map(|shipping| shipping.stored_bytes()).sum(),
            lacking: statuses.iter().filter_map(|shipping| shipping.streamed.lacking()).max(),
        }
    }
}

/// Receives until told to stop; where the policy says so, the slot is let go of between.
async fn guarded(source: &Source, guard: &Guard, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let round = stop.child_token();
        let mut receiving = Box::pin(receive(source, &round));
        let reached = tokio::select! {
            () = &mut receiving => return,
            reached = guard.watch(|| source.shipped()) => reached,
        };
        round.cancel();
        // What is cut off here was never said to be stored.
        let _ = tokio::time::timeout(LAST_WORDS, &mut receiving).await;
        drop(receiving);
        if let Err(error) = guard.let_go(&reached).await {
            tracing::warn!("WAL cannot be let go of, and that is tried again: {}", chain(&error));
        }
    }
}

/// What a receiver that a bug ends was doing, it does no longer.
struct Told(watch::Sender<StreamStatus>);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let problem =
                format!("the task that receives it ended by a bug, and is begun anew within {} s", LOOK.as_secs());
            self.0.send_modify(|status| status.wait(problem));
        }
    }
}

/// Why nothing is received holds until something is, and no longer than it is wanted.
struct Waiting<'a>(&'a Source);

impl Waiting<'_> {
    fn with(&self, problem: String) {
        self.0.archiving.wait_with(&self.0.cluster, problem);
    }

    fn no_more(&self) {
        self.0.archiving.wait_no_more(&self.0.cluster);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.no_more();
    }
}

async fn receive(source: &Source, stop: &CancellationToken) {
    let (archiving, data_dir) = (&source.archiving, &source.instance.data_dir);
    let waiting = Waiting(source);
    let mut patience = UNANSWERED;
    while !stop.is_cancelled() {
        let mut receiving = pin!(archiving.receiving(data_dir));
        let made = match source.options.synchronous {
            Synchronous::Spool(_) => tokio::time::timeout(patience, receiving).await.ok(),
            Synchronous::Off | Synchronous::Repository => {
                let soon = tokio::time::timeout(TOLD_AFTER, &mut receiving).await;
                Some(match soon {
                    Ok(made) => made,
                    Err(_) => {
                        waiting.with(NO_ANSWER.to_owned());
                        receiving.await
                    }
                })
            }
        };
        let problem = match made {
            Some(Ok(receiving)) => {
                let _told = Told(receiving.shipper.stream().clone());
                waiting.no_more();
                source.receiver(receiving).run(stop.clone()).await;
                continue;
            }
            Some(Err(problem)) => problem,
            None => NO_ANSWER.to_owned(),
        };
        let problem = match bridge(source, stop).await {
            Ok(()) => {
                // A slow repository gets its time.
                patience = (patience * 2).min(LONGEST_UNANSWERED);
                continue;
            }
            Err(None) => problem,
            Err(Some(instead)) => {
                patience = LONGEST_UNANSWERED;
                format!("{problem}; {instead}")
            }
        };
        tracing::debug!(data_dir = %data_dir.display(), "not streamed yet: {problem}");
        waiting.with(problem);
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

/// Until the repository answers, where commits wait for spools; why that cannot be done.
async fn bridge(source: &Source, stop: &CancellationToken) -> Result<(), Option<String>> {
    if !matches!(source.options.synchronous, Synchronous::Spool(_)) {
        return Err(None);
    }
    let receiving = source.archiving.bridging(&source.instance.data_dir).await.map_err(Some)?;
    let _told = Told(receiving.shipper.stream().clone());
    let receiver = source.receiver(receiving);
    let mut tries = 0;
    loop {
        tries += 1;
        match receiver.bridge(stop).await {
            // The server may be starting, or not know yet that this agent's process before is gone.
            Err(error) if tries < TRIES && !matches!(error, ReceiveError::Unknown { .. }) && !stop.is_cancelled() => {
                tracing::debug!("{}", chain(&error));
                tokio::time::sleep(BETWEEN_TRIES).await;
            }
            Err(error @ ReceiveError::Unknown { .. }) => return Err(Some(chain(&error))),
            bridged => return bridged.map_err(|_| None),
        }
    }
}

/// What waits for a store that does not answer is cut off: it was never said to be stored.
async fn end<T>(receivers: Vec<Running<T>>) {
    receivers.iter().for_each(|receiver| receiver.stop.cancel());
    let ends = receivers.into_iter().map(|mut receiver| async move {
        // A bug in one is logged by the runtime's panic hook.
        if tokio::time::timeout(LAST_WORDS, &mut receiver.task).await.is_err() {
            receiver.task.abort();
            let _ = receiver.task.await;
        }
    });
    join_all(ends).await;
}

fn wanted(access: Option<&Access>) -> BTreeMap<PathBuf, Terms> {
    let clusters = access.into_iter().flat_map(|access| access.clusters.values().map(move |cluster| (access, cluster)));
    let streamed = clusters.filter(|(_, cluster)| cluster.is_to_be_streamed());
    let terms = streamed.filter_map(|(access, cluster)| {
        let instance = cluster.instance.clone()?;
        let terms = Terms {
            cluster: cluster.name.clone(),
            repository: Arc::clone(&cluster.repository),
            compression_level: cluster.compression_level,
            shipping: cluster.shipping,
            key_file: access.key.path.clone(),
            chain: access.key.chain.clone(),
            instance,
        };
        Some((terms.instance.data_dir.clone(), terms))
    });
    terms.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::wal::receive::StreamPhase;

    #[tokio::test]
    async fn a_receiver_that_panics_is_begun_anew_though_nothing_else_changes() {
        let (begun, stop) = (AtomicUsize::new(0), CancellationToken::new());
        let (status, told) = watch::channel(StreamStatus { phase: StreamPhase::Streaming, ..StreamStatus::default() });
        let begin = |terms: u32| {
            let (count, stopped) = (begun.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
            let stop = stopped.clone();
            let told = Told(status.clone());
            let task = tokio::spawn(async move {
                let _told = told;
                assert!(count > 0, "a bug");
                stopped.cancelled().await;
            });
            Running { terms, stop, task }
        };
        let (_access, seen) = watch::channel(7);
        let wanted = |terms: &u32| BTreeMap::from([(PathBuf::from("/data"), *terms)]);
        let running = keep_running(seen, wanted, begin, stop.clone());
        let end = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(told.borrow().phase.problem().is_some_and(|problem| problem.contains("bug")), "{told:?}");
            tokio::time::sleep(LOOK + Duration::from_secs(2)).await;
            let count = begun.load(Ordering::Relaxed);
            stop.cancel();
            count
        };
        assert_eq!(tokio::join!(running, end).1, 2, "once more, within a look");
    }
}
