//! The controller decides for the whole fleet: who may join, what is backed up when, what is kept. It sends decisions
//! and gets facts; bulk data and data keys never pass through it, and its loss stops no WAL.
//!
//! Rooms, from the ground up: `state` (the ordered key-value store everything durable lives in), `identity` (certificates,
//! tokens, roles), `audit` (who changed what), `resources` and `policy` (what people declare), `schedule`, `jobs` and
//! `fleet` (what is seen and what is to be done), `reconcile` and `keeper` (the loops), `api` (what agents and operators
//! call), `serve` (the door). `wire` alone names generated protobuf types for the domain; `identity::api` does so for
//! enrolment and access.

pub mod api;
pub mod audit;
pub mod cli;
pub mod config;
pub mod fleet;
pub mod identity;
pub mod jobs;
pub mod keeper;
pub mod metrics;
pub mod policy;
pub mod reconcile;
pub mod resources;
pub mod schedule;
pub mod serve;
pub mod state;
pub mod wire;

/// An error and its causes in one line, for those who are not shown the log.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<_> = causes.map(ToString::to_string).collect();
    // A transparent wrapper says what its source says.
    texts.dedup();
    texts.join(": ")
}
