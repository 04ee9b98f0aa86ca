//! Export and import of the whole state as lines of JSON: for backup, for inspection, and to move between engines.
//!
//! A first line names format and revision, then one line per key, then a last line with the count and a hash of all
//! lines before it, so that a torn export is never taken for a whole one. Leased keys are left out: they speak of
//! running processes. Revisions are not carried over.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};

use super::transaction::{MAX_TXN_BYTES, MAX_TXN_OPS};
use super::{Op, State, StateError, Txn};

const FORMAT: u32 = 1;
/// Stands while an import runs. A state that has it is half a state.
const IMPORT_MARKER: &str = "controller/import-unfinished";
/// Longer than any line we write: a value of 1 MiB in hexadecimal, and its key.
const MAX_LINE_BYTES: u64 = 3 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("write state export")]
    Write(#[source] std::io::Error),
    #[error("read state export, line {line}")]
    Read {
        line: u64,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "state export, line {line}: {problem}\nHINT: only a file written by `walfleet-controller state export`, whole and unchanged, can be imported."
    )]
    Malformed { line: u64, problem: String },
    #[error(
        "the state is not empty, it holds {example:?}\nHINT: import into a new state file; an import replaces nothing."
    )]
    NotEmpty { example: String },
    #[error("an import into this state did not finish\nHINT: delete the state file and import again.")]
    Unfinished,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    walfleet_state: u32,
    revision: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    /// Instead of `value`, where that is not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_hex: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tail {
    keys: u64,
    blake3: String,
}

/// Fails for a state in which an import was cut off. To be asked before anything else uses the state.
pub async fn refuse_unfinished(state: &State) -> Result<(), TransferError> {
    if state.get(IMPORT_MARKER).await?.is_some() { Err(TransferError::Unfinished) } else { Ok(()) }
}

/// Writes every key that has no lease; answers how many.
pub async fn export(state: &State, out: &mut impl Write) -> Result<u64, TransferError> {
    refuse_unfinished(state).await?;
    let mut hasher = blake3::Hasher::new();
    let mut keys = 0;
    let mut page = state.range("", None, 200).await?;
    write_line(out, &mut hasher, &Head { walfleet_state: FORMAT, revision: page.revision })?;
    loop {
        for entry in page.items.iter().filter(|entry| entry.lease.is_none()) {
            let (value, value_hex) = match std::str::from_utf8(&entry.value) {
                Ok(text) => (Some(text.to_owned()), None),
                Err(_) => (None, Some(to_hex(&entry.value))),
            };
            write_line(out, &mut hasher, &Line { key: entry.key.clone(), value, value_hex })?;
            keys += 1;
        }
        let Some(last) = page.items.last().filter(|_| page.more) else { break };
        page = state.range("", Some(&last.key.clone()), 200).await?;
    }
    let blake3 = hasher.finalize().to_hex().to_string();
    write_line(out, &mut hasher, &Tail { keys, blake3 })?;
    out.flush().map_err(TransferError::Write)?;
    Ok(keys)
}

fn write_line(out: &mut impl Write, hasher: &mut blake3::Hasher, line: &impl Serialize) -> Result<(), TransferError> {
    let mut text = serde_json::to_string(line).map_err(|source| TransferError::Write(source.into()))?;
    text.push('\n');
    hasher.update(text.as_bytes());
    out.write_all(text.as_bytes()).map_err(TransferError::Write)
}

/// Reads a whole export into an empty state; answers the number of keys. Cut off in the middle, it leaves a state that
/// [`refuse_unfinished`] refuses.
pub async fn import(state: &State, input: &mut impl BufRead) -> Result<u64, TransferError> {
    if let Some(found) = state.range("", None, 1).await?.items.pop() {
        return Err(match found.key.as_str() {
            IMPORT_MARKER => TransferError::Unfinished,
            _ => TransferError::NotEmpty { example: found.key },
        });
    }
    let mut lines = Lines { input, number: 0, hasher: blake3::Hasher::new() };
    let head: Head = lines.parse(&lines.malformed("it is empty"))?;
    if head.walfleet_state != FORMAT {
        let known = FORMAT;
        return Err(lines.malformed(&format!("it has format {}, this program reads {known}", head.walfleet_state)));
    }
    state.put(IMPORT_MARKER, "").await?;
    let mut batch = Batch::default();
    let mut keys = 0;
    loop {
        let before = lines.hasher.finalize();
        let text = lines.next()?.ok_or_else(|| lines.malformed("it ends without its last line"))?;
        if let Ok(tail) = serde_json::from_str::<Tail>(&text) {
            if tail.keys != keys || tail.blake3 != before.to_hex().as_str() {
                return Err(lines.malformed("its hash or count does not match its lines"));
            }
            break;
        }
        let line: Line = serde_json::from_str(&text).map_err(|source| lines.malformed(&source.to_string()))?;
        let value = match (line.value, line.value_hex) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(hex)) => from_hex(&hex).ok_or_else(|| lines.malformed("value_hex is not hexadecimal"))?,
            _ => return Err(lines.malformed("it has not exactly one of value and value_hex")),
        };
        batch.add(state, line.key, value).await?;
        keys += 1;
    }
    batch.write(state).await?;
    state.txn(Txn::new().then(Op::delete(IMPORT_MARKER))).await?;
    Ok(keys)
}

/// Writes gathered up to the limits of one transaction.
#[derive(Default)]
struct Batch {
    txn: Txn,
    bytes: usize,
}

impl Batch {
    async fn add(&mut self, state: &State, key: String, value: Vec<u8>) -> Result<(), StateError> {
        let bytes = key.len() + value.len();
        if self.txn.then.len() == MAX_TXN_OPS || self.bytes + bytes > MAX_TXN_BYTES {
            self.write(state).await?;
        }
        self.bytes += bytes;
        self.txn.then.push(Op::put(key, value));
        Ok(())
    }

    async fn write(&mut self, state: &State) -> Result<(), StateError> {
        self.bytes = 0;
        state.txn(std::mem::take(&mut self.txn)).await?;
        Ok(())
    }
}

struct Lines<'a, R> {
    input: &'a mut R,
    number: u64,
    hasher: blake3::Hasher,
}

impl<R: BufRead> Lines<'_, R> {
    fn next(&mut self) -> Result<Option<String>, TransferError> {
        self.number += 1;
        let mut text = String::new();
        let line = self.number;
        let read = std::io::Read::take(&mut *self.input, MAX_LINE_BYTES)
            .read_line(&mut text)
            .map_err(|source| TransferError::Read { line, source })?;
        if read > 0 && !text.ends_with('\n') {
            return Err(self.malformed("it is cut off"));
        }
        self.hasher.update(text.as_bytes());
        Ok(Some(text).filter(|_| read > 0))
    }

    fn parse<T: for<'de> Deserialize<'de>>(&mut self, at_end: &TransferError) -> Result<T, TransferError> {
        let text = self.next()?.ok_or_else(|| self.malformed(&at_end.to_string()))?;
        serde_json::from_str(&text).map_err(|source| self.malformed(&source.to_string()))
    }

    fn malformed(&self, problem: &str) -> TransferError {
        TransferError::Malformed { line: self.number, problem: problem.to_owned() }
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::embedded::Options;
    use super::*;

    fn open(folder: &tempfile::TempDir, name: &str) -> State {
        State::open(&folder.path().join(name), Options::default()).unwrap()
    }

    #[tokio::test]
    async fn an_export_imports_to_the_same_keys_without_leased_ones() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(&folder, "a");
        for i in 0..450 {
            state.put(format!("key/{i}"), format!("{{\"n\":{i},\"ü\":\"\\n\"}}")).await.unwrap();
        }
        state.put("bytes", vec![0u8, 255, 10, 13]).await.unwrap();
        state.put("large", vec![255u8; 1 << 20]).await.unwrap();
        let lease = state.grant(Duration::from_secs(60)).await.unwrap();
        state.txn(Txn::new().then(Op::put_leased("leased", "", lease))).await.unwrap();
        let mut file = Vec::new();
        assert_eq!(export(&state, &mut file).await.unwrap(), 452);

        let other = open(&folder, "b");
        assert_eq!(import(&other, &mut file.as_slice()).await.unwrap(), 452);
        let pairs = |entries: Vec<super::super::KeyValue>| {
            entries
                .into_iter()
                .map(|entry| (entry.key, entry.value))
                .filter(|(key, _)| key != "leased")
                .collect::<Vec<_>>()
        };
        assert_eq!(pairs(state.list("").await.unwrap().0), pairs(other.list("").await.unwrap().0));
        refuse_unfinished(&other).await.unwrap();
        let again = import(&other, &mut file.as_slice()).await;
        assert!(matches!(again, Err(TransferError::NotEmpty { .. })));
    }

    #[tokio::test]
    async fn a_torn_or_altered_export_leaves_a_state_that_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(&folder, "a");
        for i in 0..5 {
            state.put(format!("key/{i}"), "value").await.unwrap();
        }
        let mut file = Vec::new();
        export(&state, &mut file).await.unwrap();
        let text = String::from_utf8(file).unwrap();
        let without_a_line = text.lines().filter(|line| !line.contains("key/3")).map(|line| format!("{line}\n"));
        let torn: Vec<String> = vec![
            text[..text.len() - 2].to_owned(),
            text.lines().take(4).map(|line| format!("{line}\n")).collect(),
            without_a_line.collect(),
            text.replacen("value\":\"value", "value\":\"other", 1),
        ];
        for (number, torn) in torn.iter().enumerate() {
            let other = open(&folder, &format!("torn-{number}"));
            let error = import(&other, &mut torn.as_bytes()).await.unwrap_err();
            assert!(matches!(error, TransferError::Malformed { .. }), "{error}");
            assert!(matches!(refuse_unfinished(&other).await, Err(TransferError::Unfinished)));
            assert!(matches!(import(&other, &mut text.as_bytes()).await, Err(TransferError::Unfinished)));
        }
    }
}
