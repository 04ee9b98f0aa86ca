//! What tests of several modules take as seen of an agent; they say what is different.

use std::collections::BTreeMap;

use walfleet_repository::ids::RecipientId;

use super::observed::{HelloObserved, InstanceObserved, InstanceRole};

/// A primary of which nothing is archived yet.
pub fn instance(cluster: &str, system_identifier: u64) -> InstanceObserved {
    InstanceObserved {
        cluster: cluster.to_owned(),
        system_identifier,
        server_version_num: 170_000,
        role: InstanceRole::Primary,
        data_dir: format!("/data/{system_identifier}"),
        port: 5432,
        timeline: 1,
        current_lsn: None,
        cluster_bytes: 0,
        data_checksums: true,
        archive: None,
        windows: vec![],
        backups: vec![],
        problems: vec![],
        tablespaces: BTreeMap::new(),
    }
}

pub fn hello() -> HelloObserved {
    HelloObserved {
        version: "1".to_owned(),
        incarnation: "a".to_owned(),
        hostname: "h".to_owned(),
        labels: BTreeMap::new(),
        recipient: RecipientId([1; 32]),
        capabilities: vec![],
    }
}
