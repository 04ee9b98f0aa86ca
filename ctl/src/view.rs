//! What commands show: serde structs whose field names are the JSON contract, each with its page for people.
//!
//! Nothing here knows the wire. Times are RFC 3339 UTC, sizes bytes, durations seconds, WAL positions text; what is not
//! known is null, never zero or empty.

pub mod agent;
pub mod backup;
pub mod change;
pub mod cluster;
pub mod context;
pub mod job;
pub mod resource;
pub mod restore;
pub mod status;
pub mod token;
pub mod verify;
pub mod version;
pub mod wal;

/// PostgreSQL's number for people: 160004 is 16.4, 90624 is 9.6.24 (PG_VERSION_NUM, src/include/pg_config.h).
pub fn server_version(number: u32) -> String {
    if number >= 100_000 {
        format!("{}.{}", number / 10_000, number % 10_000)
    } else {
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    }
}
