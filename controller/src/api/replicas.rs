//! `Replicas`: other places of repositories.

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::replicas_server::Replicas;

use super::{Api, now};
use crate::wire::replicas::replica_out;

#[tonic::async_trait]
impl Replicas for Api {
    async fn list_replicas(
        &self,
        _: Request<pb::ListReplicasRequest>,
    ) -> Result<Response<pb::ListReplicasReply>, Status> {
        let (overview, at) = (self.overview().await?, now());
        let assembly = overview.picture.assemble();
        let seen = self.keeper.replicated();
        let mut replicas = Vec::new();
        for (name, spec) in &overview.picture.catalog.repositories {
            let Some(of) = &spec.replica_of else { continue };
            for cluster in assembly.clusters.values().filter(|cluster| cluster.repository == Some(of)) {
                let place = (name.clone(), cluster.name.clone());
                replicas.push(replica_out((name, spec), cluster.name.as_str(), seen.get(&place), at));
            }
        }
        Ok(Response::new(pb::ListReplicasReply { replicas }))
    }
}
