//! A declared document: its frame (`apiVersion`, `kind`, `name`, `labels`, `spec`), and reading many from one text.
//!
//! All or nothing: the first fault names its document, its dotted path and what is accepted there.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;

use super::cluster_spec::ClusterSpec;
use super::policy_spec::PolicySpec;
use super::repository_spec::RepositorySpec;
use super::selector::{is_label_key, is_label_value};

pub const API_VERSION: &str = "walfleet/v1";

pub type Labels = BTreeMap<String, String>;

/// What a document declares.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Kind {
    Repository,
    Policy,
    Cluster,
}

impl Kind {
    /// In the order in which each may refer to those before it.
    pub const ALL: [Kind; 3] = [Kind::Repository, Kind::Policy, Kind::Cluster];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Repository => "Repository",
            Kind::Policy => "Policy",
            Kind::Cluster => "Cluster",
        }
    }

    /// As in the document, in any case.
    pub fn parse(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str().eq_ignore_ascii_case(text))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A document of one kind.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resource<S> {
    #[serde(rename = "apiVersion")]
    pub api_version: String,
    pub kind: Kind,
    pub name: String,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    pub spec: S,
}

/// A document of any kind. Names are unique within a kind.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Document {
    Repository(Resource<RepositorySpec>),
    Policy(Box<Resource<PolicySpec>>),
    Cluster(Resource<ClusterSpec>),
}

/// What every kind's spec can say of itself.
pub trait Spec {
    /// The first fault: its dotted path below `spec`, and text that names the accepted range.
    fn validate(&self) -> Result<(), SpecFault>;
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpecFault {
    pub path: String,
    pub problem: String,
    pub hint: String,
}

impl SpecFault {
    pub fn new(path: impl Into<String>, problem: impl fmt::Display, hint: impl Into<String>) -> SpecFault {
        SpecFault { path: path.into(), problem: problem.to_string(), hint: hint.into() }
    }
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ResourceError {
    /// Text that is not YAML, a field of the wrong type, an unknown field: as the parser says it, with its line.
    #[error("document {document}: {problem}{hint}")]
    Yaml { document: usize, problem: String, hint: String },
    #[error("document {document} ({kind} {name:?}): {path}: {problem}\nHINT: {hint}")]
    Field { document: usize, kind: Kind, name: String, path: String, problem: String, hint: String },
    #[error("document {document} ({kind} {name:?}) repeats document {earlier}\nHINT: declare each {kind} once.")]
    Repeated { document: usize, earlier: usize, kind: Kind, name: String },
    #[error(
        "no document is declared\nHINT: a document has apiVersion, kind, name and spec; deploy/fleet.yaml shows all of them."
    )]
    Empty,
    #[error("the text has {bytes} bytes, at most {limit} are accepted\nHINT: apply it in several files.")]
    TooLarge { bytes: usize, limit: usize },
}

/// One transaction of the state takes at most about a megabyte (etcd's request limit is 1.5 MiB).
const MAX_TEXT_BYTES: usize = 512 * 1024;

/// Enough of a document to know its kind.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
}

/// Reads all documents of a text. Empty documents (comments, a trailing `---`) are passed over but counted.
pub fn parse(text: &str) -> Result<Vec<Document>, ResourceError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(ResourceError::TooLarge { bytes: text.len(), limit: MAX_TEXT_BYTES });
    }
    // Two passes over the text instead of one over a tree: the typed pass keeps the parser's paths and line numbers.
    let mut kinds = Vec::new();
    for (at, reader) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let head = Option::<Head>::deserialize(reader).map_err(|error| yaml_error(at + 1, &error))?;
        kinds.push(head.map(|head| kind_of(at + 1, &head)).transpose()?);
    }
    let mut documents: Vec<(usize, Document)> = Vec::new();
    for ((at, reader), kind) in serde_yaml_ng::Deserializer::from_str(text).enumerate().zip(kinds) {
        let Some(kind) = kind else { continue };
        let document = at + 1;
        let read = Document::read(kind, reader).map_err(|error| match yaml_error(document, &error) {
            ResourceError::Yaml { document, problem, hint } => {
                ResourceError::Yaml { document, problem: with_field(text, at, problem), hint }
            }
            other => other,
        })?;
        read.validate(document)?;
        if let Some((earlier, _)) =
            documents.iter().find(|(_, other)| (other.kind(), other.name()) == (read.kind(), read.name()))
        {
            return Err(ResourceError::Repeated { document, earlier: *earlier, kind, name: read.name().to_owned() });
        }
        documents.push((document, read));
    }
    if documents.is_empty() {
        return Err(ResourceError::Empty);
    }
    Ok(documents.into_iter().map(|(_, document)| document).collect())
}

fn yaml_error(document: usize, error: &serde_yaml_ng::Error) -> ResourceError {
    // A unit type's own error may bring its hint along; the parser then appends the place behind it.
    let text = error.to_string();
    let (problem, hint) = match text.split_once("\nHINT: ") {
        Some((problem, rest)) => {
            let (hint, place) = rest.rsplit_once(" at line ").unwrap_or((rest, ""));
            let place = if place.is_empty() { String::new() } else { format!(" at line {place}") };
            (format!("{problem}{place}"), format!("\nHINT: {hint}"))
        }
        None => (text, String::new()),
    };
    ResourceError::Yaml { document, problem, hint }
}

/// The parser names the section in which a value was refused; the field is the one in it that holds the refused text.
fn with_field(text: &str, at: usize, problem: String) -> String {
    let document = serde_yaml_ng::Deserializer::from_str(text).nth(at);
    let tree = document.and_then(|reader| serde_yaml_ng::Value::deserialize(reader).ok());
    let (Some(tree), Some((section, refused))) = (tree, problem.split_once(": \"")) else { return problem };
    let Some((refused, _)) = refused.split_once('"') else { return problem };
    let place = section.split('.').try_fold(&tree, |value, part| value.get(part));
    let Some(serde_yaml_ng::Value::Mapping(fields)) = place else { return problem };
    let mut holding = fields.iter().filter(|(_, value)| {
        serde_yaml_ng::to_string(value).is_ok_and(|text| text.trim_end().trim_matches(['\'', '"']) == refused)
    });
    match (holding.next(), holding.next()) {
        (Some((serde_yaml_ng::Value::String(field), _)), None) => {
            problem.replacen(section, &format!("{section}.{field}"), 1)
        }
        _ => problem,
    }
}

fn kind_of(document: usize, head: &Head) -> Result<Kind, ResourceError> {
    let fault =
        |problem: String, hint: &str| ResourceError::Yaml { document, problem, hint: format!("\nHINT: {hint}") };
    match head.api_version.as_deref() {
        Some(API_VERSION) => {}
        Some(other) => {
            return Err(fault(
                format!("apiVersion: {other:?} is not known here, {API_VERSION:?} is"),
                "write apiVersion: walfleet/v1.",
            ));
        }
        None => return Err(fault("apiVersion is missing".to_owned(), "write apiVersion: walfleet/v1.")),
    }
    match head.kind.as_deref() {
        Some("Policy") => Ok(Kind::Policy),
        Some("Repository") => Ok(Kind::Repository),
        Some("Cluster") => Ok(Kind::Cluster),
        Some("Hold") => Err(fault("kind: Hold cannot be declared yet".to_owned(), "leave the document out.")),
        Some(other) => {
            Err(fault(format!("kind: {other:?} is not known"), "write one of Policy, Repository and Cluster."))
        }
        None => Err(fault("kind is missing".to_owned(), "write one of Policy, Repository and Cluster.")),
    }
}

impl Document {
    fn read<'de, D: serde::Deserializer<'de>>(kind: Kind, reader: D) -> Result<Document, D::Error> {
        match kind {
            Kind::Repository => Resource::deserialize(reader).map(Document::Repository),
            Kind::Policy => Resource::deserialize(reader).map(|policy| Document::Policy(Box::new(policy))),
            Kind::Cluster => Resource::deserialize(reader).map(Document::Cluster),
        }
    }

    /// From a stored document's own text.
    pub fn from_yaml(kind: Kind, text: &str) -> Result<Document, serde_yaml_ng::Error> {
        Document::read(kind, serde_yaml_ng::Deserializer::from_str(text))
    }

    pub fn kind(&self) -> Kind {
        match self {
            Document::Repository(_) => Kind::Repository,
            Document::Policy(_) => Kind::Policy,
            Document::Cluster(_) => Kind::Cluster,
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Document::Repository(resource) => &resource.name,
            Document::Policy(resource) => &resource.name,
            Document::Cluster(resource) => &resource.name,
        }
    }

    fn labels(&self) -> &Labels {
        match self {
            Document::Repository(resource) => &resource.labels,
            Document::Policy(resource) => &resource.labels,
            Document::Cluster(resource) => &resource.labels,
        }
    }

    /// With every default that applies written out.
    pub fn to_yaml(&self) -> String {
        match self {
            Document::Repository(resource) => serde_yaml_ng::to_string(resource),
            Document::Policy(resource) => serde_yaml_ng::to_string(resource),
            Document::Cluster(resource) => serde_yaml_ng::to_string(resource),
        }
        .expect("specs are maps of plain values, which YAML can always hold")
    }

    fn validate(&self, document: usize) -> Result<(), ResourceError> {
        let spec = match self {
            Document::Repository(resource) => resource.spec.validate(),
            Document::Policy(resource) => resource.spec.validate(),
            Document::Cluster(resource) => resource.spec.validate(),
        };
        let fault = check_frame(self.name(), self.labels())
            .and(spec.map_err(|fault| SpecFault { path: format!("spec.{}", fault.path), ..fault }));
        fault.map_err(|SpecFault { path, problem, hint }| ResourceError::Field {
            document,
            kind: self.kind(),
            name: self.name().to_owned(),
            path,
            problem,
            hint,
        })
    }
}

fn check_frame(name: &str, labels: &Labels) -> Result<(), SpecFault> {
    // One rule for all names: those of clusters stand in object keys, and nobody gains from a second rule.
    if name.parse::<ClusterName>().is_err() {
        let hint = "use 1 to 63 of a-z, 0-9, '-', '_' and '.', and begin with a letter or digit.";
        return Err(SpecFault::new("name", format!("{name:?} is not a name"), hint));
    }
    for (key, value) in labels {
        if !is_label_key(key) {
            let hint = "a key is 1 to 63 letters, digits, '-', '_', '.' and '/'.";
            return Err(SpecFault::new(format!("labels.{key}"), "this is not a label's key", hint));
        }
        if !is_label_value(value) {
            let hint = "a value is at most 63 letters, digits, '-', '_' and '.'.";
            return Err(SpecFault::new(format!("labels.{key}"), format!("{value:?} is not a label's value"), hint));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
# a comment first
apiVersion: walfleet/v1
kind: Repository
name: main
spec:
  url: file:///srv/walfleet
---
apiVersion: walfleet/v1
kind: Policy
name: gold
spec:
  selector: env=prod
  repository: main
  backup: {schedule: '0 2 * * *', time_zone: Europe/Berlin, jitter: 30m}
---
# nothing here
---
apiVersion: walfleet/v1
kind: Cluster
name: orders
labels: {env: prod}
spec:
  members:
    - {agent: db1, data_dir: /var/lib/postgresql/15/main}
";

    #[test]
    fn several_documents_are_read_and_read_back_from_what_they_print() {
        let documents = parse(GOOD).expect("the sample is good");
        assert_eq!(
            documents.iter().map(Document::kind).collect::<Vec<_>>(),
            [Kind::Repository, Kind::Policy, Kind::Cluster]
        );
        for document in documents {
            let again = Document::from_yaml(document.kind(), &document.to_yaml()).expect("it reads back");
            assert_eq!(again, document);
        }
    }

    #[test]
    fn every_fault_names_its_document_its_path_and_what_is_accepted() {
        let table: [(&str, &str, &[&str]); 15] = [
            ("kind: Policy", "kind: Polcy", &["document 2", "\"Polcy\"", "Policy, Repository and Cluster"]),
            ("kind: Policy", "kind: Hold", &["document 2", "yet"]),
            ("walfleet/v1\nkind: Policy", "v2\nkind: Policy", &["document 2", "\"v2\"", "walfleet/v1"]),
            ("jitter: 30m", "jitter: 30", &["document 2", "spec.backup.jitter", "line"]),
            ("jitter: 30m", "jitter: 30 min", &["document 2", "spec.backup.jitter", "HINT", "15m", "line"]),
            ("jitter: 30m", "jiter: 30m", &["document 2", "jiter", "expected one of"]),
            ("jitter: 30m", "processes: 4000", &["document 2", "\"gold\"", "spec.backup.processes", "1 to 256"]),
            ("  backup:", "  limits: { cpu: 50 }\n  backup:", &["document 2", "spec.limits.cpu", "HINT", "1% to 100%"]),
            (
                "  backup:",
                "  limits: { read: 10kB/s }\n  backup:",
                &["document 2", "spec.limits.read", "HINT", "100kB/s"],
            ),
            ("  backup:", "  limits: { upload: 50MB/s }\n  backup:", &[]),
            ("Europe/Berlin", "Europe/Bern", &["document 2", "spec.backup.time_zone", "Europe/Bern"]),
            ("0 2 * * *", "0 2 * *", &["document 2", "spec.backup.schedule", "HINT"]),
            ("selector: env=prod", "selector: env=", &[]),
            ("selector: env=prod", "selector: env in prod)", &["document 2", "spec.selector", "HINT"]),
            ("data_dir: /var", "data_dir: var", &["document 4", "spec.members[0].data_dir", "absolute"]),
        ];
        for (from, to, says) in table {
            let result = parse(&GOOD.replacen(from, to, 1));
            let Err(error) = result else {
                assert!(says.is_empty(), "{to} was accepted");
                continue;
            };
            let text = error.to_string();
            for part in says {
                assert!(text.contains(part), "{to}: {text:?} lacks {part:?}");
            }
            assert!(text.matches("HINT").count() <= 1, "{text:?}");
        }
    }

    #[test]
    fn the_sample_in_deploy_shows_every_option() {
        let documents = parse(include_str!("../../../deploy/fleet.yaml")).expect("the sample is good");
        let shown: String = documents.iter().map(Document::to_yaml).collect();
        let options = [
            "schedule:",
            "time_zone:",
            "jitter:",
            "compression_level:",
            "processes:",
            "prefer:",
            "fast_checkpoint:",
            "retries:",
            "streaming:",
            "piece_interval:",
            "synchronous:",
            "spool_peer:",
            "without_peer:",
            "compression:",
            "let_go_at:",
            "window:",
            "weekly:",
            "monthly:",
            "yearly:",
            "minimum:",
            "trash:",
            "rpo:",
            "backup_age:",
            "hosts:",
            "cpu:",
            "read:",
            "write:",
            "upload:",
            "download:",
            "selector:",
            "repository:",
            "url:",
            "replica_of:",
            "bandwidth:",
            "retention:",
            "endpoint:",
            "region:",
            "members:",
            "data_dir:",
            "system_identifier:",
            "labels:",
        ];
        for option in options {
            assert!(shown.contains(option), "{option}");
        }
    }

    #[test]
    fn nothing_a_person_can_type_makes_the_parser_panic() {
        for text in ["", "---\n---", "- a", "42", "a: [", "\t", "kind: Policy", "apiVersion: [1]", "&a [*a]", "? {}"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        let doubled = format!("{GOOD}---\napiVersion: walfleet/v1\nkind: Cluster\nname: orders\nspec: {{}}\n");
        assert!(matches!(parse(&doubled), Err(ResourceError::Repeated { document: 5, earlier: 4, .. })));
    }
}
