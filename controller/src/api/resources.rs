//! `Resources`: declared documents. All of a call's documents take effect, or none.

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::resources_server::Resources;

use super::status::of_row;
use super::{Api, apply, now};
use crate::identity::permission::demand;
use crate::identity::{PeerIdentity, Role, peer};
use crate::resources::stored::{self, StoredDocument};
use crate::resources::{Kind, document};
use crate::wire::operator::{change_out, resource_out};

/// Documents of one call: each is one operation of one transaction, and etcd takes 128.
const MAX_DOCUMENTS: usize = 100;

impl Api {
    async fn apply_documents(&self, peer: &PeerIdentity, wanted: pb::ApplyRequest) -> Result<pb::ApplyReply, Status> {
        let documents = document::parse(&wanted.yaml)?;
        if documents.len() > MAX_DOCUMENTS {
            return Err(Status::invalid_argument(format!(
                "there are {} documents, at most {MAX_DOCUMENTS} are applied at once\nHINT: apply them in several files.",
                documents.len()
            )));
        }
        let overview = self.overview().await?;
        let before = &overview.picture.catalog;
        let after = before.clone().with(documents.iter().cloned());
        apply::refuse_dangling(&after)?;
        apply::refuse_ties(&overview, &after)?;
        let planned = stored::plan(&self.reconciler.state, documents).await.map_err(of_row)?;
        let mut consequences = apply::consequences(&overview, &after);
        // People look at it before: reading what clusters hold takes seconds.
        if wanted.dry_run {
            consequences.extend(self.kept_otherwise(&overview, &after).await);
        }
        let changes = planned
            .iter()
            .enumerate()
            // What follows from all of them together is told with the last one.
            .map(|(i, change)| {
                let told = if i + 1 == planned.len() { std::mem::take(&mut consequences) } else { Vec::new() };
                change_out(change, told)
            })
            .collect();
        if !wanted.dry_run {
            let by = peer.name.as_str();
            stored::commit(&self.reconciler.state, before.version, &planned, by, now()).await.map_err(of_row)?;
            self.reconciler.documents_changed();
        }
        Ok(pb::ApplyReply { changes })
    }

    async fn delete(&self, kind: Kind, name: &str) -> Result<(), Status> {
        let overview = self.overview().await?;
        let catalog = &overview.picture.catalog;
        apply::refuse_referred(&overview, kind, name)?;
        if stored::delete(&self.reconciler.state, catalog.version, kind, name).await.map_err(of_row)? {
            self.reconciler.documents_changed();
            return Ok(());
        }
        let noun = kind.as_str().to_ascii_lowercase();
        Err(Status::not_found(format!(
            "{kind} {name:?} is not declared\nHINT: `walfleet {noun} list` shows those that are."
        )))
    }
}

fn kind(text: &str) -> Result<Kind, Status> {
    Kind::parse(text).ok_or_else(|| {
        Status::invalid_argument(format!("kind: {text:?} is not known\nHINT: Policy, Repository and Cluster are."))
    })
}

#[tonic::async_trait]
impl Resources for Api {
    async fn apply(&self, request: Request<pb::ApplyRequest>) -> Result<Response<pb::ApplyReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        if wanted.dry_run {
            return self.apply_documents(&peer, wanted).await.map(Response::new);
        }
        let allowed = demand(&peer, Role::Admin);
        let applied = match allowed {
            Ok(()) => self.apply_documents(&peer, wanted).await,
            Err(status) => Err(status),
        };
        let object = match &applied {
            Ok(reply) => {
                let names: Vec<String> =
                    reply.changes.iter().map(|change| format!("{} {}", change.kind, change.name)).collect();
                names.join(", ")
            }
            Err(_) => "documents".to_owned(),
        };
        self.audited(&peer, "Resources.Apply", &object, applied).await.map(Response::new)
    }

    async fn list_resources(
        &self,
        request: Request<pb::ListResourcesRequest>,
    ) -> Result<Response<pb::ListResourcesReply>, Status> {
        let wanted = request.into_inner();
        let only = if wanted.kind.is_empty() { None } else { Some(kind(&wanted.kind)?) };
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let bound = |stored: &StoredDocument| -> Vec<String> {
            let (kind, name) = (stored.document.kind(), stored.document.name());
            let clusters = assembly.clusters.values().filter(|cluster| match kind {
                Kind::Policy => cluster.binding.policy() == Some(name),
                Kind::Repository => cluster.repository == Some(name),
                Kind::Cluster => false,
            });
            clusters.map(|cluster| cluster.name.to_string()).collect()
        };
        let stored = stored::list(&self.reconciler.state).await.map_err(of_row)?;
        let resources = stored
            .iter()
            .filter(|stored| only.is_none_or(|kind| stored.document.kind() == kind))
            .filter(|stored| wanted.name.is_empty() || stored.document.name() == wanted.name)
            .map(|stored| resource_out(stored, bound(stored)))
            .collect();
        Ok(Response::new(pb::ListResourcesReply { resources }))
    }

    async fn delete_resource(
        &self,
        request: Request<pb::DeleteResourceRequest>,
    ) -> Result<Response<pb::DeleteResourceReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let object = format!("{} {}", wanted.kind, wanted.name);
        let deleted = match kind(&wanted.kind) {
            Ok(kind) => self.delete(kind, &wanted.name).await,
            Err(status) => Err(status),
        };
        self.audited(&peer, "Resources.DeleteResource", &object, deleted).await?;
        Ok(Response::new(pb::DeleteResourceReply {}))
    }
}
