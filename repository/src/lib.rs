//! The stored format and its engine.

pub mod backup;
pub mod cluster;
pub mod cluster_log;
pub mod crypto;
pub mod format;
pub mod ids;
pub mod key_file;
pub mod keyring;
pub mod layout;
pub mod open;
pub mod postgres;
pub mod recovery_window;
pub mod signature;
pub mod store;
pub mod verify;
pub mod wal_archive;
pub mod wal_catalog;
