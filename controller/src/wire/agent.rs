//! `walfleet.agent.v1`: what agents say, inward; what they are told, outward.

use jiff::Timestamp;
use walfleet_proto::agent::v1 as pb;
use walfleet_repository::ids::{JobId, RecipientId};

use super::{WireError, bounded, job, lsn_in, lsn_out, recovery, required_time_in, time_in, time_out};
use crate::fleet::link::ToAgent;
use crate::fleet::observed::{
    ArchiveObserved, InstanceObserved, InstanceRole, SpoolObserved, StreamObserved, StreamPhase, TablespaceObserved,
};
use crate::fleet::{Expected, FactsObserved, HelloObserved, Progress};
use crate::jobs::{FencingToken, Job, Outcome};
use crate::resources::selector::{is_label_key, is_label_value};

/// Of this protocol.
pub const PROTOCOL_VERSION: u32 = 1;

/// What an agent's journal, or its heartbeat, says of one attempt.
#[derive(Clone, PartialEq, Debug)]
pub struct JournalEntry {
    pub job: JobId,
    pub token: FencingToken,
    /// Set once it is over.
    pub outcome: Option<Outcome>,
}

/// A message of an agent, after Hello.
#[derive(Clone, PartialEq, Debug)]
pub enum FromAgent {
    Heartbeat { at_us: i64, running: Vec<(JobId, FencingToken)> },
    Facts(FactsObserved),
    Answer { job: JobId, token: FencingToken, answer: Answer },
    Progress { job: JobId, progress: Progress },
    Outcome { job: JobId, token: FencingToken, outcome: Box<Outcome> },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Accepted,
    Declined { reason: String, busy: bool },
}

/// More than any host has; a bound for the state.
const MAX_INSTANCES: usize = 64;
const MAX_BACKUPS: usize = 1_000;
const MAX_RANGES: usize = 200;
const MAX_PROBLEMS: usize = 20;
const MAX_JOURNAL: usize = 1_000;

pub fn hello_in(hello: pb::Hello) -> Result<(HelloObserved, Vec<JournalEntry>), WireError> {
    let recipient = RecipientId::from_slice(&hello.recipient).map_err(|error| WireError::new("recipient", error))?;
    for (key, value) in &hello.labels {
        if !is_label_key(key) || !is_label_value(value) {
            return Err(WireError::new("labels", format!("{key}={value} is not a label")));
        }
    }
    if hello.incarnation.is_empty() {
        return Err(WireError::new("incarnation", "it is empty"));
    }
    let journal = hello
        .journal
        .into_iter()
        .take(MAX_JOURNAL)
        .map(journal_in)
        .collect::<Result<_, _>>()
        .map_err(|error| error.within("journal"))?;
    let observed = HelloObserved {
        version: bounded(hello.agent_version),
        incarnation: bounded(hello.incarnation),
        hostname: bounded(hello.hostname),
        labels: hello.labels.into_iter().collect(),
        recipient,
        capabilities: hello.capabilities.into_iter().take(64).map(bounded).collect(),
        spool_address: Some(bounded(hello.spool_address)).filter(|address| !address.is_empty()),
    };
    Ok((observed, journal))
}

fn journal_in(entry: pb::JournalEntry) -> Result<JournalEntry, WireError> {
    Ok(JournalEntry {
        job: job_id(&entry.job)?,
        token: FencingToken(entry.fencing_token),
        outcome: entry.outcome.map(job::outcome_in),
    })
}

fn job_id(text: &str) -> Result<JobId, WireError> {
    text.parse().map_err(|error| WireError::new("job", error))
}

pub fn message_in(message: pb::AgentMessage, now: Timestamp) -> Result<FromAgent, WireError> {
    use pb::agent_message::Message;
    match message.message {
        None => Err(WireError::new("message", "it is empty")),
        Some(Message::Hello(_)) => Err(WireError::new("message", "hello is said once")),
        Some(Message::Heartbeat(beat)) => {
            let running = beat.running.iter().take(MAX_JOURNAL);
            let running = running
                .map(|entry| Ok((job_id(&entry.job)?, FencingToken(entry.fencing_token))))
                .collect::<Result<_, _>>()?;
            Ok(FromAgent::Heartbeat { at_us: beat.at_us, running })
        }
        Some(Message::Facts(facts)) => facts_in(facts, now).map(FromAgent::Facts),
        Some(Message::JobAnswer(answer)) => Ok(FromAgent::Answer {
            job: job_id(&answer.job)?,
            token: FencingToken(answer.fencing_token),
            answer: if answer.accepted {
                Answer::Accepted
            } else {
                Answer::Declined { reason: bounded(answer.reason), busy: answer.busy }
            },
        }),
        Some(Message::Progress(progress)) => Ok(FromAgent::Progress {
            job: job_id(&progress.job)?,
            progress: Progress {
                attempt: progress.attempt,
                token: FencingToken(progress.fencing_token),
                phase: bounded(progress.phase),
                done_bytes: progress.done_bytes,
                total_bytes: progress.total_bytes,
                at: now,
                spared_bytes: progress.spared_bytes,
                bytes_per_second: progress.bytes_per_second,
                left_seconds: progress.left_seconds,
                still_seconds: progress.still_seconds,
                store_requests: progress.store_requests,
                expected: progress
                    .expected
                    .filter(|expected| expected.seconds.is_finite())
                    .map(|expected| Expected { seconds: expected.seconds, basis: bounded(expected.basis) }),
            },
        }),
        Some(Message::Outcome(outcome)) => Ok(FromAgent::Outcome {
            job: job_id(&outcome.job)?,
            token: FencingToken(outcome.fencing_token),
            outcome: Box::new(job::outcome_in(outcome)),
        }),
    }
}

fn facts_in(facts: pb::Facts, now: Timestamp) -> Result<FactsObserved, WireError> {
    if facts.instances.len() > MAX_INSTANCES {
        return Err(WireError::new("facts.instances", format!("there are more than {MAX_INSTANCES}")));
    }
    Ok(FactsObserved {
        at: required_time_in("facts.at_us", facts.at_us)?,
        received_at: now,
        instances: facts
            .instances
            .into_iter()
            .map(|instance| instance_in(instance).map_err(|error| error.within("facts.instances")))
            .collect::<Result<_, _>>()?,
    })
}

fn instance_in(instance: pb::InstanceFacts) -> Result<InstanceObserved, WireError> {
    let role = match instance.role() {
        pb::InstanceRole::Primary => InstanceRole::Primary,
        pb::InstanceRole::Standby => InstanceRole::Standby,
        pb::InstanceRole::Down => InstanceRole::Down,
        pb::InstanceRole::Unspecified => return Err(WireError::new("role", "it is not given")),
    };
    let newest = |len: usize, limit: usize| len.saturating_sub(limit);
    // Ids sort by time: the newest stay, in whatever order they came.
    let mut backups = instance.backups.into_iter().map(recovery::backup_in).collect::<Result<Vec<_>, _>>()?;
    backups.sort_by(|a, b| a.id.cmp(&b.id));
    backups.drain(..newest(backups.len(), MAX_BACKUPS));
    let mut windows = instance.windows.into_iter().take(16).map(recovery::window_in).collect::<Result<Vec<_>, _>>()?;
    for window in &mut windows {
        window.ranges.sort_by_key(|range| (range.timeline, range.from_lsn));
        window.ranges.drain(..newest(window.ranges.len(), MAX_RANGES));
        window.gaps.drain(..newest(window.gaps.len(), MAX_RANGES));
    }
    Ok(InstanceObserved {
        cluster: bounded(instance.cluster),
        system_identifier: instance.system_identifier,
        server_version_num: instance.server_version_num,
        role,
        data_dir: bounded(instance.data_dir),
        port: instance.port,
        timeline: instance.timeline,
        current_lsn: lsn_in("current_lsn", &instance.current_lsn)?,
        cluster_bytes: instance.cluster_bytes,
        data_checksums: instance.data_checksums,
        archive: instance.archive.map(archive_in).transpose()?,
        windows,
        backups,
        problems: instance.problems.into_iter().take(MAX_PROBLEMS).map(bounded).collect(),
        tablespaces: instance
            .tablespaces
            .into_iter()
            .take(1_000)
            .map(|space| {
                (space.oid, TablespaceObserved { name: bounded(space.name), location: bounded(space.location) })
            })
            .collect(),
    })
}

fn stream_in(stream: pb::StreamFacts) -> Result<StreamObserved, WireError> {
    Ok(StreamObserved {
        phase: StreamPhase::read(&stream.phase),
        problem: bounded(stream.problem),
        store_error: bounded(stream.store_error),
        received_lsn: lsn_in("archive.stream.received_lsn", &stream.received_lsn)?,
        complete_until: time_in("archive.stream.complete_until_us", stream.complete_until_us)?,
        pieces: stream.pieces,
        segments: stream.segments,
        piece_interval_ms: stream.piece_interval_ms,
        synchronous: bounded(stream.synchronous),
        spool: stream.spool.map(spool_in).transpose()?,
    })
}

fn spool_in(spool: pb::SpoolFacts) -> Result<SpoolObserved, WireError> {
    Ok(SpoolObserved {
        peer: bounded(spool.peer),
        waits_for: bounded(spool.waits_for),
        problem: bounded(spool.problem),
        written_lsn: lsn_in("archive.stream.spool.written_lsn", &spool.written_lsn)?,
        held_bytes: spool.held_bytes,
    })
}

fn spool_out(spool: &SpoolObserved) -> pb::SpoolFacts {
    pb::SpoolFacts {
        peer: spool.peer.clone(),
        waits_for: spool.waits_for.clone(),
        problem: spool.problem.clone(),
        written_lsn: lsn_out(spool.written_lsn),
        held_bytes: spool.held_bytes,
    }
}

fn stream_out(stream: &StreamObserved) -> pb::StreamFacts {
    pb::StreamFacts {
        phase: stream.phase.as_str().to_owned(),
        problem: stream.problem.clone(),
        store_error: stream.store_error.clone(),
        received_lsn: lsn_out(stream.received_lsn),
        complete_until_us: time_out(stream.complete_until),
        pieces: stream.pieces,
        segments: stream.segments,
        piece_interval_ms: stream.piece_interval_ms,
        synchronous: stream.synchronous.clone(),
        spool: stream.spool.as_ref().map(spool_out),
    }
}

fn archive_in(archive: pb::ArchiveFacts) -> Result<ArchiveObserved, WireError> {
    Ok(ArchiveObserved {
        last_segment: bounded(archive.last_segment),
        durable_lsn: lsn_in("archive.durable_lsn", &archive.durable_lsn)?,
        durable_timeline: Some(archive.durable_timeline).filter(|timeline| *timeline != 0),
        durable_at: time_in("archive.durable_at_us", archive.durable_at_us)?,
        quiet_from: lsn_in("archive.quiet_from_lsn", &archive.quiet_from_lsn)?,
        ready_segments: archive.ready_segments,
        failed_count: archive.failed_count,
        last_error: bounded(archive.last_error),
        pg_wal_bytes: archive.pg_wal_bytes,
        pg_wal_free_bytes: archive.pg_wal_free_bytes,
        archive_command_set: archive.archive_command_set,
        stream: archive.stream.map(stream_in).transpose()?,
        pg_wal_full_in_seconds: Some(archive.pg_wal_full_in_seconds).filter(|seconds| *seconds != 0),
        requests_last_hour: archive.requests_last_hour,
        stored_bytes_last_hour: archive.stored_bytes_last_hour,
    })
}

pub fn instance_out(instance: &InstanceObserved) -> pb::InstanceFacts {
    let role = match instance.role {
        InstanceRole::Primary => pb::InstanceRole::Primary,
        InstanceRole::Standby => pb::InstanceRole::Standby,
        InstanceRole::Down => pb::InstanceRole::Down,
    };
    pb::InstanceFacts {
        cluster: instance.cluster.clone(),
        system_identifier: instance.system_identifier,
        server_version_num: instance.server_version_num,
        role: role.into(),
        data_dir: instance.data_dir.clone(),
        port: instance.port,
        timeline: instance.timeline,
        current_lsn: lsn_out(instance.current_lsn),
        cluster_bytes: instance.cluster_bytes,
        data_checksums: instance.data_checksums,
        archive: instance.archive.as_ref().map(archive_out),
        windows: instance.windows.iter().map(recovery::window_out).collect(),
        backups: instance.backups.iter().map(recovery::backup_out).collect(),
        problems: instance.problems.clone(),
        tablespaces: instance
            .tablespaces
            .iter()
            .map(|(oid, space)| pb::Tablespace {
                oid: *oid,
                name: space.name.clone(),
                location: space.location.clone(),
            })
            .collect(),
    }
}

fn archive_out(archive: &ArchiveObserved) -> pb::ArchiveFacts {
    pb::ArchiveFacts {
        last_segment: archive.last_segment.clone(),
        durable_lsn: lsn_out(archive.durable_lsn),
        durable_timeline: archive.durable_timeline.unwrap_or_default(),
        quiet_from_lsn: lsn_out(archive.quiet_from),
        durable_at_us: time_out(archive.durable_at),
        ready_segments: archive.ready_segments,
        failed_count: archive.failed_count,
        last_error: archive.last_error.clone(),
        pg_wal_bytes: archive.pg_wal_bytes,
        pg_wal_free_bytes: archive.pg_wal_free_bytes,
        archive_command_set: archive.archive_command_set,
        stream: archive.stream.as_ref().map(stream_out),
        pg_wal_full_in_seconds: archive.pg_wal_full_in_seconds.unwrap_or_default(),
        requests_last_hour: archive.requests_last_hour,
        stored_bytes_last_hour: archive.stored_bytes_last_hour,
    }
}

/// `past`: for an offer, what jobs of its cluster took.
pub fn to_agent(message: ToAgent, past: &[Job]) -> pb::ControllerMessage {
    use pb::controller_message::Message;
    let message = match message {
        ToAgent::Offer(offered) => Message::Offer(job::offer_out(&offered, past)),
        ToAgent::Cancel { job, token } => {
            Message::Cancel(pb::CancelJob { job: job.to_string(), fencing_token: token.0 })
        }
        ToAgent::OutcomeReceived { job, token } => {
            Message::OutcomeReceived(pb::OutcomeReceived { job: job.to_string(), fencing_token: token.0 })
        }
        ToAgent::HeartbeatSeen { at_us } => Message::HeartbeatSeen(pb::HeartbeatSeen { at_us }),
    };
    pb::ControllerMessage { message: Some(message) }
}

/// The first answer on a stream.
pub struct Welcome {
    pub controller: String,
    pub heartbeat_seconds: u32,
    pub facts_interval_seconds: u32,
    pub leader_epoch: u64,
}

pub fn welcome_out(welcome: Welcome) -> pb::ControllerMessage {
    pb::ControllerMessage {
        message: Some(pb::controller_message::Message::Welcome(pb::Welcome {
            controller: welcome.controller,
            heartbeat_seconds: welcome.heartbeat_seconds,
            facts_interval_seconds: welcome.facts_interval_seconds,
            leader_epoch: welcome.leader_epoch,
        })),
    }
}
