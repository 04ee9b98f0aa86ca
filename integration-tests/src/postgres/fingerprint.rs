//! What a database holds, table by table, in a form that two servers can be compared by.
//!
//! Per table: the number of rows and two sums of 64-bit hashes of the rows' texts, which do not depend on the order of
//! rows on disk. Left out: sequences (WAL runs 32 values ahead of them: SEQ_LOG_VALS, commands/sequence.c) and unlogged
//! tables (empty after recovery by design).

use std::collections::BTreeMap;

use super::Session;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fingerprint(BTreeMap<String, String>);

/// Permanent tables and materialised views of users; what the harness keeps for itself is left out.
const TABLES: &str = "
    SELECT format('%I.%I', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND c.relispopulated
      AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'walfleet_test') AND n.nspname NOT LIKE 'pg_toast%'
    ORDER BY 1";

/// A row's text must not depend on where it is read.
const RENDERING: &str = "SET datestyle = 'ISO, MDY'; SET timezone = 'UTC'; SET extra_float_digits = 1;
    SET bytea_output = 'hex'; SET intervalstyle = 'postgres'";

impl Fingerprint {
    /// Of the session's database, within the session's transaction if it has one.
    pub fn take(session: &Session) -> anyhow::Result<Fingerprint> {
        session.execute(RENDERING)?;
        let mut tables = session.column(TABLES)?;
        tables.push("pg_catalog.pg_largeobject".to_owned());
        let one_table = |table: &String| {
            format!(
                "SELECT '{}', count(*) || ' rows, hash ' || coalesce(sum(hashtextextended(this_row::text, 0)::numeric), 0) \
                 || ' ' || coalesce(sum(hashtextextended(this_row::text, 1)::numeric), 0) FROM {table} AS this_row",
                table.replace('\'', "''")
            )
        };
        let all = tables.iter().map(one_table).collect::<Vec<_>>().join(" UNION ALL ");
        let rows = session.rows(&all)?;
        let pair = |row: super::session::Row| match <[Option<String>; 2]>::try_from(row) {
            Ok([Some(table), Some(state)]) => Ok((table, state)),
            other => anyhow::bail!("a fingerprint's row is {other:?}"),
        };
        Ok(Fingerprint(rows.into_iter().map(pair).collect::<anyhow::Result<_>>()?))
    }

    /// Fails and names every table that differs.
    pub fn must_equal(&self, expected: &Fingerprint) -> anyhow::Result<()> {
        let tables: std::collections::BTreeSet<&String> = self.0.keys().chain(expected.0.keys()).collect();
        let absent = "absent".to_owned();
        let differences: Vec<String> = tables
            .into_iter()
            .map(|table| (table, self.0.get(table).unwrap_or(&absent), expected.0.get(table).unwrap_or(&absent)))
            .filter(|(_, found, expected)| found != expected)
            .map(|(table, found, expected)| format!("  {table}: {found}\n    expected: {expected}"))
            .collect();
        anyhow::ensure!(differences.is_empty(), "tables differ:\n{}", differences.join("\n"));
        Ok(())
    }
}
