//! Whole-system tests: one binary, because each links for seconds; a module per subject.

mod barrier;
mod matrix;
mod repository_on_s3;
mod servers;
mod store;
