//! The host's side of walfleet: finds PostgreSQL instances, ships their WAL, takes backups, restores them.
//!
//! One process per host, as the user that owns the data directories; and the same program as a few commands, which do the
//! same work without it. Production comes first: the agent may fall behind, the server may not be hurt. It answers
//! PostgreSQL only for what the store has confirmed, and it does not take the controller's word for what it can see itself.
//!
//! Rooms, from the ground up:
//! - `postgres`: the server and its files, as facts. `durable`, `journal`, `desired`, `identity`: what survives a restart.
//! - `access`: which clusters and repositories this host may use, and with which keys; the one place that opens them.
//! - `wal`: segments in ([`wal::ship`]) and out ([`wal::fetch`]). `archiving` and `streaming` say
//!   who ships for which data directory.
//! - `backup` and `restore`: the long operations, a file for each step.
//! - `limits`: how much of the host all of that may take, and how it makes way for Postgres.
//! - `jobs`: what is asked of this host, run once and journalled, whoever asks: a controller, or a person at the command line.
//! - `facts`, `doctor`, `metrics`: what is told. `link`: the stream to the controller. `daemon`: which tasks there are and
//!   in which order they end. `estimate` and `history`: what jobs will take, from what they took. `progress`: how far one is.
//!   `spool`: what two hosts keep until the repository has it. `cli`: arguments in, exit codes out. `memory`: how the allocator treats large buffers. `tasks`: waiting for work that runs elsewhere.
//!
//! `wire` alone names generated protobuf types. The host's two contracts with PostgreSQL are the exit codes of `wal push`
//! and `wal fetch` ([`wal::client`]).

pub mod access;
pub mod archiving;
pub mod backup;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod desired;
pub mod doctor;
pub mod durable;
pub mod estimate;
pub mod facts;
pub mod failure;
pub mod history;
pub mod identity;
pub mod jobs;
pub mod journal;
pub mod limits;
pub mod link;
pub mod memory;
pub mod metrics;
pub mod postgres;
pub mod progress;
pub mod restore;
pub mod spool;
pub mod streaming;
pub mod tasks;
pub mod wal;
pub mod wire;
