//! Other places of repositories.

use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::replicas_client::ReplicasClient;

use super::{insist, moment, number, text};
use crate::client::{CallError, Client};
use crate::view::replica::{Replica, Replicas};

impl Client {
    pub async fn replicas(&self) -> Result<Replicas, CallError> {
        let attempt = || async {
            let message = self.request(proto::ListReplicasRequest {});
            ReplicasClient::new(self.transport()).list_replicas(message).await
        };
        let reply = insist(attempt).await.map_err(self.failed("list replicas"))?.into_inner();
        Ok(Replicas { replicas: reply.replicas.into_iter().map(Replica::from).collect() })
    }
}

impl From<proto::ReplicaView> for Replica {
    fn from(wire: proto::ReplicaView) -> Replica {
        Replica {
            repository: wire.repository,
            replica_of: wire.replica_of,
            cluster: wire.cluster,
            complete_as_of: moment(wire.complete_as_of_us),
            rpo_seconds: number(wire.rpo_seconds),
            late: wire.is_late,
            lacking_backups: wire.is_counted.then_some(wire.lacking_backups),
            damaged: wire.damaged,
            problem: text(wire.problem),
        }
    }
}
