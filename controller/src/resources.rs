//! What people declare: Policy, Repository and Cluster documents, from YAML to checked specs, and how two differ.
//!
//! Text and values only. What binds to what is `policy`'s, what is stored is `resources::stored`'s; nothing here reads
//! the fleet, and no credential ever passes (`repository_spec` refuses them).

pub mod cluster_spec;
pub mod diff;
pub mod document;
pub mod policy_spec;
pub mod repository_spec;
pub mod retention_spec;
pub mod selector;
pub mod span;
pub mod stored;

pub use cluster_spec::ClusterSpec;
pub use document::{Document, Kind, Labels, Resource, ResourceError, Spec};
pub use policy_spec::PolicySpec;
pub use repository_spec::RepositorySpec;
pub use retention_spec::RetentionSpec;
pub use selector::Selector;
pub use span::Span;
