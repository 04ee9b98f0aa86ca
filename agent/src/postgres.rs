//! PostgreSQL as the agent meets it: its servers, its data directories, its WAL and its pages.
//!
//! Everything read here is foreign: files may be torn, servers may lie or vanish, and each such case has its own error.

pub mod backup_label;
mod bytes;
pub mod control;
pub mod instance;
pub mod page;
pub mod relation;
pub mod replication;
pub mod server;
#[cfg(test)]
pub(crate) mod test_server;
pub mod wal_record;
