//! `kind: Cluster`: labels for a cluster, and, where wanted, exactly which instances may belong to it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use walfleet_repository::postgres::SystemId;

use super::document::{Spec, SpecFault};

#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSpec {
    /// Instead of the policy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// Only these may belong. Absent: every agent that declares an instance of the pinned system identifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<MemberSpec>>,
    /// Replaces the system identifier pinned when the cluster was first seen: to be set after `pg_upgrade`.
    /// Text, since JSON and YAML readers round numbers of this size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberSpec {
    pub agent: String,
    /// Absent: as the agent's own configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<String>,
}

impl ClusterSpec {
    /// `validate` has passed, so it is absent only if none is declared.
    pub fn system_identifier(&self) -> Option<SystemId> {
        self.system_identifier.as_deref().and_then(|text| text.parse().ok()).map(SystemId)
    }

    /// `None` if the members are not declared.
    pub fn admits(&self, agent: &str) -> Option<bool> {
        self.members.as_ref().map(|members| members.iter().any(|member| member.agent == agent))
    }
}

impl Spec for ClusterSpec {
    fn validate(&self) -> Result<(), SpecFault> {
        if self.repository.as_deref() == Some("") {
            return Err(SpecFault::new("repository", "it is empty", "name a declared Repository, or leave it out."));
        }
        if let Some(text) = &self.system_identifier
            && !text.parse::<u64>().is_ok_and(|id| id > 0)
        {
            let hint = "write it as pg_controldata does, in quotes: \"7412345678901234567\".";
            return Err(SpecFault::new("system_identifier", format!("{text:?} is not one"), hint));
        }
        let mut seen = BTreeSet::new();
        for (i, member) in self.members.iter().flatten().enumerate() {
            if member.agent.is_empty() {
                return Err(SpecFault::new(format!("members[{i}].agent"), "it is empty", "name an agent."));
            }
            if !seen.insert(&member.agent) {
                let problem = format!("agent {:?} is named twice", member.agent);
                return Err(SpecFault::new(format!("members[{i}].agent"), problem, "name each agent once."));
            }
            if let Some(data_dir) = member.data_dir.as_deref().filter(|path| !path.starts_with('/')) {
                let path = format!("members[{i}].data_dir");
                return Err(SpecFault::new(path, format!("{data_dir:?} is not absolute"), "write an absolute path."));
            }
        }
        Ok(())
    }
}
