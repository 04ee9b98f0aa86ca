//! Real PostgreSQL servers: starting and ending them, talking to them, loading them, and judging what was restored.

pub mod acknowledged;
pub mod barrier;
pub mod dataset;
pub mod fingerprint;
pub mod judge;
pub mod load;
pub mod server;
pub mod session;
pub mod version;

pub use server::{PgServer, ServerBuilder, Shutdown};
pub use session::Session;
pub use version::PgVersion;
