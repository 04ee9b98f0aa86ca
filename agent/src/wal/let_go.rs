//! The server goes before the archive, where the policy says so: if WAL that cannot be stored fills `pg_wal` up to a limit,
//! the slot that keeps it is dropped.
//!
//! Not while the repository takes it: a backlog that is being worked off is no reason. And not where PostgreSQL keeps the WAL
//! for `archive_command` as well, since dropping the slot would free nothing; doctor says so.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use walfleet_repository::ids::ClusterName;
use walfleet_repository::postgres::Lsn;
use walfleet_repository::shipping::LetGoAt;

use crate::access::InstanceAccess;
use crate::access::instance::ReachError;
use crate::durable::DurableError;
use crate::identity::connect::chain;
use crate::postgres::server::{KeptWal, Server, ServerError};
use crate::wal::breaks::{self, Break};

const LOOK: Duration = Duration::from_secs(5);

/// Beyond the limit, nothing may be stored for this long: an agent that has just started begins to store within it. And for
/// as long as a segment takes on a slow line.
const PATIENCE: Duration = Duration::from_secs(20);
const SLOW_LINE: u64 = 4 << 20;

/// What a slot keeps that is well, with room: the open segment, some on their way. Less than that frees nothing.
const KEPT_AT_LEAST: u64 = 64 << 20;
const SEGMENTS_AT_LEAST: u64 = 4;

/// So much more is kept than there was at the least since the limit was reached, and for as long as [`PATIENCE`] it does not
/// become less: what is stored meanwhile is too little.
const MUCH_MORE: u64 = 256 << 20;

/// For the slot to be free once its connection is closed.
const DROP_WITHIN: Duration = Duration::from_secs(30);
const DROP_AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
pub enum LetGoError {
    #[error(transparent)]
    Reach(#[from] ReachError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Durable(#[from] DurableError),
}

/// Watches one instance's slot.
#[derive(Clone, Debug)]
pub struct Guard {
    pub cluster: ClusterName,
    pub instance: InstanceAccess,
    pub slot: String,
    pub limit: LetGoAt,
    pub state_dir: PathBuf,
}

/// The limit is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reached {
    from: Lsn,
    why: String,
}

/// What becomes of the WAL that a slot keeps.
#[derive(Clone, Copy, Default, Debug)]
pub struct Shipped {
    /// What this agent has stored in all.
    pub stored: u64,
    /// On a standby whose WAL others store: what the archive lacked when that was looked at last. The slot is moved on at such a
    /// look alone, so that between two it keeps much that has long been stored.
    pub lacking: Option<u64>,
}

/// A slot beyond the limit.
#[derive(Clone, Copy, Debug)]
struct Beyond {
    at: Lsn,
    stored: u64,
    /// Neither moved.
    since: Instant,
    /// The least that was lacking.
    least: u64,
    /// Much more than that has been lacking all the time since: the least of it, and when that was seen.
    grown: Option<(u64, Instant)>,
}

impl Beyond {
    fn seen(before: Option<Beyond>, kept: &KeptWal, shipped: Shipped) -> Beyond {
        let now = Instant::now();
        let lacking = shipped.lacking.map_or(kept.bytes, |lacking| lacking.min(kept.bytes));
        let (at, stored) = (kept.from, shipped.stored);
        let Some(before) = before else { return Beyond { at, stored, since: now, least: lacking, grown: None } };
        let least = before.least.min(lacking);
        let much = MUCH_MORE.max(2 * SEGMENTS_AT_LEAST.saturating_mul(kept.segment_bytes));
        let grown = (lacking >= least.saturating_add(much)).then_some((lacking, now));
        Beyond {
            at,
            stored,
            since: if (before.at, before.stored) == (at, stored) { before.since } else { now },
            least,
            // What becomes less is being worked off.
            grown: grown.map(|fresh| before.grown.filter(|(bytes, _)| *bytes <= lacking).unwrap_or(fresh)),
        }
    }

    /// Nothing is stored, or so slowly that it comes to the same.
    fn is_hopeless(&self, kept: &KeptWal) -> bool {
        let patience = PATIENCE + Duration::from_secs(kept.segment_bytes / SLOW_LINE);
        let is_long = |since: Instant| since.elapsed() >= patience;
        is_long(self.since) || self.grown.is_some_and(|(_, since)| is_long(since))
    }
}

impl Guard {
    /// Returns once the limit is reached and what is kept is not stored; never if there is no limit.
    pub async fn watch(&self, shipped: impl Fn() -> Shipped) -> Reached {
        if self.limit == LetGoAt::Never {
            return std::future::pending().await;
        }
        let mut beyond: Option<Beyond> = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let look = tokio::time::timeout(2 * LOOK, self.look()).await;
            let Ok(Ok(Some((kept, why)))) = look else {
                // A server that does not answer writes no WAL that could be let go of.
                beyond = None;
                continue;
            };
            let seen = *beyond.insert(Beyond::seen(beyond, &kept, shipped()));
            if seen.is_hopeless(&kept) {
                return Reached { from: kept.from, why };
            }
        }
    }

    async fn look(&self) -> Result<Option<(KeptWal, String)>, LetGoError> {
        let Some(kept) = self.server().await?.kept_wal(&self.slot).await? else { return Ok(None) };
        let folder = self.instance.data_dir.join("pg_wal");
        let used = tokio::task::spawn_blocking(move || used_percent(&folder)).await.ok().flatten();
        Ok(is_beyond(self.limit, &kept, used).map(|why| (kept, why)))
    }

    async fn server(&self) -> Result<Server, LetGoError> {
        Ok(Server::connect(&self.instance.reach().await?).await?)
    }

    /// Notes the break, then drops the slot: after a crash between the two it is at worst noted for nothing. To be called
    /// when no connection of ours uses the slot any more.
    pub async fn let_go(&self, reached: &Reached) -> Result<(), LetGoError> {
        let found = Break { at: Timestamp::now(), why: reached.why.clone(), let_go_from: Some(reached.from) };
        breaks::begin(&self.state_dir, &self.cluster, &found)?;
        let server = self.server().await?;
        let begun = Instant::now();
        loop {
            match server.drop_slot(&self.slot).await {
                Ok(()) => break,
                Err(error) if begun.elapsed() >= DROP_WITHIN => return Err(error.into()),
                Err(error) => tracing::debug!("the slot cannot be dropped yet: {error}"),
            }
            tokio::time::sleep(DROP_AGAIN).await;
        }
        tracing::error!(cluster = %self.cluster, slot = self.slot, from = %reached.from,
            "WAL that the repository lacks is let go of, as the policy says: {}", reached.why);
        // PostgreSQL frees the space at its next checkpoint. That it may not be asked for is no harm.
        if let Err(error) = server.checkpoint().await {
            tracing::info!("the space is freed by the next checkpoint: {}", chain(&error));
        }
        Ok(())
    }
}

/// Why the limit is reached; `None`: it is not, or dropping the slot would free nothing.
fn is_beyond(limit: LetGoAt, kept: &KeptWal, used_percent: Option<u8>) -> Option<String> {
    let least = KEPT_AT_LEAST.max(SEGMENTS_AT_LEAST.saturating_mul(kept.segment_bytes));
    if kept.bytes < least || kept.is_archived {
        return None;
    }
    let mib = kept.bytes >> 20;
    match limit {
        LetGoAt::Never => None,
        LetGoAt::Used(percent) => used_percent.filter(|used| *used >= percent).map(|used| {
            format!("the file system of pg_wal was {used}% full and the slot kept {mib} MiB (let_go_at: {limit})")
        }),
        LetGoAt::Kept(bytes) => (kept.bytes >= bytes).then(|| format!("the slot kept {mib} MiB (let_go_at: {limit})")),
    }
}

/// As `df` has it: of what is used and what may still be used, rounded up.
fn used_percent(folder: &Path) -> Option<u8> {
    let space = rustix::fs::statvfs(folder).ok()?;
    let used = space.f_blocks.checked_sub(space.f_bfree)?;
    let all = used.checked_add(space.f_bavail).filter(|all| *all > 0)?;
    u8::try_from(used.checked_mul(100)?.div_ceil(all)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_that_is_worked_off_is_no_reason() {
        let kept = |from: u64, mib: u64| KeptWal {
            from: Lsn(from),
            bytes: mib << 20,
            segment_bytes: 1 << 20,
            is_archived: false,
        };
        let patience_ago = || Instant::now().checked_sub(PATIENCE).expect("the machine has run for longer");
        let shipped = |stored| Shipped { stored, lacking: None };
        let seen = |before, kept: &KeptWal, stored| Beyond::seen(before, kept, shipped(stored));
        let first = Beyond { since: patience_ago(), ..seen(None, &kept(1, 1000), 7) };
        assert!(first.is_hopeless(&kept(1, 1000)), "nothing is stored");
        let large = KeptWal { segment_bytes: 1 << 30, ..kept(1, 5000) };
        assert!(!first.is_hopeless(&large), "a segment takes minutes");
        let moved = seen(Some(first), &kept(2, 1100), 7);
        assert!(!moved.is_hopeless(&kept(2, 1100)));
        let ahead = seen(Some(Beyond { since: patience_ago(), ..moved }), &kept(2, 1100), 8);
        assert!(!ahead.is_hopeless(&kept(2, 1100)), "something behind the first is stored");

        // More comes than goes, and goes on to.
        let outgrown = kept(3, 1400);
        let burst = seen(Some(moved), &outgrown, 8);
        assert!(!burst.is_hopeless(&outgrown), "it may be over at once");
        let aged = |beyond: Beyond| Beyond { grown: beyond.grown.map(|(bytes, _)| (bytes, patience_ago())), ..beyond };
        assert!(seen(Some(aged(burst)), &kept(4, 1500), 9).is_hopeless(&kept(4, 1500)));
        let less = seen(Some(aged(burst)), &kept(4, 1390), 9);
        assert!(!less.is_hopeless(&kept(4, 1390)), "it is worked off");
        let recovered = seen(Some(aged(burst)), &kept(5, 300), 9);
        assert!(!seen(Some(recovered), &kept(6, 500), 10).is_hopeless(&kept(6, 500)));
    }

    /// A standby's slot is moved on every ten seconds: at 60 MB/s it keeps 600 MB by then, of which the archive lacks nothing.
    #[test]
    fn a_standby_whose_wal_the_archive_has_lets_go_of_nothing() {
        let kept = |look: u64| KeptWal {
            from: Lsn((look / 2 * 600) << 20),
            bytes: (64 + look % 2 * 300 + 300) << 20,
            segment_bytes: 16 << 20,
            is_archived: false,
        };
        let run = |lacking: &dyn Fn(u64) -> Option<u64>| {
            let mut beyond = Some(Beyond { least: 64 << 20, ..Beyond::seen(None, &kept(0), Shipped::default()) });
            (1..100).any(|look| {
                let shipped = Shipped { stored: 0, lacking: lacking(look) };
                let mut seen = Beyond::seen(beyond, &kept(look), shipped);
                let hopeless = seen.is_hopeless(&kept(look));
                // As if five seconds had passed.
                let earlier = |at: Instant| at.checked_sub(LOOK).expect("the machine has run for longer");
                seen.since = earlier(seen.since);
                seen.grown = seen.grown.map(|(bytes, at)| (bytes, earlier(at)));
                beyond = Some(seen);
                hopeless
            })
        };
        assert!(!run(&|_| Some(40 << 20)), "its primary's agent keeps up");
        assert!(run(&|look| Some((40 + look * 10) << 20)), "it does not");
        assert!(run(&|_| None), "nobody knows");
    }

    #[test]
    fn wal_is_let_go_of_at_the_limit_and_only_where_that_frees_something() {
        let kept = |mib: u64| KeptWal { from: Lsn(1), bytes: mib << 20, segment_bytes: 16 << 20, is_archived: false };
        let (share, size): (LetGoAt, LetGoAt) = ("90%".parse().unwrap(), "1GiB".parse().unwrap());
        for (limit, kept, used, expected) in [
            (share, kept(500), Some(89), false),
            (share, kept(500), Some(90), true),
            (share, kept(500), None, false),
            (share, kept(63), Some(99), false),
            (size, kept(1023), Some(99), false),
            (size, kept(1024), Some(10), true),
            (size, KeptWal { is_archived: true, ..kept(2048) }, Some(99), false),
            (share, KeptWal { segment_bytes: 1 << 30, ..kept(500) }, Some(95), false),
            (LetGoAt::Never, kept(1 << 20), Some(99), false),
        ] {
            assert_eq!(is_beyond(limit, &kept, used).is_some(), expected, "{limit} {kept:?} {used:?}");
        }
        assert!(used_percent(Path::new("/")).is_some_and(|used| used <= 100));
    }
}
