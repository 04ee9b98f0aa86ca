//! The agents' stream: the call itself, messages outward, messages inward.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use walfleet_proto::agent::v1 as proto;
use walfleet_repository::limits::{ByteRate, CpuShare, LimitsSpec};
use walfleet_repository::shipping::{PieceInterval, ShippingSpec};

use super::{Reader, WireError, outcome};
use crate::desired::{Desired, DesiredCluster, DesiredRepository, DesiredSpool, Recipient, SpoolPeer};
use crate::link::message::{FromController, Hello, ToController, Welcome};

const WELCOME: Reader = Reader { message: "welcome" };
const DESIRED: Reader = Reader { message: "desired state" };
const CANCEL: Reader = Reader { message: "cancel order" };
const RECEIVED: Reader = Reader { message: "outcome received" };

/// Of the protocol that this agent speaks.
const PROTOCOL_VERSION: u32 = 1;

/// A desired state with thousands of clusters is a few MiB; tonic's default of 4 MiB would cut a fleet off silently.
const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// The controller's half of an open stream.
pub struct Attached(Streaming<proto::ControllerMessage>);

/// Opens the stream. Messages put into `outbound`'s sender go out in order.
pub async fn attach(channel: Channel, outbound: mpsc::Receiver<ToController>) -> Result<Attached, Status> {
    let mut client =
        proto::agent_link_client::AgentLinkClient::with_interceptor(channel, walfleet_proto::telemetry::inject)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let messages = ReceiverStream::new(outbound).map(|message| agent_message(&message));
    Ok(Attached(client.attach(messages).await?.into_inner()))
}

impl Attached {
    /// `Ok(None)` when the controller closed the stream. Safe to drop while it waits.
    pub async fn next(&mut self) -> Result<Option<Result<FromController, WireError>>, Status> {
        Ok(self.0.message().await?.map(controller_message))
    }
}

fn agent_message(message: &ToController) -> proto::AgentMessage {
    use proto::agent_message::Message;
    let message = match message {
        ToController::Hello(hello) => Message::Hello(self::hello(hello)),
        ToController::Heartbeat { at, running } => Message::Heartbeat(proto::Heartbeat {
            at_us: at.as_microsecond(),
            running: running.iter().map(outcome::running_entry).collect(),
        }),
        ToController::Facts(facts) => Message::Facts(super::facts::facts(facts)),
        ToController::JobAnswer { job, attempt, fencing_token, refusal } => Message::JobAnswer(proto::JobAnswer {
            job: job.to_string(),
            attempt: *attempt,
            fencing_token: *fencing_token,
            accepted: refusal.is_none(),
            reason: refusal.as_ref().map(|refusal| refusal.reason.clone()).unwrap_or_default(),
            busy: refusal.as_ref().is_some_and(|refusal| refusal.busy),
        }),
        ToController::Progress { at, running } => Message::Progress(outcome::progress(running, *at)),
        ToController::Outcome(outcome) => Message::Outcome(outcome::outcome(outcome)),
    };
    proto::AgentMessage { message: Some(message) }
}

fn hello(hello: &Hello) -> proto::Hello {
    proto::Hello {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: hello.incarnation.clone(),
        labels: hello.labels.clone().into_iter().collect(),
        hostname: hello.hostname.clone(),
        journal: hello.journal.iter().map(outcome::journal_entry).collect(),
        recipient: hello.recipient.to_vec().into(),
        capabilities: hello.capabilities.iter().map(|name| (*name).to_owned()).collect(),
        spool_address: hello.spool_address.clone().unwrap_or_default(),
    }
}

fn controller_message(message: proto::ControllerMessage) -> Result<FromController, WireError> {
    use proto::controller_message::Message;
    let empty = Reader { message: "controller message" };
    Ok(match message.message.ok_or(empty.missing("content"))? {
        Message::Welcome(welcome) => FromController::Welcome(self::welcome(welcome)?),
        Message::Desired(desired) => FromController::Desired(Box::new(self::desired(desired)?)),
        Message::Offer(order) => {
            // What does not read cannot be run, but it can be answered: the controller must not wait for its lease.
            let (job, attempt, fencing_token) = (order.job.clone(), order.attempt, order.fencing_token);
            match super::job::order(order) {
                Ok(order) => FromController::Offer(Box::new(order)),
                Err(error) => {
                    let Ok(job) = job.parse() else { return Err(error) };
                    FromController::Unreadable { job, attempt, fencing_token, reason: error.to_string() }
                }
            }
        }
        Message::Cancel(cancel) => {
            FromController::Cancel { job: CANCEL.parse("job", &cancel.job)?, fencing_token: cancel.fencing_token }
        }
        Message::OutcomeReceived(received) => FromController::OutcomeReceived {
            job: RECEIVED.parse("job", &received.job)?,
            fencing_token: received.fencing_token,
        },
        Message::HeartbeatSeen(_) => FromController::HeartbeatSeen,
    })
}

fn welcome(welcome: proto::Welcome) -> Result<Welcome, WireError> {
    // A zero would make a busy loop; a day of silence would look like a dead agent.
    let seconds = |field, value: u32| {
        if (1..=86_400).contains(&value) {
            Ok(Duration::from_secs(value.into()))
        } else {
            Err(WELCOME.value(field, value, "it is 1 to 86400"))
        }
    };
    Ok(Welcome {
        controller: welcome.controller,
        heartbeat: seconds("heartbeat_seconds", welcome.heartbeat_seconds)?,
        facts_interval: seconds("facts_interval_seconds", welcome.facts_interval_seconds)?,
        leader_epoch: welcome.leader_epoch,
    })
}

/// A limit that cannot be read must not pass for none.
fn limits(limits: proto::Limits) -> Result<LimitsSpec, WireError> {
    let rate = |field, rate: u64| match rate {
        0 => Ok(None),
        rate => {
            let known = ByteRate::from_bytes_per_second(rate);
            known.map(Some).ok_or_else(|| DESIRED.value(field, rate, "it is 100 kB/s to 1000 GB/s"))
        }
    };
    let cpu = match limits.cpu_percent {
        0 => None,
        percent => {
            let share = CpuShare::from_percent(percent);
            Some(share.ok_or_else(|| DESIRED.value("limits.cpu_percent", percent, "it is 1 to 100"))?)
        }
    };
    Ok(LimitsSpec {
        cpu,
        read: rate("limits.read_bytes_per_second", limits.read_bytes_per_second)?,
        write: rate("limits.write_bytes_per_second", limits.write_bytes_per_second)?,
        upload: rate("limits.upload_bytes_per_second", limits.upload_bytes_per_second)?,
        download: rate("limits.download_bytes_per_second", limits.download_bytes_per_second)?,
    })
}

fn shipping(shipping: proto::Shipping) -> Result<ShippingSpec, WireError> {
    let said = |text: &String| !text.is_empty();
    let streaming = Some(shipping.streaming).filter(said);
    let synchronous = Some(shipping.synchronous).filter(said);
    let compression = Some(shipping.compression).filter(said);
    let let_go_at = Some(shipping.let_go_at).filter(said);
    let without_peer = Some(shipping.without_peer).filter(said);
    Ok(ShippingSpec {
        streaming: streaming.map(|text| DESIRED.parse("clusters.shipping.streaming", &text)).transpose()?,
        piece_interval: PieceInterval::from_millis(shipping.piece_interval_ms),
        compression: compression.map(|text| DESIRED.parse("clusters.shipping.compression", &text)).transpose()?,
        synchronous: synchronous.map(|text| DESIRED.parse("clusters.shipping.synchronous", &text)).transpose()?,
        let_go_at: let_go_at.map(|text| DESIRED.parse("clusters.shipping.let_go_at", &text)).transpose()?,
        // The controller has chosen.
        spool_peer: None,
        without_peer: without_peer.map(|text| DESIRED.parse("clusters.shipping.without_peer", &text)).transpose()?,
    })
}

fn desired(desired: proto::Desired) -> Result<Desired, WireError> {
    let spool = |spool: proto::DesiredSpool| {
        Ok(DesiredSpool {
            cluster: DESIRED.parse("spools.cluster", &spool.cluster)?,
            repository: DESIRED.text("spools.repository", spool.repository)?,
            system_identifier: spool.system_identifier,
            agents: spool.agents,
        })
    };
    let repository = |repository: proto::DesiredRepository| {
        Ok(DesiredRepository {
            name: DESIRED.text("repositories.name", repository.name)?,
            url: DESIRED.text("repositories.url", repository.url)?,
            options: repository.options.into_iter().collect(),
            root_public_key: DESIRED.bytes32("repositories.root_public_key", &repository.root_public_key)?,
        })
    };
    let recipient = |recipient: proto::Recipient| {
        let public_key = DESIRED.bytes32("clusters.recipients.public_key", &recipient.public_key)?;
        Ok(Recipient { label: recipient.label, public_key })
    };
    let cluster = |cluster: proto::DesiredCluster| {
        let relatives = cluster.relatives.iter().map(|name| DESIRED.parse("clusters.relatives", name));
        let relatives = relatives.collect::<Result<_, WireError>>()?;
        Ok(DesiredCluster {
            name: DESIRED.parse("clusters.name", &cluster.name)?,
            repository: DESIRED.text("clusters.repository", cluster.repository)?,
            data_dir: Some(cluster.data_dir).filter(|path| !path.is_empty()).map(Into::into),
            recipients: cluster.recipients.into_iter().map(recipient).collect::<Result<_, WireError>>()?,
            compression_level: Some(cluster.compression_level).filter(|level| (1..=19).contains(level)),
            processes: Some(cluster.processes).filter(|processes| *processes != 0),
            member: cluster.member,
            shipping: cluster.shipping.map(shipping).transpose()?.unwrap_or_default(),
            relatives: (cluster.system_identifier != 0).then_some(relatives),
            spool_peer: cluster.spool_peer.map(|peer| SpoolPeer { agent: peer.agent, address: peer.address }),
        })
    };
    Ok(Desired {
        generation: desired.generation,
        repositories: desired.repositories.into_iter().map(repository).collect::<Result<_, WireError>>()?,
        clusters: desired.clusters.into_iter().map(cluster).collect::<Result<_, WireError>>()?,
        writer_chain: desired.writer_chain.into_iter().map(|bytes| bytes.to_vec()).collect(),
        limits: desired.limits.map(limits).transpose()?.unwrap_or_default(),
        spools: desired.spools.into_iter().map(spool).collect::<Result<_, WireError>>()?,
    })
}
