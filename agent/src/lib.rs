//! The host's side of walfleet: finds PostgreSQL instances, ships their WAL, takes backups, restores them.

pub mod access;
pub mod archiving;
pub mod backup;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod desired;
pub mod doctor;
pub mod durable;
pub mod facts;
pub mod failure;
pub mod identity;
pub mod jobs;
pub mod journal;
pub mod link;
pub mod metrics;
pub mod postgres;
pub mod progress;
pub mod restore;
pub mod wal;
pub mod wire;
