//! The desired state of one agent, outward.

use bytes::Bytes;
use walfleet_proto::agent::v1 as pb;
use walfleet_repository::limits::{ByteRate, LimitsSpec};
use walfleet_repository::shipping::{Compression, PieceInterval, ShippingSpec, Streaming, Synchronous, WithoutPeer};

use crate::reconcile::desired::{DesiredSpec, Standing};

/// `root_public_key`: that every repository of this fleet must name.
pub fn desired_out(spec: &DesiredSpec, root_public_key: [u8; 32]) -> pb::ControllerMessage {
    let root_public_key = Bytes::copy_from_slice(&root_public_key);
    let repositories = spec.content.repositories.iter().map(|repository| pb::DesiredRepository {
        name: repository.name.clone(),
        url: repository.url.clone(),
        options: repository.options.clone().into_iter().collect(),
        root_public_key: root_public_key.clone(),
    });
    let clusters = spec.content.clusters.iter().map(|cluster| pb::DesiredCluster {
        name: cluster.name.to_string(),
        repository: cluster.repository.clone(),
        data_dir: cluster.data_dir.clone().unwrap_or_default(),
        recipients: cluster
            .recipients
            .iter()
            .map(|recipient| pb::Recipient {
                label: recipient.label.clone(),
                public_key: Bytes::copy_from_slice(&recipient.key.0),
            })
            .collect(),
        compression_level: cluster.compression_level.unwrap_or_default(),
        processes: cluster.processes.unwrap_or_default(),
        member: cluster.standing == Standing::Member,
        system_identifier: cluster.system_identifier.unwrap_or_default(),
        shipping: shipping_out(cluster.shipping),
        relatives: cluster.relatives.iter().map(ToString::to_string).collect(),
        spool_peer: cluster
            .spool_peer
            .as_ref()
            .map(|peer| pb::SpoolPeer { agent: peer.agent.clone(), address: peer.address.clone() }),
    });
    let spools = spec.content.spools.iter().map(|spool| pb::DesiredSpool {
        cluster: spool.cluster.to_string(),
        repository: spool.repository.clone(),
        system_identifier: spool.system_identifier,
        agents: spool.agents.clone(),
    });
    pb::ControllerMessage {
        message: Some(pb::controller_message::Message::Desired(pb::Desired {
            generation: spec.generation,
            repositories: repositories.collect(),
            clusters: clusters.collect(),
            writer_chain: spec.writer_chain.iter().map(|certificate| Bytes::copy_from_slice(certificate)).collect(),
            limits: limits_out(spec.content.limits),
            spools: spools.collect(),
        })),
    }
}

fn shipping_out(shipping: ShippingSpec) -> Option<pb::Shipping> {
    let said = |word: Option<&'static str>| word.unwrap_or_default().to_owned();
    (shipping != ShippingSpec::NONE).then(|| pb::Shipping {
        streaming: said(shipping.streaming.map(Streaming::as_str)),
        piece_interval_ms: shipping.piece_interval.map_or(0, PieceInterval::as_millis),
        synchronous: said(shipping.synchronous.map(Synchronous::as_str)),
        compression: said(shipping.compression.map(Compression::as_str)),
        let_go_at: shipping.let_go_at.map(|limit| limit.to_string()).unwrap_or_default(),
        without_peer: said(shipping.without_peer.map(WithoutPeer::as_str)),
    })
}

fn limits_out(limits: LimitsSpec) -> Option<pb::Limits> {
    let rate = |rate: Option<ByteRate>| rate.map_or(0, ByteRate::bytes_per_second);
    (limits != LimitsSpec::NONE).then(|| pb::Limits {
        cpu_percent: limits.cpu.map_or(0, |share| share.percent().into()),
        read_bytes_per_second: rate(limits.read),
        write_bytes_per_second: rate(limits.write),
        upload_bytes_per_second: rate(limits.upload),
        download_bytes_per_second: rate(limits.download),
    })
}
