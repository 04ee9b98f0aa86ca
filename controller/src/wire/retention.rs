//! Plans of what is kept, and holds.

use jiff::Timestamp;
use walfleet_proto::operator::v1 as pb;
use walfleet_repository::collect::Waiting;
use walfleet_repository::format::log_entry::{Hold, HoldSubject};
use walfleet_repository::retention::{Decided, Decision, Trimmed, Why};

use super::time_out;
use crate::keeper::retention::Planned;
use tonic::Status;

pub fn plan_out(
    (cluster, repository): (&str, &str),
    at: Timestamp,
    planned: &Planned,
    digest: String,
) -> pb::RetentionPlan {
    let plan = &planned.plan;
    pb::RetentionPlan {
        cluster: cluster.to_owned(),
        repository: repository.to_owned(),
        at_us: at.as_microsecond(),
        edge_us: plan.edge.as_microsecond(),
        backups: plan.backups.iter().map(backup_out).collect(),
        wal: plan.trims.iter().map(trim_out).collect(),
        refused: plan.refused.iter().map(ToString::to_string).collect(),
        acts_from_us: time_out(planned.acts_from),
        digest,
        can_be_released: planned.can_be_released(),
    }
}

fn backup_out(decided: &Decided) -> pb::BackupRetention {
    use pb::RetentionDecision as Wire;
    let texts = |whys: &[Why]| whys.iter().map(Why::to_string).collect();
    let (decision, reasons, until) = match &decided.decision {
        Decision::Keep(whys) => (Wire::Keep, texts(whys), None),
        Decision::BringBack(whys) => (Wire::BringBack, texts(whys), None),
        Decision::Expire => (Wire::Expire, Vec::new(), None),
        Decision::Wait { until } => (Wire::Wait, Vec::new(), Some(*until)),
        Decision::Purge => (Wire::Purge, Vec::new(), None),
    };
    pb::BackupRetention {
        backup: decided.backup.to_string(),
        seen_at_us: decided.seen_at.as_microsecond(),
        is_restorable: decided.is_restorable,
        decision: decision.into(),
        reasons,
        until_us: time_out(until),
    }
}

fn trim_out(trim: &Trimmed) -> pb::WalRetention {
    pb::WalRetention {
        system_identifier: trim.wal.system_id.0,
        timeline: trim.wal.timeline.0,
        branch: trim.wal.branch.to_string(),
        below_lsn: trim.below.to_string(),
        segments: trim.segments as u64,
    }
}

pub fn hold_out(cluster: &str, repository: &str, hold: &Hold) -> pb::HoldView {
    let (is_stretch, from_us, to_us) = match &hold.subject {
        HoldSubject::Stretch(stretch) => (true, stretch.from_us, stretch.to_us.unwrap_or(0)),
        HoldSubject::Backup(_) | HoldSubject::Wal { .. } => (false, 0, 0),
    };
    let wal = match &hold.subject {
        HoldSubject::Wal { branch, start, end } => format!("timeline {}, {start} to {end}", branch.timeline),
        HoldSubject::Backup(_) | HoldSubject::Stretch(_) => String::new(),
    };
    pb::HoldView {
        hold: hold.hold.to_string(),
        cluster: cluster.to_owned(),
        repository: repository.to_owned(),
        backup: hold.backup().map_or_else(String::new, ToString::to_string),
        from_us,
        to_us,
        reason: hold.reason.clone(),
        owner: hold.owner.clone(),
        until_us: hold.until_us.unwrap_or(0),
        wal,
        is_stretch,
    }
}

pub fn garbage_out(cluster: &str, found: Result<Option<Waiting>, Status>) -> pb::ClusterGarbage {
    let cluster = cluster.to_owned();
    match found {
        Ok(None) => pb::ClusterGarbage { cluster, ..pb::ClusterGarbage::default() },
        Ok(Some(Waiting { until, objects, bytes })) => pb::ClusterGarbage {
            cluster,
            objects,
            bytes,
            removable_at_us: until.as_microsecond(),
            problem: String::new(),
        },
        Err(status) => {
            pb::ClusterGarbage { cluster, problem: status.message().to_owned(), ..pb::ClusterGarbage::default() }
        }
    }
}
