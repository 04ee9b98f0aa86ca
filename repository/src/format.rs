//! Stored objects, one file each: bytes outside, checked values inside.
//!
//! Only these files name generated protobuf types.

pub mod changed_blocks;
pub mod clear;
pub mod collect_plan;
pub mod domain_key;
pub mod file_map;
pub mod gap_note;
pub mod log_entry;
pub mod manifest;
pub mod overlay;
pub mod pack;
pub mod reference;
pub mod root;
pub mod sealed;
pub mod wal_history;
pub mod wal_segment;
pub mod wal_tail;
