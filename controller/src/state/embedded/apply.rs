//! What a request does to the tables, within one redb transaction that others may share. A storage failure aborts them
//! all; an answer to the caller alone comes before anything is written.

use redb::{ReadableTable, Table, WriteTransaction};

use super::{KV, LEASE, LEASE_KEY, LOG, META, record};
use crate::state::{Compare, KeyValue, LeaseId, Op, OpResponse, StateError, Txn, TxnOutcome};

/// The open tables of one redb transaction.
pub(super) struct Tables<'t> {
    kv: Table<'t, &'static str, &'static [u8]>,
    log: Table<'t, (u64, u32), &'static [u8]>,
    pub(super) lease: Table<'t, u64, u64>,
    lease_key: Table<'t, (u64, &'static str), ()>,
    pub(super) meta: Table<'t, &'static str, u64>,
    pub(super) revision: u64,
}

impl<'t> Tables<'t> {
    pub(super) fn open(write: &'t WriteTransaction, revision: u64) -> Result<Self, redb::Error> {
        Ok(Self {
            kv: write.open_table(KV)?,
            log: write.open_table(LOG)?,
            lease: write.open_table(LEASE)?,
            lease_key: write.open_table(LEASE_KEY)?,
            meta: write.open_table(META)?,
            revision,
        })
    }

    fn find(&self, key: &str) -> Result<Result<Option<KeyValue>, StateError>, redb::Error> {
        Ok(self.kv.get(key)?.map(|found| record::decode(key, found.value())).transpose())
    }

    /// Decides before it writes: an answer with an error has changed nothing.
    pub(super) fn txn(
        &mut self,
        txn: Txn,
        lease_lives: impl Fn(LeaseId) -> bool,
    ) -> Result<Result<TxnOutcome, StateError>, redb::Error> {
        let mut succeeded = true;
        for compare in &txn.compares {
            match self.find(Compare::key(compare))? {
                Ok(found) => succeeded &= compare.holds(found.as_ref()),
                Err(damaged) => return Ok(Err(damaged)),
            }
        }
        let ops = if succeeded { txn.then } else { txn.or_else };
        for op in &ops {
            // A damaged entry is found here, before the first write.
            if let Err(damaged) = self.find(op.key())? {
                return Ok(Err(damaged));
            }
            if let Op::Put { lease: Some(lease), .. } = op
                && !lease_lives(*lease)
            {
                return Ok(Err(StateError::LeaseNotFound { lease: *lease }));
            }
        }
        let revision = self.revision + 1;
        let mut changes = 0;
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let before = match self.find(op.key())? {
                Ok(before) => before,
                Err(damaged) => return Ok(Err(damaged)),
            };
            responses.push(match op {
                Op::Get { .. } => OpResponse::Get(before),
                Op::Put { key, value, lease } => {
                    let create_revision = before.as_ref().map_or(revision, |before| before.create_revision);
                    let version = before.as_ref().map_or(1, |before| before.version + 1);
                    let entry = KeyValue { key, value, create_revision, mod_revision: revision, version, lease };
                    self.put(before.and_then(|before| before.lease), entry, &mut changes)?;
                    OpResponse::Put
                }
                Op::Delete { key } => {
                    if let Some(before) = &before {
                        self.delete(&key, before.lease, revision, &mut changes)?;
                    }
                    OpResponse::Delete { existed: before.is_some() }
                }
            });
        }
        if changes > 0 {
            self.revision = revision;
        }
        Ok(Ok(TxnOutcome { succeeded, revision: self.revision, responses }))
    }

    fn put(&mut self, old_lease: Option<LeaseId>, entry: KeyValue, changes: &mut u32) -> Result<(), redb::Error> {
        if let Some(old) = old_lease.filter(|old| Some(*old) != entry.lease) {
            self.lease_key.remove((old.0, entry.key.as_str()))?;
        }
        if let Some(lease) = entry.lease {
            self.lease_key.insert((lease.0, entry.key.as_str()), ())?;
        }
        self.kv.insert(entry.key.as_str(), record::encode(&entry).as_slice())?;
        self.log.insert((entry.mod_revision, *changes), record::encode_put(&entry).as_slice())?;
        *changes += 1;
        Ok(())
    }

    fn delete(
        &mut self,
        key: &str,
        lease: Option<LeaseId>,
        revision: u64,
        changes: &mut u32,
    ) -> Result<(), redb::Error> {
        if let Some(lease) = lease {
            self.lease_key.remove((lease.0, key))?;
        }
        self.kv.remove(key)?;
        self.log.insert((revision, *changes), record::encode_delete(key).as_slice())?;
        *changes += 1;
        Ok(())
    }

    /// Deletes the lease and its keys, in one revision.
    pub(super) fn end_lease(&mut self, lease: LeaseId) -> Result<(), redb::Error> {
        let mut keys = Vec::new();
        for entry in self.lease_key.range((lease.0, "")..)? {
            let (key, _) = entry?;
            let (of, key) = key.value();
            if of != lease.0 {
                break;
            }
            keys.push(key.to_owned());
        }
        let revision = self.revision + 1;
        let mut changes = 0;
        for key in keys {
            self.delete(&key, Some(lease), revision, &mut changes)?;
        }
        if changes > 0 {
            self.revision = revision;
        }
        self.lease.remove(lease.0)?;
        Ok(())
    }

    pub(super) fn compacted(&self) -> Result<u64, redb::Error> {
        Ok(self.meta.get("compacted")?.map_or(0, |found| found.value()))
    }

    /// Forgets changes up to and including `revision`; going back is no error and does nothing.
    pub(super) fn compact(&mut self, revision: u64) -> Result<(), redb::Error> {
        if revision <= self.compacted()? {
            return Ok(());
        }
        self.log.retain_in(..=(revision, u32::MAX), |_, _| false)?;
        self.meta.insert("compacted", revision)?;
        Ok(())
    }
}
