//! Job orders, inward.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use walfleet_proto::job::v1 as proto;
use walfleet_proto::recovery::v1 as recovery;
use walfleet_repository::postgres::{SystemId, Timeline};
use walfleet_repository::recovery_window::KnownComplete;

use super::{Reader, WireError};
use crate::jobs::order::{
    BackupOrder, BackupPlanOrder, Checkpoint, JobOrder, RecoveryTarget, RestoreOrder, TargetAction, TargetPoint,
    TargetTimeline, VerifyOrder, WalFindOrder, WorkOrder,
};
use crate::wal::find::select::Show;
use crate::wal::find::{FEW_LISTED, MOST_LISTED};

const ORDER: Reader = Reader { message: "job order" };
const BACKUP: Reader = Reader { message: "backup order" };
const RESTORE: Reader = Reader { message: "restore order" };
const VERIFY: Reader = Reader { message: "verify order" };
const BACKUP_PLAN: Reader = Reader { message: "backup plan order" };
const WAL_FIND: Reader = Reader { message: "WAL find order" };
const TARGET: Reader = Reader { message: "recovery target" };

/// Past jobs believed of one order: the contract's number.
const MOST_PAST: usize = 32;

pub(super) fn order(order: proto::JobOrder) -> Result<JobOrder, WireError> {
    let work = match order.work.ok_or(ORDER.missing("work"))? {
        proto::job_order::Work::Backup(backup) => WorkOrder::Backup(backup_order(backup)?),
        proto::job_order::Work::Restore(restore) => WorkOrder::Restore(restore_order(restore)?),
        proto::job_order::Work::Verify(verify) => WorkOrder::Verify(VerifyOrder {
            repository: VERIFY.text("repository", verify.repository)?,
            backup: VERIFY.parse_optional("backup", &verify.backup)?,
            deep: verify.deep,
        }),
        proto::job_order::Work::BackupPlan(plan) => WorkOrder::BackupPlan(BackupPlanOrder {
            repository: BACKUP_PLAN.text("repository", plan.repository)?,
            read_all: plan.read_all,
        }),
        proto::job_order::Work::WalFind(find) => WorkOrder::WalFind(wal_find_order(find)?),
    };
    if order.attempt == 0 {
        return Err(ORDER.value("attempt", 0, "attempts count from 1"));
    }
    Ok(JobOrder {
        job: ORDER.parse("job", &order.job)?,
        attempt: order.attempt,
        fencing_token: order.fencing_token,
        cluster: ORDER.parse("cluster", &order.cluster)?,
        traceparent: Some(order.traceparent).filter(|context| !context.is_empty()),
        past: order.past.into_iter().take(MOST_PAST).filter_map(super::past::past).collect(),
        work,
    })
}

fn backup_order(order: proto::BackupOrder) -> Result<BackupOrder, WireError> {
    if !(0..=19).contains(&order.compression_level) {
        return Err(BACKUP.value("compression_level", order.compression_level, "it is 1 to 19, or 0 for the default"));
    }
    Ok(BackupOrder {
        repository: BACKUP.text("repository", order.repository)?,
        run: BACKUP.text("run", order.run)?,
        checkpoint: if order.fast_checkpoint { Checkpoint::Fast } else { Checkpoint::Spread },
        read_all: order.read_all,
        compression_level: Some(order.compression_level).filter(|level| *level != 0),
        processes: Some(order.processes).filter(|processes| *processes != 0),
    })
}

fn restore_order(order: proto::RestoreOrder) -> Result<RestoreOrder, WireError> {
    let data_dir = absolute("data_dir", &order.data_dir)?;
    let port = u16::try_from(order.port).map_err(|_| RESTORE.value("port", order.port, "a port is at most 65535"))?;
    let tablespaces = order
        .tablespaces
        .into_iter()
        .map(|(old, new)| Ok((old, absolute("tablespaces", &new)?)))
        .collect::<Result<_, WireError>>()?;
    Ok(RestoreOrder {
        repository: RESTORE.text("repository", order.repository)?,
        target: target(order.target.ok_or(RESTORE.missing("target"))?)?,
        data_dir,
        tablespaces,
        backup: RESTORE.parse_optional("backup", &order.backup)?,
        start: order.start,
        keep_archiving: order.keep_archiving,
        port: Some(port).filter(|port| *port != 0),
        delta: order.delta,
        standby: order.standby,
        apply_delay: Some(order.apply_delay_seconds).filter(|delay| *delay != 0).map(Duration::from_secs),
        plan_only: order.plan_only,
        complete: order.complete.into_iter().map(known_complete).collect::<Result<_, _>>()?,
    })
}

fn known_complete(known: proto::KnownComplete) -> Result<KnownComplete, WireError> {
    let timeline = Timeline::new(known.timeline);
    Ok(KnownComplete {
        system_id: SystemId(known.system_identifier),
        timeline: timeline.map_err(|error| RESTORE.value("complete.timeline", known.timeline, error))?,
        lsn: RESTORE.parse("complete.lsn", &known.lsn)?,
        at_us: known.at_us,
    })
}

fn wal_find_order(order: proto::WalFindOrder) -> Result<WalFindOrder, WireError> {
    let around = Timestamp::from_microsecond(order.around_us);
    let timeline = order.timeline.parse::<TargetTimeline>();
    let limit = match order.limit {
        0 => FEW_LISTED,
        limit => usize::try_from(limit).unwrap_or(MOST_LISTED).min(MOST_LISTED),
    };
    Ok(WalFindOrder {
        repository: WAL_FIND.text("repository", order.repository)?,
        around: around.map_err(|error| WAL_FIND.value("around_us", order.around_us, error))?,
        within: Duration::from_secs(order.within_seconds),
        timeline: timeline.map_err(|error| WAL_FIND.value("timeline", &order.timeline, error))?,
        limit,
        show: if order.all { Show::All } else { Show::Notable },
    })
}

fn absolute(field: &'static str, text: &str) -> Result<PathBuf, WireError> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(RESTORE.value(field, text, "it is an absolute path")) }
}

fn target(target: recovery::RecoveryTarget) -> Result<RecoveryTarget, WireError> {
    use recovery::recovery_target::Kind;
    let point = match target.kind.ok_or(TARGET.missing("kind"))? {
        Kind::TimeUs(at) => {
            TargetPoint::Time(Timestamp::from_microsecond(at).map_err(|error| TARGET.value("time_us", at, error))?)
        }
        Kind::Lsn(text) => TargetPoint::Lsn(TARGET.parse("lsn", &text)?),
        Kind::Xid(xid) => TargetPoint::Xid(xid),
        Kind::Name(name) => TargetPoint::Name(TARGET.text("name", name)?),
        Kind::Immediate(_) => TargetPoint::Immediate,
        Kind::Latest(_) => TargetPoint::Latest,
    };
    if target.exclusive && !point.can_be_exclusive() {
        return Err(TARGET.value("exclusive", true, "only a time, an LSN or an xid can be excluded"));
    }
    let timeline = target.timeline.parse::<TargetTimeline>();
    let timeline = timeline.map_err(|error| TARGET.value("timeline", &target.timeline, error))?;
    let action = match target.action.as_str() {
        "" | "promote" => TargetAction::Promote,
        "pause" => TargetAction::Pause,
        "shutdown" => TargetAction::Shutdown,
        other => return Err(TARGET.value("action", other, "it is promote, pause or shutdown")),
    };
    Ok(RecoveryTarget { point, exclusive: target.exclusive, timeline, action })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restore(change: impl FnOnce(&mut proto::RestoreOrder)) -> Result<JobOrder, WireError> {
        let mut restore = proto::RestoreOrder {
            repository: "main".into(),
            target: Some(recovery::RecoveryTarget {
                kind: Some(recovery::recovery_target::Kind::Lsn("0/3000060".into())),
                ..Default::default()
            }),
            data_dir: "/restored".into(),
            ..Default::default()
        };
        change(&mut restore);
        order(proto::JobOrder {
            job: "job_a".into(),
            attempt: 1,
            fencing_token: 1,
            cluster: "orders".into(),
            traceparent: String::new(),
            past: Vec::new(),
            work: Some(proto::job_order::Work::Restore(restore)),
        })
    }

    #[test]
    fn absent_fields_mean_what_the_contract_says() {
        let WorkOrder::Restore(restore) = restore(|_| {}).unwrap().work else { panic!("not a restore") };
        assert_eq!(restore.target.timeline, TargetTimeline::Latest);
        assert_eq!(restore.target.action, TargetAction::Promote);
        let named = super::tests::restore(|restore| restore.target.as_mut().unwrap().timeline = "5-0f3c".into());
        let WorkOrder::Restore(named) = named.unwrap().work else { panic!("not a restore") };
        assert_eq!(named.target.timeline, TargetTimeline::Branch("5-0f3c".parse().unwrap()));
        assert_eq!((restore.port, restore.apply_delay, restore.backup), (None, None, None));
    }

    #[test]
    fn what_does_not_read_is_refused_by_name() {
        let kind = |kind| move |restore: &mut proto::RestoreOrder| restore.target.as_mut().unwrap().kind = Some(kind);
        use recovery::recovery_target::Kind;
        for (result, says) in [
            (restore(|restore| restore.data_dir = "relative".into()), "data_dir"),
            (restore(|restore| restore.port = 70_000), "port"),
            (restore(|restore| restore.target = None), "target"),
            (restore(|restore| restore.backup = "../x".into()), "backup"),
            (restore(|restore| drop(restore.tablespaces.insert("1".into(), "x".into()))), "tablespaces"),
            (restore(kind(Kind::Lsn("x".into()))), "lsn"),
            (restore(kind(Kind::TimeUs(i64::MAX))), "time_us"),
            (restore(|restore| restore.target.as_mut().unwrap().timeline = "0".into()), "timeline"),
            (restore(|restore| restore.target.as_mut().unwrap().timeline = "5-xyz".into()), "timeline"),
            (restore(|restore| restore.target.as_mut().unwrap().action = "explode".into()), "action"),
            (
                restore(|restore| {
                    let target = restore.target.as_mut().unwrap();
                    target.kind = Some(Kind::Immediate(true));
                    target.exclusive = true;
                }),
                "exclusive",
            ),
        ] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(says), "{says}: {message}");
        }
    }
}
