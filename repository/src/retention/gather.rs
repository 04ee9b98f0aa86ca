//! What a plan rests on, read from a repository without any data key.
//!
//! Where a timeline comes from stands beside its sealed history, in clear. Where that is not there or does not read, the catalog is
//! doubtful, and nothing is removed; the agents store it again when they are started.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{Candidate, Given, Promise};
use crate::cluster_log::{ClusterLog, ClusterState, LogError, SessionState};
use crate::format::log_entry::{Hold, Open};
use crate::format::sealed::SMALLEST;
use crate::format::wal_history::{Divergence, StoredHistory};
use crate::format::wal_tail::longest_chain;
use crate::ids::BackupId;
use crate::layout::{self, TailName, WalObject};
use crate::open::{Repository, RepositoryError};
use crate::postgres::{Lsn, Segment, SegmentSize, SystemId, TimelineHistory, WalBranch};
use crate::recovery_window::{BackupFacts, BranchWal, SegmentFacts, WalCatalog};
use crate::store::{Listed, StoreError};
use crate::wal_archive::Strays;

/// One cluster, as of a prefix of its log.
#[derive(Clone, Debug)]
pub struct Gathered {
    /// The prefix: so many entries. What is decided on this counts only behind it.
    pub sequence: u64,
    pub candidates: Vec<Candidate>,
    pub catalog: WalCatalog,
    pub last_stored: BTreeMap<WalBranch, Timestamp>,
    pub trimmed: BTreeMap<WalBranch, Lsn>,
    pub holds: Vec<Hold>,
    pub open: Vec<Open>,
}

/// What is known of backups beside the repository's log.
#[derive(Clone, Default, Debug)]
pub struct Known {
    /// Restored and examined.
    pub proven: BTreeSet<BackupId>,
    /// Found not to read, or to be other than they should.
    pub doubtful: BTreeSet<BackupId>,
}

#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("read what is to be kept: {0}")]
    Store(#[from] StoreError),
    #[error("backup {backup}: {source}")]
    Reference { backup: BackupId, source: Box<RepositoryError> },
    #[error("log entry {sequence} is not where it was a moment ago\nHINT: the next round looks again.")]
    Unlisted { sequence: u64 },
}

impl Gathered {
    pub async fn read(repository: &Repository, log: &mut ClusterLog, known: &Known) -> Result<Gathered, GatherError> {
        log.refresh().await?;
        let stored_at = entries_stored_at(repository, log).await?;
        let backups = repository.backups(log).await;
        if let Some((backup, source)) = backups.unreadable.into_iter().next() {
            return Err(GatherError::Reference { backup, source: Box::new(source) });
        }
        let state = log.state();
        let mut sizes: BTreeMap<SystemId, SegmentSize> = BTreeMap::new();
        let mut candidates = Vec::new();
        for backup in backups.readable {
            let part = &backup.reference;
            sizes.insert(part.wal.system_id, part.segment_size);
            let seen = |sequence| stored_at.get(&sequence).copied().ok_or(GatherError::Unlisted { sequence });
            let committed_at = seen(backup.commit.stamp.sequence)?;
            let before = backup.seen_before_us().and_then(|us| Timestamp::from_microsecond(us).ok());
            candidates.push(Candidate {
                facts: BackupFacts::from(part),
                seen_at: before.map_or(committed_at, |before| before.min(committed_at)),
                expired_at: expired_by(state, &part.backup).map(seen).transpose()?,
                is_proven: known.proven.contains(&part.backup),
                is_doubtful: known.doubtful.contains(&part.backup),
            });
        }
        let mut gathered = Gathered {
            sequence: state.next(),
            candidates,
            catalog: WalCatalog::default(),
            last_stored: BTreeMap::new(),
            trimmed: state.trims().clone(),
            holds: state.holds().cloned().collect(),
            open: state.open_sessions().map(|session| session.open.clone()).collect(),
        };
        for (system_id, size) in sizes {
            let store = repository.store();
            let listed = store.list(&layout::wal_system(log.cluster(), system_id)).await?;
            let pieces = store.list(&layout::system_tails(log.cluster(), system_id)).await?;
            let with_history = gathered.take_in(log, listed, size);
            gathered.take_in_pieces(log, pieces, size);
            for wal in with_history {
                gathered.note_origin(repository, log, wal).await?;
            }
        }
        gathered.leave_out_strays();
        Ok(gathered)
    }

    /// Returns the branches that have a history.
    fn take_in(&mut self, log: &ClusterLog, listed: Vec<Listed>, size: SegmentSize) -> Vec<WalBranch> {
        let mut with_history = Vec::new();
        let mut segments: BTreeMap<WalBranch, Vec<Segment>> = BTreeMap::new();
        for object in listed {
            let Some((wal, found)) = layout::parse_wal_object(log.cluster(), &object.key, size) else { continue };
            let numbers = segments.entry(wal).or_default();
            match found {
                WalObject::Segment(_) if object.size < SMALLEST => {
                    self.catalog.damaged.push(format!("{} is too small to be a segment", object.key));
                }
                WalObject::Segment(segment) => numbers.push(segment),
                WalObject::History => with_history.push(wal),
            }
            self.note_stored(wal, &object);
        }
        for (wal, numbers) in segments {
            self.catalog.branches.insert(wal, BranchWal::listed(size, numbers, None));
        }
        with_history
    }

    /// Segments of which there are pieces alone: how far those go that follow each other.
    fn take_in_pieces(&mut self, log: &ClusterLog, listed: Vec<Listed>, size: SegmentSize) {
        let mut pieces: BTreeMap<(WalBranch, u64), Vec<TailName>> = BTreeMap::new();
        for object in listed {
            let Some((wal, segment, name)) = layout::parse_piece(log.cluster(), &object.key, size) else { continue };
            pieces.entry((wal, segment.number)).or_default().push(name);
            self.note_stored(wal, &object);
        }
        for ((wal, number), names) in pieces {
            let branch = self.catalog.branches.entry(wal).or_insert_with(|| BranchWal::listed(size, [], None));
            let Some(end) = longest_chain(&names).last().map(|last| last.to) else { continue };
            let end_lsn = Segment { timeline: wal.timeline, number }.start(size).checked_add(end.into());
            let begun = SegmentFacts {
                records_end: end_lsn,
                is_begun: end < size.bytes(),
                pieces_end: end_lsn,
                ..SegmentFacts::default()
            };
            branch.segments.entry(number).or_insert(begun);
        }
    }

    fn note_stored(&mut self, wal: WalBranch, object: &Listed) {
        let at = Timestamp::from_microsecond(object.last_modified_us).unwrap_or(Timestamp::MAX);
        let newest = self.last_stored.entry(wal).or_insert(at);
        *newest = at.max(*newest);
    }

    /// Without it less would be kept than is needed: the ways through the branch would not be known.
    async fn note_origin(
        &mut self,
        repository: &Repository,
        log: &ClusterLog,
        wal: WalBranch,
    ) -> Result<(), GatherError> {
        let object = match repository.store().get(&layout::wal_origin(log.cluster(), &wal)).await {
            Ok(object) => object,
            Err(error) if error.is_not_found() => {
                self.catalog.damaged.push(format!("{} is missing", layout::wal_origin(log.cluster(), &wal)));
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let Some(branch) = self.catalog.branches.get_mut(&wal) else { return Ok(()) };
        match StoredHistory::open_clear(&object, wal) {
            Ok(origin) => {
                branch.history = TimelineHistory::parse(wal.timeline, &origin.content).ok();
                (branch.parent, branch.divergence) = (origin.parent, origin.divergence);
            }
            Err(error) => {
                self.catalog.damaged.push(format!("{}: {error}", layout::wal_origin(log.cluster(), &wal)));
            }
        }
        Ok(())
    }

    /// What a diverged member had stored in another's branch before it knew is not that branch's.
    fn leave_out_strays(&mut self) {
        let found = self.catalog.branches.iter().filter_map(|(wal, branch)| Some((*wal, branch.divergence.clone()?)));
        let divergences: Vec<(WalBranch, Divergence)> = found.collect();
        for (wal, branch) in &mut self.catalog.branches {
            let same = |left: &WalBranch| (left.system_id, left.timeline) == (wal.system_id, wal.timeline);
            let of_timeline = divergences.iter().filter(|(left, _)| same(left)).map(|(_, divergence)| divergence);
            let (strays, size, timeline) = (Strays::of(*wal, of_timeline), branch.segment_size, wal.timeline);
            branch.segments.retain(|number, _| !strays.holds(Segment { timeline, number: *number }, size));
        }
    }

    pub fn given<'a>(&'a self, now: Timestamp, promise: &'a Promise, doubts: &'a [String]) -> Given<'a> {
        Given {
            now,
            promise,
            candidates: &self.candidates,
            catalog: &self.catalog,
            last_stored: &self.last_stored,
            trimmed: &self.trimmed,
            holds: &self.holds,
            open: &self.open,
            doubts,
        }
    }
}

/// When each entry came into the log, by the store's clock: writers' claims decide nothing.
async fn entries_stored_at(repository: &Repository, log: &ClusterLog) -> Result<BTreeMap<u64, Timestamp>, GatherError> {
    let listed = repository.store().list(&layout::log(log.cluster())).await?;
    let entry = |object: &Listed| {
        let at = Timestamp::from_microsecond(object.last_modified_us).ok()?;
        Some((layout::parse_log_entry(log.cluster(), &object.key)?, at))
    };
    Ok(listed.iter().filter_map(entry).collect())
}

/// The entry by which a backup came into the trash.
fn expired_by(state: &ClusterState, backup: &BackupId) -> Option<u64> {
    match &state.session(backup)?.state {
        SessionState::Expired(_, expiry) => Some(expiry.stamp.sequence),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use jiff::SignedDuration;

    use super::super::{Decision, plan};
    use super::*;
    use crate::cluster_log::Author;
    use crate::format::log_entry::Action;
    use crate::format::reference::tests::sample;
    use crate::ids::{ClusterName, Digest, DomainId, RecipientId};
    use crate::open::RepositorySpec;
    use crate::retention::Calendar;
    use crate::signature::Signer;
    use crate::store::Store;

    fn orders() -> ClusterName {
        "orders".parse().unwrap()
    }

    fn root() -> Signer {
        Signer::from_seed(&[1; 32])
    }

    async fn append(repository: &Repository, action: Action) {
        let mut left = Some(action);
        let mut log = repository.cluster_log(&orders());
        log.append_unless_done(Author::host(&root()), |_| left.take()).await.unwrap();
    }

    /// Consistent in one segment, which is there.
    async fn back_up(repository: &Repository, name: &str, segment: u64, claims_us: i64) {
        let mut part = sample("orders", name);
        (part.start_lsn, part.stop_lsn) = (Lsn(segment << 24), Lsn((segment << 24) + 9));
        (part.stopped_at_us, part.sessions) = (claims_us, Vec::new());
        let (store, wal, size) = (repository.store(), part.wal, part.segment_size);
        let segment = Segment { timeline: wal.timeline, number: segment };
        let key = layout::wal_segment(&orders(), &wal, segment, size);
        store.put_new(&key, Bytes::from(vec![7; SMALLEST as usize])).await.unwrap();
        let open = Open { session: part.backup.clone(), parents: vec![], run: None, wal, wal_floor: part.start_lsn };
        append(repository, Action::Open(open)).await;
        let object = part.seal(&root(), repository.id());
        let reference_digest = Digest(*blake3::hash(&object).as_bytes());
        store.put_new(&layout::reference(&orders(), &part.backup), object).await.unwrap();
        let session = part.backup;
        append(repository, Action::Commit { session, manifest_digest: Digest([1; 32]), reference_digest }).await;
    }

    #[tokio::test]
    async fn a_plan_is_made_from_a_repository_alone_and_by_the_stores_clock() {
        let spec = RepositorySpec { root_public_key: root().public_key(), recovery_recipient: RecipientId([1; 32]) };
        let (repository, _) = Repository::init(Store::in_memory(), spec).await.unwrap();
        append(&repository, Action::Begin { domain: DomainId([1; 16]), key_commitment: [0; 32] }).await;
        // The second host's clock is far behind, the third's far ahead.
        let now = Timestamp::now();
        for (segment, (name, claims)) in (1..).zip([("bk_1", 0), ("bk_2", -9_000), ("bk_3", 9_000)]) {
            let claims = now + SignedDuration::from_hours(claims);
            back_up(&repository, name, segment, claims.as_microsecond()).await;
        }
        append(&repository, Action::Expire { backup: "bk_1".parse().unwrap(), reason: "test".into() }).await;
        let mut log = repository.cluster_log(&orders());
        let known = Known { doubtful: ["bk_3".parse().unwrap()].into(), ..Known::default() };
        let gathered = Gathered::read(&repository, &mut log, &known).await.unwrap();
        assert_eq!(gathered.sequence, 8);
        let recent = |at: Timestamp| at.duration_since(now).abs() < SignedDuration::from_mins(5);
        assert!(gathered.candidates.iter().all(|candidate| recent(candidate.seen_at)));
        assert!(gathered.candidates[0].expired_at.is_some_and(recent));
        assert!(gathered.last_stored.values().copied().all(recent) && gathered.last_stored.len() == 1);
        let promise = Promise {
            window: SignedDuration::from_hours(1),
            calendar: Calendar::none(),
            minimum: 1,
            trash: SignedDuration::from_hours(24),
        };
        let later = now + SignedDuration::from_hours(30);
        let planned = plan(&gathered.given(later, &promise, &[]));
        let decisions: Vec<&Decision> = planned.backups.iter().map(|decided| &decided.decision).collect();
        assert!(planned.backups.iter().all(|decided| decided.is_restorable));
        assert!(matches!(decisions[..], [Decision::Purge, Decision::Keep(_), Decision::Expire]), "{decisions:?}");
        assert_eq!(planned.refused, []);
        let doubts = ["the store's clock differs".to_owned()];
        assert_eq!(plan(&gathered.given(later, &promise, &doubts)).refused.len(), 1);
    }
}
