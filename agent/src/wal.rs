//! WAL on its way into the archive and back out of it.
//!
//! `wal push` and `wal fetch` are short-lived processes that Postgres starts. [`client`] is all they are: a push asks the
//! running agent over its [`socket`], whose [`ship`] reads ahead, uploads in parallel and answers for what is durable;
//! a fetch reads the archive itself ([`fetch`]), so that a restored server recovers with no agent running.

pub mod client;
pub mod fetch;
pub mod read;
pub mod ship;
pub mod socket;

pub use socket::serve;
