//! PostgreSQL as the agent meets it: its servers, its data directories, its WAL and its pages.
//!
//! Everything read here is foreign: files may be torn, servers may lie or vanish, and each such case has its own error.

mod bytes;
pub mod relation;
pub mod wal_record;
