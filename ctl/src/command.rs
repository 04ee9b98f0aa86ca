//! The commands, one file per noun: a file's path is what an operator types.

pub mod agent;
pub mod apply;
pub mod audit;
pub mod backup;
pub mod cluster;
pub mod completions;
pub mod context;
pub mod diff;
pub mod hold;
pub mod job;
pub mod login;
pub mod policy;
pub mod replica;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod status;
pub mod token;
pub mod version;
pub mod wal;
