//! The contracts: gRPC services between agents, controller and operators, and the protobuf messages of stored objects.
//!
//! Nothing here decides anything. Generated types are named only by each crate's `wire` module (in `repository`:
//! `format/`), which converts them, fallibly inward and totally outward.

/// Messages of stored objects (`../../docs/format.md`).
#[allow(rustdoc::invalid_html_tags, reason = "comments of .proto files are plain text")]
pub mod repository {
    pub mod v1 {
        tonic::include_proto!("walfleet.repository.v1");
    }
}

/// Targets, windows and backup summaries, shared by all services.
pub mod recovery {
    pub mod v1 {
        tonic::include_proto!("walfleet.recovery.v1");
    }
}

/// Orders to agents, progress and outcomes.
pub mod job {
    pub mod v1 {
        tonic::include_proto!("walfleet.job.v1");
    }
}

/// Enrolment and the agents' stream.
#[allow(clippy::large_enum_variant, reason = "a message holds one of them, and is decoded and let go")]
pub mod agent {
    pub mod v1 {
        tonic::include_proto!("walfleet.agent.v1");
    }
}

/// What agents keep for each other.
pub mod spool {
    pub mod v1 {
        tonic::include_proto!("walfleet.spool.v1");
    }
}

/// What operators call.
#[allow(rustdoc::invalid_html_tags, reason = "comments of .proto files are plain text")]
pub mod operator {
    pub mod v1 {
        tonic::include_proto!("walfleet.operator.v1");
    }
}

pub mod telemetry;
