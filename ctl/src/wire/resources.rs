//! Declared documents.

use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::resources_client::ResourcesClient;

use super::{moment, text};
use crate::client::{CallError, Client, LARGEST_ANSWER, Transport};
use crate::view::change::{Change, ChangeKind, Changes, FieldChange};
use crate::view::resource::Resource;

/// Whether applying is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intent {
    Apply,
    DryRun,
}

impl Client {
    fn resources(&self) -> ResourcesClient<Transport> {
        ResourcesClient::new(self.transport()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub async fn apply(&self, yaml: &str, intent: Intent) -> Result<Changes, CallError> {
        let dry_run = intent == Intent::DryRun;
        let request = self.request(proto::ApplyRequest { yaml: yaml.to_owned(), dry_run });
        let reply = self.resources().apply(request).await.map_err(self.failed("apply"))?.into_inner();
        Ok(Changes { applied: !dry_run, changes: reply.changes.into_iter().map(Change::from).collect() })
    }

    /// All of a kind, or the one of that name.
    pub async fn documents(&self, kind: &str, name: &str) -> Result<Vec<Resource>, CallError> {
        let request = self.request(proto::ListResourcesRequest { kind: kind.to_owned(), name: name.to_owned() });
        let reply = self.resources().list_resources(request).await.map_err(self.failed("list resources"))?;
        Ok(reply.into_inner().resources.into_iter().map(Resource::from).collect())
    }

    pub async fn delete(&self, kind: &str, name: &str) -> Result<(), CallError> {
        let request = self.request(proto::DeleteResourceRequest { kind: kind.to_owned(), name: name.to_owned() });
        self.resources().delete_resource(request).await.map_err(self.failed("delete"))?;
        Ok(())
    }
}

impl From<proto::Change> for Change {
    fn from(wire: proto::Change) -> Change {
        let change = match wire.change() {
            proto::ChangeKind::Created => ChangeKind::Created,
            proto::ChangeKind::Unchanged => ChangeKind::Unchanged,
            // What is not known is shown as a change: the careful reading.
            proto::ChangeKind::Updated | proto::ChangeKind::Unspecified => ChangeKind::Updated,
        };
        let field = |field: proto::FieldChange| FieldChange {
            path: field.path,
            before: text(field.before),
            after: text(field.after),
        };
        Change {
            kind: wire.kind,
            name: wire.name,
            change,
            fields: wire.fields.into_iter().map(field).collect(),
            consequences: wire.consequences,
        }
    }
}

impl From<proto::Resource> for Resource {
    fn from(wire: proto::Resource) -> Resource {
        Resource {
            kind: wire.kind,
            name: wire.name,
            generation: wire.generation,
            applied_at: moment(wire.applied_at_us),
            applied_by: wire.applied_by,
            bound_clusters: wire.bound_clusters,
            document: serde_yaml_ng::from_str(&wire.yaml).unwrap_or_default(),
            yaml: wire.yaml,
        }
    }
}
