//! Whole-system tests: one binary, because each links for seconds; a module per subject.

mod barrier;
mod servers;
mod store;
