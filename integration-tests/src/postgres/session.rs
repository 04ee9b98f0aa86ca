//! One SQL session, used from plain threads; every value comes as PostgreSQL's text.

use anyhow::Context;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::block_on;

pub struct Session {
    client: Client,
}

/// A row of texts; NULL is None.
pub type Row = Vec<Option<String>>;

impl Session {
    pub fn open(parameters: &str) -> anyhow::Result<Session> {
        block_on(async {
            let (client, connection) = tokio_postgres::connect(parameters, NoTls).await?;
            // It ends with the client, or with the server: then the next query says so.
            tokio::spawn(connection);
            Ok::<_, tokio_postgres::Error>(Session { client })
        })
        .with_context(|| format!("connect to {parameters}"))
    }

    /// Runs one or more statements.
    pub fn execute(&self, sql: &str) -> anyhow::Result<()> {
        block_on(self.client.batch_execute(sql)).with_context(|| format!("execute {sql}"))
    }

    pub fn rows(&self, sql: &str) -> anyhow::Result<Vec<Row>> {
        let messages = block_on(self.client.simple_query(sql)).with_context(|| format!("query {sql}"))?;
        let texts = |message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
            }
            _ => None,
        };
        Ok(messages.into_iter().filter_map(texts).collect())
    }

    /// The first column of every row, NULL left out.
    pub fn column(&self, sql: &str) -> anyhow::Result<Vec<String>> {
        Ok(self.rows(sql)?.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
    }

    /// The only value of the only row.
    pub fn value(&self, sql: &str) -> anyhow::Result<String> {
        let rows = self.rows(sql)?;
        match rows.as_slice() {
            [row] => match row.as_slice() {
                [Some(value)] => Ok(value.clone()),
                other => anyhow::bail!("{sql} gave {other:?} instead of one value"),
            },
            other => anyhow::bail!("{sql} gave {} rows instead of one", other.len()),
        }
    }

    pub fn number(&self, sql: &str) -> anyhow::Result<i64> {
        self.value(sql)?.parse().with_context(|| format!("{sql} gives a number"))
    }

    pub fn is_true(&self, sql: &str) -> anyhow::Result<bool> {
        Ok(self.value(sql)? == "t")
    }
}
