//! What is kept, and holds.

use jiff::Timestamp;
use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::retention_client::RetentionClient;

use super::{insist, moment, text};
use crate::client::{CallError, Client, Transport};
use crate::view::garbage::{ClusterGarbage, Garbage};
use crate::view::hold::{Hold, Holds, Stretch};
use crate::view::retention::{BackupRetention, Decision, RetentionPlan, WalRetention};

/// What is to be held.
pub struct HoldSpec {
    pub cluster: String,
    /// Empty: the stretch is.
    pub backup: String,
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    pub reason: String,
    pub until: Option<Timestamp>,
}

impl Client {
    fn retention(&self) -> RetentionClient<Transport> {
        RetentionClient::new(self.transport())
    }

    pub async fn retention_plan(&self, cluster: &str) -> Result<RetentionPlan, CallError> {
        let message = proto::PlanRetentionRequest { cluster: cluster.to_owned() };
        let attempt = || async { self.retention().plan_retention(self.request(message.clone())).await };
        Ok(insist(attempt).await.map_err(self.failed("plan retention"))?.into_inner().into())
    }

    /// `digest`: of the plan that was shown.
    pub async fn release_retention(&self, cluster: &str, digest: &str) -> Result<RetentionPlan, CallError> {
        let message = proto::ReleaseRetentionRequest { cluster: cluster.to_owned(), digest: digest.to_owned() };
        let reply = self.retention().release_retention(self.request(message)).await;
        Ok(reply.map_err(self.failed("release retention"))?.into_inner().into())
    }

    pub async fn undelete(&self, cluster: &str, backup: &str) -> Result<(), CallError> {
        let message = proto::UndeleteBackupRequest { cluster: cluster.to_owned(), backup: backup.to_owned() };
        self.retention().undelete_backup(self.request(message)).await.map_err(self.failed("undelete backup"))?;
        Ok(())
    }

    pub async fn place_hold(&self, spec: &HoldSpec) -> Result<Vec<Hold>, CallError> {
        let us = |at: Option<Timestamp>| at.map_or(0, Timestamp::as_microsecond);
        let message = proto::PlaceHoldRequest {
            cluster: spec.cluster.clone(),
            backup: spec.backup.clone(),
            from_us: us(spec.from),
            to_us: us(spec.to),
            reason: spec.reason.clone(),
            until_us: us(spec.until),
        };
        let reply = self.retention().place_hold(self.request(message)).await.map_err(self.failed("place hold"))?;
        Ok(reply.into_inner().holds.into_iter().map(Hold::from).collect())
    }

    /// Empty: every cluster's.
    pub async fn holds(&self, cluster: &str) -> Result<Holds, CallError> {
        let message = proto::ListHoldsRequest { cluster: cluster.to_owned() };
        let attempt = || async { self.retention().list_holds(self.request(message.clone())).await };
        let reply = insist(attempt).await.map_err(self.failed("list holds"))?.into_inner();
        Ok(Holds { holds: reply.holds.into_iter().map(Hold::from).collect(), unknown: reply.unknown })
    }

    pub async fn collect_repository(&self, repository: &str, dry_run: bool) -> Result<Garbage, CallError> {
        let message = proto::CollectRepositoryRequest { repository: repository.to_owned(), dry_run };
        let reply = self.retention().collect_repository(self.request(message)).await;
        let clusters = reply.map_err(self.failed("collect repository"))?.into_inner().clusters;
        let clusters = clusters.into_iter().map(ClusterGarbage::from).collect();
        Ok(Garbage { repository: repository.to_owned(), clusters })
    }

    pub async fn release_hold(&self, cluster: &str, hold: &str) -> Result<(), CallError> {
        let message = proto::ReleaseHoldRequest { cluster: cluster.to_owned(), hold: hold.to_owned() };
        self.retention().release_hold(self.request(message)).await.map_err(self.failed("release hold"))?;
        Ok(())
    }
}

impl From<proto::RetentionPlan> for RetentionPlan {
    fn from(wire: proto::RetentionPlan) -> RetentionPlan {
        RetentionPlan {
            cluster: wire.cluster,
            repository: wire.repository,
            at: moment(wire.at_us),
            window_from: moment(wire.edge_us),
            backups: wire.backups.into_iter().map(BackupRetention::from).collect(),
            wal: wire.wal.into_iter().map(WalRetention::from).collect(),
            refused: wire.refused,
            acts_from: moment(wire.acts_from_us),
            digest: wire.digest,
            can_be_released: wire.can_be_released,
        }
    }
}

impl From<proto::BackupRetention> for BackupRetention {
    fn from(wire: proto::BackupRetention) -> BackupRetention {
        use proto::RetentionDecision as Wire;
        let decision = match wire.decision() {
            Wire::Keep => Decision::Keep,
            Wire::BringBack => Decision::BringBack,
            Wire::Expire => Decision::Expire,
            Wire::Wait => Decision::Wait,
            Wire::Purge => Decision::Purge,
            Wire::Unspecified => Decision::Unknown,
        };
        BackupRetention {
            backup: wire.backup,
            seen_at: moment(wire.seen_at_us),
            restorable: wire.is_restorable,
            decision,
            reasons: wire.reasons,
            until: moment(wire.until_us),
        }
    }
}

impl From<proto::WalRetention> for WalRetention {
    fn from(wire: proto::WalRetention) -> WalRetention {
        WalRetention {
            system_identifier: wire.system_identifier.to_string(),
            timeline: wire.timeline,
            branch: wire.branch,
            below_lsn: wire.below_lsn,
            segments: wire.segments,
        }
    }
}

impl From<proto::HoldView> for Hold {
    fn from(wire: proto::HoldView) -> Hold {
        let stretch = Stretch { from: moment(wire.from_us), to: moment(wire.to_us) };
        Hold {
            id: wire.hold,
            cluster: wire.cluster,
            repository: wire.repository,
            backup: text(wire.backup),
            stretch: wire.is_stretch.then_some(stretch),
            wal: text(wire.wal),
            reason: wire.reason,
            owner: wire.owner,
            until: moment(wire.until_us),
        }
    }
}

impl From<proto::ClusterGarbage> for ClusterGarbage {
    fn from(wire: proto::ClusterGarbage) -> ClusterGarbage {
        ClusterGarbage {
            cluster: wire.cluster,
            objects: wire.objects,
            bytes: wire.bytes,
            removable_at: moment(wire.removable_at_us),
            problem: text(wire.problem),
        }
    }
}
