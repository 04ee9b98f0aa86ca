//! Declared documents in the state, under `resource/<kind>/<name>`, and all of them at once as a [`Catalog`].
//!
//! Every change goes in one transaction against the version of the whole that it was judged by: two admins at once can
//! neither overwrite each other unseen nor leave a document that refers to what the other one deleted.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;

use super::diff::{ChangeKind, FieldChange, changes};
use super::{ClusterSpec, Document, Kind, Labels, PolicySpec, RepositorySpec, Resource};
use crate::state::rows::put_row;
use crate::state::{Compare, Op, Row, RowError, State, Txn};

const PREFIX: &str = "resource/";
/// Rewritten with every change below the prefix; its revision is the version of the whole.
const VERSION_KEY: &str = "resource_version";

/// A document as it was applied.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StoredDocument {
    pub document: Document,
    /// Counts changes of its content, from 1.
    pub generation: u64,
    pub applied_at: Timestamp,
    pub applied_by: String,
}

/// A Cluster document, without its frame.
#[derive(Clone, PartialEq, Debug)]
pub struct DeclaredCluster {
    pub labels: Labels,
    pub spec: ClusterSpec,
}

/// All that is declared.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Catalog {
    /// What [`commit`] and [`delete`] compare; 0: nothing was ever declared.
    pub version: u64,
    pub repositories: BTreeMap<String, RepositorySpec>,
    pub policies: BTreeMap<String, PolicySpec>,
    pub clusters: BTreeMap<ClusterName, DeclaredCluster>,
}

impl Catalog {
    pub async fn load(state: &State) -> Result<Catalog, RowError> {
        // The version first: what changes while the rows are read then fails the comparison.
        let version = state.get(VERSION_KEY).await?.map_or(0, |entry| entry.mod_revision);
        let (rows, _) = state.rows::<StoredDocument>(PREFIX).await?;
        Ok(Catalog { version, ..rows.into_iter().map(|row| row.value.document).collect() })
    }

    fn insert(&mut self, document: Document) {
        match document {
            Document::Repository(Resource { name, spec, .. }) => {
                self.repositories.insert(name, spec);
            }
            Document::Policy(policy) => {
                self.policies.insert(policy.name, policy.spec);
            }
            Document::Cluster(Resource { name, labels, spec, .. }) => {
                // `document::parse` lets no other name through.
                if let Ok(name) = name.parse() {
                    self.clusters.insert(name, DeclaredCluster { labels, spec });
                }
            }
        }
    }

    /// What would be declared with these applied over it.
    pub fn with(mut self, documents: impl IntoIterator<Item = Document>) -> Catalog {
        documents.into_iter().for_each(|document| self.insert(document));
        self
    }

    pub fn without(mut self, kind: Kind, name: &str) -> Catalog {
        match kind {
            Kind::Repository => drop(self.repositories.remove(name)),
            Kind::Policy => drop(self.policies.remove(name)),
            Kind::Cluster => self.clusters.retain(|cluster, _| cluster.as_str() != name),
        }
        self
    }

    /// The first name that refers to nothing: who refers, by which field, to what.
    pub fn dangling(&self) -> Option<Dangling> {
        self.references().find(|reference| !self.repositories.contains_key(&reference.repository))
    }

    /// The first that refers to a replica. Nothing lies in replicas of its own, and they have none.
    pub fn misplaced(&self) -> Option<Dangling> {
        let is_replica = |name: &str| self.repositories.get(name).is_some_and(|spec| spec.replica_of.is_some());
        self.references().find(|reference| is_replica(&reference.repository))
    }

    fn references(&self) -> impl Iterator<Item = Dangling> {
        let of_policies =
            self.policies.iter().map(|(name, spec)| (Kind::Policy, name.as_str(), Some(&spec.repository)));
        let of_clusters = self
            .clusters
            .iter()
            .map(|(name, declared)| (Kind::Cluster, name.as_str(), declared.spec.repository.as_ref()));
        let of_replicas =
            self.repositories.iter().map(|(name, spec)| (Kind::Repository, name.as_str(), spec.replica_of.as_ref()));
        of_policies.chain(of_clusters).chain(of_replicas).filter_map(|(kind, name, repository)| {
            let field = if kind == Kind::Repository { "replica_of" } else { "repository" };
            Some(Dangling { kind, name: name.to_owned(), field, repository: repository?.clone() })
        })
    }
}

impl FromIterator<Document> for Catalog {
    fn from_iter<T: IntoIterator<Item = Document>>(documents: T) -> Catalog {
        Catalog::default().with(documents)
    }
}

/// A document that names a repository which is not declared, or not what it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dangling {
    pub kind: Kind,
    pub name: String,
    pub field: &'static str,
    pub repository: String,
}

fn key(kind: Kind, name: &str) -> String {
    format!("{PREFIX}{}/{name}", kind.as_str().to_ascii_lowercase())
}

/// What applying a document does.
#[derive(Clone, PartialEq, Debug)]
pub struct PlannedChange {
    pub document: Document,
    pub kind: ChangeKind,
    pub fields: Vec<FieldChange>,
    generation: u64,
}

/// Reads what stands in the place of each document.
pub async fn plan(state: &State, documents: Vec<Document>) -> Result<Vec<PlannedChange>, RowError> {
    let mut planned = Vec::with_capacity(documents.len());
    for document in documents {
        let row: Option<Row<StoredDocument>> = state.row(&key(document.kind(), document.name())).await?;
        let (kind, fields) = changes(row.as_ref().map(|row| &row.value.document), &document);
        let generation = row.map_or(0, |row| row.value.generation);
        planned.push(PlannedChange { document, kind, fields, generation });
    }
    Ok(planned)
}

/// Stores all planned changes, or none: [`RowError::Conflict`] if anything was declared since `version` was read.
pub async fn commit(
    state: &State,
    version: u64,
    planned: &[PlannedChange],
    by: &str,
    now: Timestamp,
) -> Result<(), RowError> {
    let mut txn = Txn::new();
    for change in planned.iter().filter(|change| change.kind != ChangeKind::Unchanged) {
        let stored = StoredDocument {
            document: change.document.clone(),
            generation: change.generation + 1,
            applied_at: now,
            applied_by: by.to_owned(),
        };
        txn = txn.then(put_row(key(change.document.kind(), change.document.name()), &stored)?);
    }
    if txn.then.is_empty() {
        return Ok(());
    }
    write(state, version, txn).await
}

/// Whether it was there.
pub async fn delete(state: &State, version: u64, kind: Kind, name: &str) -> Result<bool, RowError> {
    if state.get(&key(kind, name)).await?.is_none() {
        return Ok(false);
    }
    write(state, version, Txn::new().then(Op::delete(key(kind, name)))).await?;
    Ok(true)
}

async fn write(state: &State, version: u64, txn: Txn) -> Result<(), RowError> {
    let txn = txn.when(Compare::unchanged(VERSION_KEY, version)).then(Op::put(VERSION_KEY, "{}"));
    if state.txn(txn).await?.succeeded { Ok(()) } else { Err(RowError::Conflict { key: VERSION_KEY.to_owned() }) }
}

pub async fn list(state: &State) -> Result<Vec<StoredDocument>, RowError> {
    let (rows, _) = state.rows(PREFIX).await?;
    Ok(rows.into_iter().map(|row| row.value).collect())
}
