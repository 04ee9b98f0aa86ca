//! What commands show: serde structs whose field names are the JSON contract, each with its page for people.
//!
//! Nothing here knows the wire. Times are RFC 3339 UTC, sizes bytes, durations seconds, WAL positions text; what is not
//! known is null, never zero or empty.

pub mod agent;
pub mod audit;
pub mod backup;
pub mod change;
pub mod cluster;
pub mod context;
pub mod cost;
pub mod found;
pub mod garbage;
pub mod hold;
pub mod job;
pub mod replica;
pub mod resource;
pub mod restore;
pub mod retention;
pub mod status;
pub mod token;
pub mod verify;
pub mod version;
pub mod wal;

/// PostgreSQL's number for people: 160004 is 16.4, 90624 is 9.6.24 (PG_VERSION_NUM, src/include/pg_config.h). 160000
/// is 16: so agents say it of a server that they know by its PG_VERSION file alone.
pub fn server_version(number: u32) -> String {
    if number >= 100_000 && number.is_multiple_of(10_000) {
        format!("{}", number / 10_000)
    } else if number >= 100_000 {
        format!("{}.{}", number / 10_000, number % 10_000)
    } else {
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::server_version;

    #[test]
    fn a_version_says_no_more_than_is_known() {
        let shown = [180_001, 150_000, 90_624].map(server_version);
        assert_eq!(shown, ["18.1", "15", "9.6.24"]);
    }
}
