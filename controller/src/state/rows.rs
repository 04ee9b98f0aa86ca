//! Typed rows over the state: JSON values with the revision that compare-and-swap needs. Knows no row's meaning.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Compare, KeyValue, Op, State, StateError, Txn};

/// A value as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row<T> {
    pub key: String,
    pub value: T,
    pub create_revision: u64,
    pub mod_revision: u64,
}

impl<T> Row<T> {
    /// Holds while nobody else wrote the row.
    pub fn unchanged(&self) -> Compare {
        Compare::unchanged(self.key.clone(), self.mod_revision)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RowError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("read state row {key:?} as {kind}\nHINT: it was written by another version, or by hand.")]
    Decode {
        key: String,
        kind: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("write state row {key:?} as {kind}")]
    Encode {
        key: String,
        kind: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("state row {key:?} exists already")]
    Exists { key: String },
    #[error("state row {key:?} does not exist")]
    Absent { key: String },
    /// Somebody else wrote the row first: read again and decide again.
    #[error("state row {key:?} was changed by somebody else")]
    Conflict { key: String },
}

/// Reads a raw entry as a row.
pub fn decode<T: DeserializeOwned>(entry: &KeyValue) -> Result<Row<T>, RowError> {
    let value = serde_json::from_slice(&entry.value).map_err(|source| RowError::Decode {
        key: entry.key.clone(),
        kind: std::any::type_name::<T>(),
        source,
    })?;
    Ok(Row { key: entry.key.clone(), value, create_revision: entry.create_revision, mod_revision: entry.mod_revision })
}

/// The operation that writes a row, for use in transactions over several.
pub fn put_row<T: Serialize>(key: impl Into<String>, value: &T) -> Result<Op, RowError> {
    let key = key.into();
    match serde_json::to_vec(value) {
        Ok(bytes) => Ok(Op::put(key, bytes)),
        Err(source) => Err(RowError::Encode { key, kind: std::any::type_name::<T>(), source }),
    }
}

/// Attempts of [`State::modify_row`] before it gives up: conflicts are rare and short.
const MODIFY_ATTEMPTS: usize = 32;

impl State {
    pub async fn row<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Row<T>>, RowError> {
        self.get(key).await?.as_ref().map(decode).transpose()
    }

    /// All rows under a prefix and the revision to watch from (plus one).
    pub async fn rows<T: DeserializeOwned>(&self, prefix: &str) -> Result<(Vec<Row<T>>, u64), RowError> {
        let (entries, revision) = self.list(prefix).await?;
        Ok((entries.iter().map(decode).collect::<Result<_, _>>()?, revision))
    }

    /// Creates; [`RowError::Exists`] if the key is taken. Answers the new row's revision.
    pub async fn create_row<T: Serialize>(&self, key: &str, value: &T) -> Result<u64, RowError> {
        let outcome = self.txn(Txn::new().when(Compare::absent(key)).then(put_row(key, value)?)).await?;
        if outcome.succeeded { Ok(outcome.revision) } else { Err(RowError::Exists { key: key.to_owned() }) }
    }

    /// Writes if nobody did since `mod_revision` (0: since it was absent), else [`RowError::Conflict`].
    pub async fn update_row<T: Serialize>(&self, key: &str, mod_revision: u64, value: &T) -> Result<u64, RowError> {
        let unchanged = Compare::unchanged(key, mod_revision);
        let outcome = self.txn(Txn::new().when(unchanged).then(put_row(key, value)?)).await?;
        if outcome.succeeded { Ok(outcome.revision) } else { Err(RowError::Conflict { key: key.to_owned() }) }
    }

    /// Reads, changes and writes until nobody interferes. `change` may run several times.
    pub async fn modify_row<T, F>(&self, key: &str, mut change: F) -> Result<Row<T>, RowError>
    where
        T: Serialize + DeserializeOwned,
        F: FnMut(&mut T),
    {
        for _ in 0..MODIFY_ATTEMPTS {
            let mut row: Row<T> = self.row(key).await?.ok_or_else(|| RowError::Absent { key: key.to_owned() })?;
            change(&mut row.value);
            match self.update_row(key, row.mod_revision, &row.value).await {
                Ok(revision) => {
                    row.mod_revision = revision;
                    return Ok(row);
                }
                Err(RowError::Conflict { .. }) => continue,
                Err(error) => return Err(error),
            }
        }
        Err(RowError::Conflict { key: key.to_owned() })
    }

    /// Deletes the row as it was read, else [`RowError::Conflict`].
    pub async fn delete_row<T>(&self, row: &Row<T>) -> Result<(), RowError> {
        let outcome = self.txn(Txn::new().when(row.unchanged()).then(Op::delete(row.key.clone()))).await?;
        if outcome.succeeded { Ok(()) } else { Err(RowError::Conflict { key: row.key.clone() }) }
    }
}
