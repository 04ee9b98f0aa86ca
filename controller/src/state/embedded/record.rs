//! The bytes of a stored entry and of a change in the log. Integers are big-endian; a file with another layout has
//! another number under "format".

use bytes::Bytes;

use crate::state::{Event, KeyValue, LeaseId, StateError};

/// create revision, modification revision, version, lease (0: none).
const HEAD: usize = 4 * 8;
const PUT: u8 = 1;
const DELETE: u8 = 2;

pub(super) fn encode(entry: &KeyValue) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + entry.value.len());
    for field in [entry.create_revision, entry.mod_revision, entry.version, entry.lease.map_or(0, |lease| lease.0)] {
        bytes.extend_from_slice(&field.to_be_bytes());
    }
    bytes.extend_from_slice(&entry.value);
    bytes
}

pub(super) fn decode(key: &str, bytes: &[u8]) -> Result<KeyValue, StateError> {
    let damaged = || StateError::Damaged { key: key.to_owned(), what: "its head is cut off" };
    let (head, value) = bytes.split_at_checked(HEAD).ok_or_else(damaged)?;
    let mut fields = head.chunks_exact(8).map(|field| field.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte)));
    let mut next = || fields.next().ok_or_else(damaged);
    Ok(KeyValue {
        key: key.to_owned(),
        create_revision: next()?,
        mod_revision: next()?,
        version: next()?,
        lease: Some(next()?).filter(|lease| *lease != 0).map(LeaseId),
        value: Bytes::copy_from_slice(value),
    })
}

/// A change: what kind, the key's length (two bytes: keys are at most 1 KiB), the key, and for a put the entry.
pub(super) fn encode_put(entry: &KeyValue) -> Vec<u8> {
    let mut bytes = change(PUT, &entry.key);
    bytes.extend_from_slice(&encode(entry));
    bytes
}

pub(super) fn encode_delete(key: &str) -> Vec<u8> {
    change(DELETE, key)
}

fn change(kind: u8, key: &str) -> Vec<u8> {
    let length = u16::try_from(key.len()).expect("keys are at most MAX_KEY_BYTES long, checked by Txn::validate");
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(key.as_bytes());
    bytes
}

pub(super) fn decode_change(revision: u64, bytes: &[u8]) -> Result<Event, StateError> {
    let damaged = || StateError::Damaged { key: format!("change of revision {revision}"), what: "it does not parse" };
    let (&[kind, high, low], rest) = bytes.split_first_chunk::<3>().ok_or_else(damaged)?;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low]))).ok_or_else(damaged)?;
    let key = std::str::from_utf8(key).map_err(|_| damaged())?;
    match kind {
        PUT => Ok(Event::Put { revision, entry: decode(key, rest)? }),
        DELETE => Ok(Event::Delete { revision, key: key.to_owned() }),
        _ => Err(damaged()),
    }
}
