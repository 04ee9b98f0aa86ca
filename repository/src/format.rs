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

use crate::postgres::{Branch, SystemId, Timeline, WalBranch};

/// A branch as messages name it.
fn wal_branch(system_identifier: u64, timeline: u32, branch: &[u8]) -> Result<WalBranch, String> {
    Ok(WalBranch {
        system_id: SystemId(system_identifier),
        timeline: Timeline::new(timeline).map_err(|error| error.to_string())?,
        branch: Branch(branch.try_into().map_err(|_| "a branch has 8 bytes")?),
    })
}
