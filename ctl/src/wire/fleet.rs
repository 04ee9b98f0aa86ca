//! What the fleet looks like.

use walfleet_proto::agent::v1 as agent_proto;
use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::fleet_client::FleetClient;

use super::recovery::window;
use super::{moment, number, text};
use crate::client::{CallError, Client, LARGEST_ANSWER, Transport};
use crate::view::agent::{Agent, Archive, Instance, Role, Spool, Stream, Tablespace};
use crate::view::backup::Backup;
use crate::view::cluster::{Cluster, Member, Protection};
use crate::view::server_version;
use crate::view::status::Status;

impl Client {
    fn fleet(&self) -> FleetClient<Transport> {
        FleetClient::new(self.transport()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub async fn status(&self) -> Result<Status, CallError> {
        let request = self.request(proto::StatusRequest {});
        let reply = self.fleet().status(request).await.map_err(self.failed("show status"))?.into_inner();
        Ok(Status {
            controller: reply.controller,
            controller_version: reply.controller_version,
            as_of: moment(reply.as_of_us),
            clusters: reply.clusters.into_iter().map(Cluster::from).collect(),
            agents: reply.agents.into_iter().map(Agent::from).collect(),
            notices: reply.notices,
        })
    }

    pub async fn clusters(&self, selector: &str) -> Result<Vec<Cluster>, CallError> {
        let request = self.request(proto::ListClustersRequest { selector: selector.to_owned() });
        let reply = self.fleet().list_clusters(request).await.map_err(self.failed("list clusters"))?;
        Ok(reply.into_inner().clusters.into_iter().map(Cluster::from).collect())
    }

    pub async fn cluster(&self, name: &str) -> Result<Cluster, CallError> {
        let request = self.request(proto::GetClusterRequest { name: name.to_owned() });
        let reply = self.fleet().get_cluster(request).await.map_err(self.failed("show cluster"))?;
        Ok(Cluster::from(reply.into_inner()))
    }

    pub async fn agents(&self, selector: &str) -> Result<Vec<Agent>, CallError> {
        let request = self.request(proto::ListAgentsRequest { selector: selector.to_owned() });
        let reply = self.fleet().list_agents(request).await.map_err(self.failed("list agents"))?;
        Ok(reply.into_inner().agents.into_iter().map(Agent::from).collect())
    }

    pub async fn agent(&self, name: &str) -> Result<Agent, CallError> {
        let request = self.request(proto::GetAgentRequest { name: name.to_owned() });
        let reply = self.fleet().get_agent(request).await.map_err(self.failed("show agent"))?;
        Ok(Agent::from(reply.into_inner()))
    }

    pub async fn backups(&self, cluster: &str) -> Result<Vec<Backup>, CallError> {
        let request = self.request(proto::ListBackupsRequest { cluster: cluster.to_owned() });
        let reply = self.fleet().list_backups(request).await.map_err(self.failed("list backups"))?;
        Ok(reply.into_inner().backups.into_iter().map(Backup::from).collect())
    }

    pub async fn backup(&self, id: &str) -> Result<Backup, CallError> {
        let request = self.request(proto::GetBackupRequest { id: id.to_owned() });
        let reply = self.fleet().get_backup(request).await.map_err(self.failed("show backup"))?;
        Ok(Backup::from(reply.into_inner()))
    }
}

impl From<proto::ClusterView> for Cluster {
    fn from(wire: proto::ClusterView) -> Cluster {
        let state = match wire.state() {
            proto::ProtectionState::Protected => Protection::Protected,
            proto::ProtectionState::AtRisk => Protection::AtRisk,
            proto::ProtectionState::Unprotected => Protection::Unprotected,
            proto::ProtectionState::Unknown | proto::ProtectionState::Unspecified => Protection::Unknown,
        };
        let lag = Some(wire.lag_seconds).filter(|lag| *lag >= 0.0 && lag.is_finite());
        // The lag is measured against the cluster's own repository; another one's is not known here.
        let only = wire.windows.len() == 1;
        let own = wire.repository.clone();
        let recovery = wire.windows.into_iter().map(|wire| {
            let measured = only || wire.repository == own;
            window(wire, if measured { lag } else { None })
        });
        Cluster {
            recovery: recovery.collect(),
            system_identifier: number(wire.system_identifier).map(|id| id.to_string()),
            state,
            reason: text(wire.reason),
            last_backup: wire.last_backup.map(Backup::from),
            // No service tells of drills yet.
            last_drill: None,
            next_backup_at: moment(wire.next_backup_us),
            policy: text(wire.policy),
            repository: text(wire.repository),
            labels: wire.labels.into_iter().collect(),
            server_version: number(wire.server_version_num).map(server_version),
            cluster_bytes: number(wire.cluster_bytes),
            members: wire.members.into_iter().map(Member::from).collect(),
            name: wire.name,
        }
    }
}

impl From<proto::Member> for Member {
    fn from(wire: proto::Member) -> Member {
        Member {
            agent: wire.agent,
            connected: wire.connected,
            facts_at: moment(wire.facts_at_us),
            instance: wire.facts.map(Instance::from),
        }
    }
}

impl From<agent_proto::InstanceFacts> for Instance {
    fn from(wire: agent_proto::InstanceFacts) -> Instance {
        let role = match wire.role() {
            agent_proto::InstanceRole::Primary => Role::Primary,
            agent_proto::InstanceRole::Standby => Role::Standby,
            agent_proto::InstanceRole::Down => Role::Down,
            agent_proto::InstanceRole::Unspecified => Role::Unknown,
        };
        let space =
            |space: agent_proto::Tablespace| Tablespace { oid: space.oid, name: space.name, location: space.location };
        Instance {
            cluster: text(wire.cluster),
            role,
            server_version: number(wire.server_version_num).map(server_version),
            system_identifier: number(wire.system_identifier).map(|id| id.to_string()),
            data_dir: wire.data_dir,
            port: wire.port,
            timeline: number(wire.timeline),
            current_lsn: text(wire.current_lsn),
            cluster_bytes: number(wire.cluster_bytes),
            data_checksums: wire.data_checksums,
            archive: wire.archive.map(Archive::from),
            tablespaces: wire.tablespaces.into_iter().map(space).collect(),
            problems: wire.problems,
        }
    }
}

impl From<agent_proto::StreamFacts> for Stream {
    fn from(wire: agent_proto::StreamFacts) -> Stream {
        Stream {
            phase: wire.phase,
            problem: text(wire.problem),
            store_error: text(wire.store_error),
            received_lsn: text(wire.received_lsn),
            complete_until: moment(wire.complete_until_us),
            pieces: wire.pieces,
            segments: wire.segments,
            piece_interval_seconds: wire.piece_interval_ms as f64 / 1000.0,
            synchronous: wire.synchronous,
            spool: wire.spool.map(Spool::from),
        }
    }
}

impl From<agent_proto::SpoolFacts> for Spool {
    fn from(wire: agent_proto::SpoolFacts) -> Spool {
        Spool {
            peer: text(wire.peer),
            waits_for: wire.waits_for,
            problem: text(wire.problem),
            written_lsn: text(wire.written_lsn),
            held_bytes: wire.held_bytes,
        }
    }
}

impl From<agent_proto::ArchiveFacts> for Archive {
    fn from(wire: agent_proto::ArchiveFacts) -> Archive {
        Archive {
            archive_command_set: wire.archive_command_set,
            last_segment: text(wire.last_segment),
            durable_lsn: text(wire.durable_lsn),
            durable_at: moment(wire.durable_at_us),
            ready_segments: wire.ready_segments,
            failed_count: wire.failed_count,
            last_error: text(wire.last_error),
            pg_wal_bytes: wire.pg_wal_bytes,
            pg_wal_free_bytes: wire.pg_wal_free_bytes,
            stream: wire.stream.map(Stream::from),
            pg_wal_full_in_seconds: number(wire.pg_wal_full_in_seconds),
            requests_last_hour: wire.requests_last_hour,
            stored_bytes_last_hour: wire.stored_bytes_last_hour,
        }
    }
}

impl From<proto::AgentView> for Agent {
    fn from(wire: proto::AgentView) -> Agent {
        Agent {
            name: wire.name,
            hostname: wire.hostname,
            labels: wire.labels.into_iter().collect(),
            version: wire.version,
            connected: wire.connected,
            last_seen_at: moment(wire.last_seen_us),
            joined_at: moment(wire.joined_at_us),
            certificate_not_after: moment(wire.certificate_not_after_us),
            instances: wire.instances.into_iter().map(Instance::from).collect(),
            running_jobs: wire.running_jobs,
        }
    }
}
