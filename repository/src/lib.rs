//! The stored format and its engine.

pub mod ids;
pub mod postgres;
