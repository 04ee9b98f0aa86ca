//! How far the repository trails the server that writes. Only what is stored of that server's own timeline counts: another one
//! may reach far beyond it, after a failover the dead primary's, after a restore in place what was there before.

use jiff::{SignedDuration, Timestamp};

use super::super::clusters::{ClusterSeen, MemberSeen};
use super::super::observed::{ArchiveObserved, InstanceRole, StreamObserved, StreamPhase};
use super::super::recovery::RecoveryRange;
use super::{seconds, windows};
use crate::resources::Span;

/// The server that writes, or, without one, the standby that is furthest. A member that is silent for long has gone on since.
pub fn leader<'c, 's>(now: Timestamp, cluster: &'c ClusterSeen<'s>, stale_after: Span) -> Option<&'c MemberSeen<'s>> {
    let is_fresh = |member: &&MemberSeen<'_>| now.duration_since(member.received_at) <= seconds(stale_after);
    cluster
        .members
        .iter()
        .filter(|member| member.instance.role != InstanceRole::Down && member.instance.current_lsn.is_some())
        .filter(is_fresh)
        .max_by_key(|member| {
            let writes = member.instance.role == InstanceRole::Primary;
            (writes, member.instance.timeline, member.instance.current_lsn)
        })
}

/// Nothing, if all of its WAL is durable, or all but what an idle server writes by itself. Otherwise the age of the newest commit that the repository holds, or of the moment
/// up to which a stream has brought everything, by the server's own clock: a commit after that may exist and is not there.
/// Where segments are archived, none waits and the newest one came after that commit, its arrival serves: it held everything up
/// to then. Of a stream an arrival says nothing: a backlog arrives part by part, and no segment is ever seen to wait. `None`:
/// nothing of its timeline is known to be stored.
pub(super) fn lag(cluster: &ClusterSeen<'_>, leader: &MemberSeen<'_>) -> Option<SignedDuration> {
    let history = History::of(leader);
    let ranges: Vec<&RecoveryRange> = windows(cluster)
        .into_iter()
        .flat_map(|window| &window.ranges)
        .filter(|range| history.has_range(range))
        .collect();
    let archives: Vec<&ArchiveObserved> = cluster
        .members
        .iter()
        .filter_map(|member| member.instance.archive.as_ref())
        .filter(|archive| history.has_archived(archive))
        .collect();
    let stored = ranges.iter().map(|range| range.to_lsn);
    let durable = stored.chain(archives.iter().filter_map(|archive| archive.durable_lsn)).max();
    let quiet_from = leader.instance.archive.as_ref().and_then(|archive| archive.quiet_from);
    if quiet_from.or(leader.instance.current_lsn) <= durable {
        return Some(SignedDuration::ZERO);
    }
    let streamed = archives.iter().filter_map(|archive| archive.stream.as_ref()?.complete_until).max();
    let newest_commit = ranges.iter().filter_map(|range| range.to).max();
    let own = leader.instance.archive.as_ref().filter(|archive| history.has_archived(archive));
    let arrival = own.filter(|archive| none_waits(archive)).and_then(|archive| archive.durable_at);
    let known = newest_commit.max(streamed).max(arrival)?;
    Some(leader.facts_at.duration_since(known).max(SignedDuration::ZERO))
}

/// Whether all segments that the server has finished are archived. Without archive_command nobody says that one is.
fn none_waits(archive: &ArchiveObserved) -> bool {
    let streams = |stream: &StreamObserved| matches!(stream.phase, StreamPhase::Streaming | StreamPhase::Following);
    archive.archive_command_set && archive.ready_segments == 0 && !archive.stream.as_ref().is_some_and(streams)
}

/// What a server has written, as far as it tells stored WAL of its own from another's.
struct History<'s> {
    leader: &'s MemberSeen<'s>,
    /// Of its timeline, and beyond its end. Its agent looks at the repository before it looks at the server, so a primary did
    /// not write this: it was rolled back, or another system had the timeline.
    beyond: Vec<&'s RecoveryRange>,
}

impl<'s> History<'s> {
    fn of(leader: &'s MemberSeen<'s>) -> History<'s> {
        let instance = leader.instance;
        let writes = instance.role == InstanceRole::Primary;
        let is_beyond =
            |range: &&RecoveryRange| range.timeline == instance.timeline && Some(range.to_lsn) > instance.current_lsn;
        let ranges = instance.windows.iter().flat_map(|window| &window.ranges);
        History { leader, beyond: ranges.filter(is_beyond).filter(|_| writes).collect() }
    }

    fn has_range(&self, range: &RecoveryRange) -> bool {
        let same = |beyond: &&RecoveryRange| (&beyond.branch, beyond.from_lsn) == (&range.branch, range.from_lsn);
        range.timeline == self.leader.instance.timeline && !self.beyond.iter().any(same)
    }

    /// Whether what a member has shipped is its. An agent of an earlier release does not say of which timeline that was.
    fn has_archived(&self, archive: &ArchiveObserved) -> bool {
        let is_of_timeline = archive.durable_timeline.is_none_or(|of| of == self.leader.instance.timeline);
        // Others may have seen more than it since; where something is beyond it, that is what they have seen.
        is_of_timeline && (self.beyond.is_empty() || archive.durable_lsn <= self.leader.instance.current_lsn)
    }
}
