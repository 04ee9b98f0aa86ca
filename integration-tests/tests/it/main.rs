//! Whole-system tests: one binary, because each links for seconds; a module per subject.

mod admission;
mod bad_input;
mod barrier;
mod branches;
mod chains;
mod copies;
mod costs;
mod crashes;
mod damage;
mod delta_restores;
mod failover;
mod fleet;
mod full_disks;
mod killed_restores;
mod limits;
mod matrix;
mod repository_on_s3;
mod restore_targets;
mod servers;
mod setting_up;
mod store;
mod takeover;
mod trace;
