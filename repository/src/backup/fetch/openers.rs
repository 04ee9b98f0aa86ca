//! Ranges of packs and what opens them: every pack has a key of its own, made from its header, which is asked for once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OnceCell;

use super::Range;
use crate::backup::read::{PackKeys, ReadError, opener};
use crate::format::sealed::{HEADER_LEN, Opener};
use crate::ids::PackId;
use crate::keyring::Keyring;
use crate::store::Store;

/// A range that begins so near to the pack's start brings the header along: cheaper than to ask twice.
const HEADER_GAP: u64 = 1 << 20;

type Known = Arc<OnceCell<Arc<Opener>>>;

pub(super) struct Openers {
    store: Store,
    keys: Arc<Keyring>,
    packs: Arc<PackKeys>,
    known: Mutex<HashMap<PackId, Known>>,
}

impl Openers {
    pub fn new(store: Store, keys: Arc<Keyring>, packs: Arc<PackKeys>) -> Openers {
        Openers { store, keys, packs, known: Mutex::default() }
    }

    /// The range's bytes and what opens them. May widen the range to its pack's start.
    pub async fn fetch(&self, range: &mut Range) -> Result<(Arc<Opener>, Bytes), ReadError> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).entry(range.pack).or_default().clone();
        if range.start > HEADER_GAP || known.initialized() {
            // A pack's first range is under way before its others: its header is most likely here when this range is.
            let bytes = self.get(range.pack, range.start, range.end).await?;
            let header = || async {
                let header = self.get(range.pack, 0, HEADER_LEN as u64).await?;
                self.opener(range.pack, &header)
            };
            return Ok((known.get_or_try_init(header).await?.clone(), bytes));
        }
        let mut widened = None;
        let opener = known
            .get_or_try_init(|| async {
                let bytes = self.get(range.pack, 0, range.end).await?;
                let opener = self.opener(range.pack, &bytes)?;
                widened = Some(bytes);
                Ok::<_, ReadError>(opener)
            })
            .await?
            .clone();
        match widened {
            Some(bytes) => {
                range.start = 0;
                Ok((opener, bytes))
            }
            None => Ok((opener, self.get(range.pack, range.start, range.end).await?)),
        }
    }

    async fn get(&self, pack: PackId, start: u64, end: u64) -> Result<Bytes, ReadError> {
        let key = self.packs.get(&pack).ok_or(ReadError::UnknownPack(pack))?;
        self.store.get_range(key, start..end).await.map_err(|source| ReadError::Store { what: "pack", source })
    }

    fn opener(&self, pack: PackId, header: &[u8]) -> Result<Arc<Opener>, ReadError> {
        let opened = opener(header, &self.keys);
        Ok(Arc::new(opened.map_err(|source| ReadError::Sealed { object: format!("pack {pack}"), source })?))
    }
}
