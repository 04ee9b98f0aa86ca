//! `kind: Repository`: a place, and how to reach it. Never a credential: agents and controller take those from their
//! own environment, so that no host can read another's here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use walfleet_repository::limits::ByteRate;

use super::document::{Spec, SpecFault};
use super::retention_spec::RetentionSpec;
use super::span::Span;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositorySpec {
    /// `file:///srv/walfleet` or `s3://bucket/prefix`.
    pub url: String,
    /// See `OPTIONS`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// It is a second place of this repository: what comes there is brought here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_of: Option<String>,
    /// What a replica keeps. Absent: everything that was brought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionSpec>,
    /// How far a replica may trail. Absent: nothing is promised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo: Option<Span>,
    /// What bringing backups and older WAL may take of the network, so that the newest WAL and others have room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<ByteRate>,
}

impl RepositorySpec {
    /// A place, and nothing more.
    pub fn at(url: &str) -> RepositorySpec {
        RepositorySpec {
            url: url.to_owned(),
            options: BTreeMap::new(),
            replica_of: None,
            retention: None,
            rpo: None,
            bandwidth: None,
        }
    }
}

/// Those of `walfleet_repository::store::StoreOptions` that are no secrets.
const OPTIONS: [&str; 6] = ["endpoint", "region", "allow_http", "virtual_hosted_style", "checksum", "sse_kms_key_id"];

/// Parts of option names that only credentials have.
const SECRET_WORDS: [&str; 9] =
    ["secret", "password", "passwd", "token", "credential", "access_key", "account_key", "sas", "private"];

const CREDENTIALS_HINT: &str = "credentials never stand in documents: give them to each agent and to the controller in their environment or files.";

fn looks_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase().replace('-', "_");
    SECRET_WORDS.iter().any(|word| match *word {
        // Too short to look for inside other words.
        "sas" => key.split('_').any(|part| part == "sas"),
        word => key.contains(word) || key.replace('_', "").contains(&word.replace('_', "")),
    })
}

impl Spec for RepositorySpec {
    fn validate(&self) -> Result<(), SpecFault> {
        let form = "write file:///absolute/path or s3://bucket/prefix.";
        let fault = |problem: &str| Err(SpecFault::new("url", format!("{:?} {problem}", self.url), form));
        if self.url.len() > 1024 || self.url.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return fault("has white space or is longer than 1024 bytes");
        }
        if let Some(path) = self.url.strip_prefix("file://") {
            if !path.starts_with('/') {
                return fault("does not name an absolute path");
            }
            if path.split('/').any(|part| part == "..") {
                return fault("leads upwards");
            }
        } else if let Some(place) = self.url.strip_prefix("s3://") {
            if place.contains('@') || place.contains('?') {
                let problem = format!("a user, a password or a query stands in {:?}", "s3://…");
                return Err(SpecFault::new("url", problem, CREDENTIALS_HINT));
            }
            let bucket = place.split('/').next().unwrap_or_default();
            if bucket.is_empty() {
                return fault("names no bucket");
            }
        } else {
            return fault("is not the address of a repository");
        }
        for key in self.options.keys() {
            let path = format!("options.{key}");
            if looks_secret(key) {
                return Err(SpecFault::new(path, "this is the name of a credential", CREDENTIALS_HINT));
            }
            if !OPTIONS.contains(&key.as_str()) {
                let hint = format!("{} are accepted.", OPTIONS.join(", "));
                return Err(SpecFault::new(path, "this option is not known", hint));
            }
        }
        self.validate_replica()
    }
}

impl RepositorySpec {
    fn validate_replica(&self) -> Result<(), SpecFault> {
        if self.replica_of.as_deref() == Some("") {
            return Err(SpecFault::new("replica_of", "it is empty", "name a declared Repository, or leave it out."));
        }
        let of_replicas = [
            ("retention", self.retention.is_some()),
            ("rpo", self.rpo.is_some()),
            ("bandwidth", self.bandwidth.is_some()),
        ];
        if let Some((path, _)) = of_replicas.iter().find(|(_, is_said)| *is_said && self.replica_of.is_none()) {
            let hint = "say replica_of, or say it in the policies of the clusters that lie there.";
            return Err(SpecFault::new(*path, "only replicas have it", hint));
        }
        if self.rpo == Some(Span::ZERO) {
            return Err(SpecFault::new(
                "rpo",
                "0s is out of range",
                "at least 1s is accepted; leave it out if nothing is promised.",
            ));
        }
        self.retention.as_ref().map_or(Ok(()), RetentionSpec::validate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(url: &str, option: Option<&str>) -> RepositorySpec {
        let options = option.map(|key| (key.to_owned(), "x".to_owned())).into_iter().collect();
        RepositorySpec { options, ..RepositorySpec::at(url) }
    }

    #[test]
    fn credentials_are_refused_wherever_they_are_put() {
        for key in ["secret_access_key", "AWS_SECRET_ACCESS_KEY", "accessKeyId", "session-token", "password", "sas"] {
            assert!(spec("s3://b/p", Some(key)).validate().is_err(), "{key}");
        }
        assert!(spec("s3://key:secret@b/p", None).validate().is_err());
        for key in OPTIONS {
            assert!(spec("s3://b/p", Some(key)).validate().is_ok(), "{key}");
        }
        assert!(spec("s3://b/p", Some("endpiont")).validate().is_err());
    }

    #[test]
    fn only_replicas_have_what_replicas_have() {
        let replica = RepositorySpec { replica_of: Some("main".to_owned()), ..RepositorySpec::at("file:///b") };
        let said = RepositorySpec { rpo: Some(Span::minutes(5)), retention: Some(RetentionSpec::least()), ..replica };
        assert!(said.validate().is_ok());
        assert!(RepositorySpec { replica_of: None, ..said.clone() }.validate().is_err());
        assert!(RepositorySpec { rpo: Some(Span::ZERO), ..said.clone() }.validate().is_err());
        assert!(RepositorySpec { replica_of: Some(String::new()), ..said }.validate().is_err());
    }

    #[test]
    fn only_addresses_of_repositories_are_accepted() {
        for good in ["file:///srv/walfleet", "s3://bucket", "s3://bucket/a/b"] {
            assert!(spec(good, None).validate().is_ok(), "{good}");
        }
        for bad in ["", "file://srv", "file:///a/../b", "s3://", "s3:///p", "http://x", "/srv", "s3://b /p"] {
            assert!(spec(bad, None).validate().is_err(), "{bad}");
        }
    }
}
