//! WAL on its way into the archive and back out of it.
//!
//! [`receive`] streams what the server flushes; [`branches`] says where in the archive it goes. `wal push` and `wal fetch` are short-lived processes that Postgres starts.
//! [`client`] is all they are: a push asks the running agent over its [`socket`], whose [`ship`] reads ahead, uploads in
//! parallel and answers for what is durable; a fetch reads the archive itself ([`fetch`]), so that a restored server recovers
//! with no agent running, and [`prefetch`] goes ahead of it. [`fill`] brings what neither brought,
//! [`breaks`] remembers what was let go of ([`let_go`]) or lost, and [`find`] says what a stretch of WAL did.

pub mod branches;
pub mod breaks;
pub mod client;
pub mod fetch;
pub mod fill;
pub mod find;
pub mod let_go;
pub mod prefetch;
pub mod read;
pub mod receive;
pub mod ship;
pub mod socket;

pub use socket::serve;
