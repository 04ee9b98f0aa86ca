//! Jobs: what this host was asked to do, and what came of it.

pub mod order;
pub mod report;
