//! What a writer left in a spool: another host's that is gone, or this one's of before a restart. What the repository lacks of
//! it is stored, then it is removed. Doing it again changes nothing: pieces are only created, and what is there counts.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use walfleet_repository::layout::TailName;
use walfleet_repository::postgres::Lsn;
use walfleet_repository::store::{Creation, StoreError};
use walfleet_repository::wal_archive::{Continuity, KeylessTails, TailPlace};

use super::Spool;
use super::files::{self, Damaged, Found, Lies, Owner, SpoolError, Spools};
use crate::access::{AccessError, RepositoryAccess};
use crate::identity::connect::chain;
use crate::tasks::{self, on_disk};

/// How long a host has been gone before what it left is looked at: its own agent may be back at once.
pub const GONE_FOR: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(1);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(5);
/// Small objects, so latency counts.
const CREATES: usize = 16;

#[derive(Debug, thiserror::Error)]
enum LeftError {
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it is not known to which repository it belongs")]
    NoLocation,
    #[error(
        "what lies in the repository as piece {0} is damaged\nHINT: remove that object, and what is kept here takes its place."
    )]
    Damaged(TailName),
}

/// What was done with one owner's files.
#[derive(Default)]
struct Settled {
    stored: u64,
    /// Of the newest piece that was stored.
    end: Option<Lsn>,
    /// What did not read, by file.
    damaged: Vec<(PathBuf, Damaged)>,
    /// What keeps some of them from being forgotten: the first of it.
    unsettled: Option<LeftError>,
    /// Those that read are removed, and nobody will find the damage in them again.
    is_forgotten: bool,
}

/// Looks after what is left, for as long as the agent runs. Each owner by itself: one whose repository does not answer keeps no
/// other waiting.
pub async fn store_left(spool: Arc<Spool>, stop: CancellationToken) {
    let mut reported = BTreeMap::new();
    let mut settling = JoinSet::new();
    // Who is looked after, and who is not again before when.
    let (mut busy, mut again) = (BTreeSet::new(), BTreeMap::new());
    loop {
        tokio::select! {
            // Those under way end between two objects; each is created whole or not at all.
            () = stop.cancelled() => return,
            Some(ended) = settling.join_next() => {
                let (owner, settled) = tasks::outcome(ended).await;
                busy.remove(&owner);
                if !note(&mut reported, &owner, settled) {
                    again.insert(owner, Instant::now() + AGAIN);
                }
            }
            () = tokio::time::sleep(LOOK) => {
                again.retain(|_, at| *at > Instant::now());
                for (owner, paths) in spool.spools.left_for(GONE_FOR) {
                    if !again.contains_key(&owner) && busy.insert(owner.clone()) {
                        let spools = Arc::clone(&spool.spools);
                        settling.spawn(async move {
                            let settled = settle(&spools, &owner, paths).await;
                            (owner, settled)
                        });
                    }
                }
            }
        }
    }
}

/// Says what became of it; whether all is well.
fn note(reported: &mut BTreeMap<Owner, String>, owner: &Owner, settled: Result<Settled, LeftError>) -> bool {
    let Owner { cluster, member } = owner;
    let settled = settled.unwrap_or_else(|error| Settled { unsettled: Some(error), ..Settled::default() });
    if settled.stored > 0 {
        let end = settled.end.map(|end| end.to_string()).unwrap_or_default();
        tracing::info!(%cluster, agent = member, pieces = settled.stored, end,
            "WAL that an agent had left in this spool, and the repository lacked, is stored");
    }
    let problem = settled.unsettled.as_ref().map(|error| chain(error));
    let was_said = problem.is_some() && reported.get(owner) == problem.as_ref();
    if settled.is_forgotten || !was_said {
        settled.damaged.iter().for_each(|(path, damaged)| tell_damage(owner, path, damaged));
    }
    match problem {
        None => {
            reported.remove(owner);
            true
        }
        Some(problem) => {
            if !was_said {
                tracing::warn!(%cluster, agent = member, "WAL left in this spool is not stored yet: {problem}");
                reported.insert(owner.clone(), problem);
            }
            false
        }
    }
}

/// Which WAL it held cannot be told, but between which positions.
fn tell_damage(Owner { cluster, member }: &Owner, path: &Path, Damaged { bytes, behind, before }: &Damaged) {
    let lsn = |at: &Option<Lsn>| at.map(|at| at.to_string()).unwrap_or_default();
    tracing::warn!(%cluster, agent = member, file = %path.display(), from = bytes.start, to = bytes.end,
        behind = lsn(behind), before = lsn(before),
        "WAL left in this spool is damaged: these bytes of the file do not read, and what lay in them is lost unless the \
         repository has it or the other spool");
}

async fn settle(spools: &Arc<Spools>, owner: &Owner, paths: Vec<PathBuf>) -> Result<Settled, LeftError> {
    let (reading, whose) = (Arc::clone(spools), owner.clone());
    let (location, pieces, damaged, read, unread) = on_disk(move || -> Result<_, SpoolError> {
        let (mut pieces, mut damaged, mut read, mut unread) = (Vec::new(), Vec::new(), Vec::new(), None);
        for path in paths {
            let found = match files::read(&path) {
                Ok(found) => found,
                // Its writer came back for it and has let go of it since, or somebody removed it.
                Err(SpoolError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    read.push(path);
                    continue;
                }
                Err(error) => {
                    unread = unread.or(Some(error));
                    continue;
                }
            };
            if !found.damaged.is_empty() {
                reading.note_damage(&path);
            }
            pieces.extend(found.pieces);
            damaged.extend(found.damaged.into_iter().map(|damaged| (path.clone(), damaged)));
            read.push(path);
        }
        Ok((reading.location(&whose)?, pieces, damaged, read, unread))
    })
    .await?;
    let continuity = if damaged.is_empty() && unread.is_none() { Continuity::Unbroken } else { Continuity::Holed };
    let mut settled = Settled { damaged, ..Settled::default() };
    if !pieces.is_empty() {
        let repository = RepositoryAccess::from(location.ok_or(LeftError::NoLocation)?).open().await?;
        let tails = KeylessTails::new(repository.store().clone(), owner.cluster.clone());
        for (place, pieces) in by_place(pieces) {
            match store_missing(&tails, place, &owner.member, (pieces, continuity), &mut settled).await {
                // The rest is stored all the same.
                Err(error @ LeftError::Damaged(_)) => settled.unsettled = settled.unsettled.or(Some(error)),
                stored => stored?,
            }
        }
    }
    if settled.unsettled.is_none() {
        // Only now that the repository has it all.
        let forgetting = Arc::clone(spools);
        let forgotten = on_disk(move || {
            // Each is tried, whatever becomes of those before.
            read.iter().fold(None, |failed, path| failed.or(forgetting.forget(path).err()))
        });
        let failed = forgotten.await;
        settled.is_forgotten = failed.is_none();
        settled.unsettled = failed.or(unread).map(LeftError::from);
    }
    Ok(settled)
}

async fn store_missing(
    tails: &KeylessTails,
    place: TailPlace,
    member: &str,
    (pieces, continuity): (Vec<Found>, Continuity),
    settled: &mut Settled,
) -> Result<(), LeftError> {
    let name = |piece: &Found| TailName { from: piece.from, to: piece.to, member: member.to_owned() };
    let named: BTreeMap<TailName, Lies> = pieces.into_iter().map(|piece| (name(&piece), piece.lies)).collect();
    let names: Vec<TailName> = named.keys().cloned().collect();
    let missing = tails.missing(place, &names, continuity).await?;
    let end = missing.last().map(|last| place.segment.at(place.size, last.to));
    let creating = missing.into_iter().filter_map(|name| Some((named.get(&name)?.clone(), name)));
    let creating: Vec<_> = creating.map(|(lies, name)| create(tails.clone(), place, name, lies)).collect();
    let mut creating = futures::stream::iter(creating).buffer_unordered(CREATES);
    while let Some(created) = creating.next().await {
        settled.stored += u64::from(created? == Creation::Created);
    }
    settled.end = settled.end.max(end);
    Ok(())
}

async fn create(tails: KeylessTails, place: TailPlace, name: TailName, lies: Lies) -> Result<Creation, LeftError> {
    let sealed = on_disk(move || lies.read()).await?;
    tails.create(place, &name, sealed).await?.ok_or(LeftError::Damaged(name))
}

fn by_place(pieces: Vec<Found>) -> BTreeMap<TailPlace, Vec<Found>> {
    let mut places = BTreeMap::<TailPlace, Vec<Found>>::new();
    for piece in pieces {
        places.entry(piece.place).or_default().push(piece);
    }
    places
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;
    use walfleet_repository::key_file::{KeyFile, KeyKind};
    use walfleet_repository::open::{Repository, RepositorySpec};
    use walfleet_repository::postgres::{Branch, Segment, SegmentSize, SystemId, Timeline, WalBranch};
    use walfleet_repository::signature::Signer;

    use super::*;
    use crate::spool::SpooledPiece;
    use crate::spool::files::SpoolLog;

    async fn repository(folder: &Path) -> RepositoryAccess {
        fs::create_dir(folder).unwrap();
        let recovery = KeyFile::generate(KeyKind::Recovery).unwrap();
        let root = Signer::from_seed(&recovery.signing_seed);
        let spec = RepositorySpec { root_public_key: root.public_key(), recovery_recipient: recovery.recipient.id() };
        let url = format!("file://{}", folder.display());
        let location = RepositoryAccess { name: "main".into(), url, options: BTreeMap::new(), root: None };
        Repository::init(location.store().unwrap(), spec).await.unwrap();
        location
    }

    fn piece(from: u32) -> Arc<SpooledPiece> {
        let wal = WalBranch { system_id: SystemId(5), timeline: Timeline(3), branch: Branch([7; 8]) };
        let segment = Segment { timeline: Timeline(3), number: 9 };
        let place = TailPlace { wal, segment, size: SegmentSize::DEFAULT };
        Arc::new(SpooledPiece { place, from, to: from + 10, sealed: Bytes::from(vec![from as u8; 50]) })
    }

    #[tokio::test]
    async fn a_file_that_does_not_read_keeps_no_other_and_hides_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        let repository = repository(&folder.path().join("repository")).await;
        let owner = Owner { cluster: "orders".parse().unwrap(), member: "db1".into() };
        let root = folder.path().join("spool");
        let spools = Spools::open(root.clone(), 1 << 30).unwrap();
        for from in [0, 10] {
            let mut log = SpoolLog::begin(&spools, &owner, &repository).unwrap();
            log.append(&[(1, piece(from)), (2, piece(from + 20))]).unwrap();
        }
        drop(spools);
        let files = root.join("orders/from-db1");
        let mut paths: Vec<_> = fs::read_dir(&files).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "pieces"));
        paths.sort();
        let mut torn = fs::read(&paths[0]).unwrap();
        torn[20] ^= 1;
        fs::write(&paths[0], torn).unwrap();
        // Reading it is an error of the file system's, whoever asks.
        let unreadable = files.join("0-0.pieces");
        fs::create_dir(&unreadable).unwrap();
        paths.push(unreadable.clone());

        let spools = Spools::open(root, 1 << 30).unwrap();
        let settled = settle(&spools, &owner, paths).await.unwrap();
        assert_eq!((settled.stored, settled.damaged.len()), (3, 1), "all but the damaged one");
        assert!(matches!(settled.unsettled, Some(LeftError::Spool(_))), "{:?}", settled.unsettled);
        let left: Vec<_> = spools.left_for(Duration::ZERO).into_values().flatten().collect();
        assert_eq!(left, [unreadable]);
    }
}
