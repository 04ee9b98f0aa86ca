//! Pieces that the repository lacks, in their order, for the link to bring to the peer: from the first on, if that holds none of
//! them any more. What is on this host's disk need not be held in memory as well.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::PieceNumbers;
use super::files::{Lies, SpoolError};
use super::message::NumberedPiece;
use crate::tasks::on_disk;

/// What is held in memory at most of pieces that are on disk, too.
const MEMORY_BYTES: usize = 16 << 20;

#[derive(Default)]
pub struct Outbox {
    entries: Mutex<Entries>,
    /// The newest piece, and up to where they were let go of.
    newest: watch::Sender<u64>,
    released: watch::Sender<u64>,
}

#[derive(Default)]
struct Entries {
    queue: VecDeque<Entry>,
    memory: usize,
}

#[derive(Clone)]
struct Entry {
    number: u64,
    numbers: PieceNumbers,
    sealed: Option<Bytes>,
    lies: Option<Lies>,
}

/// A piece, or where to read it.
pub enum Outgoing {
    Here(NumberedPiece),
    OnDisk { number: u64, numbers: PieceNumbers, lies: Lies },
}

impl Outbox {
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    pub fn released(&self) -> watch::Receiver<u64> {
        self.released.subscribe()
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, number: u64, numbers: PieceNumbers, sealed: Bytes) {
        let mut entries = self.entries();
        entries.memory += sealed.len();
        entries.queue.push_back(Entry { number, numbers, sealed: Some(sealed), lies: None });
        drop(entries);
        self.newest.send_replace(number);
    }

    /// A piece is on disk.
    pub fn lies(&self, number: u64, lies: Lies) {
        let mut guard = self.entries();
        let entries = &mut *guard;
        let first = entries.queue.front().map_or(0, |entry| entry.number);
        // Numbers follow each other without a hole.
        let index = number.checked_sub(first).and_then(|index| usize::try_from(index).ok());
        if let Some(entry) = index.and_then(|index| entries.queue.get_mut(index)) {
            entry.lies = Some(lies);
        }
        let mut memory = entries.memory;
        for entry in entries.queue.iter_mut().take_while(|entry| entry.lies.is_some()) {
            if memory <= MEMORY_BYTES {
                break;
            }
            memory -= entry.sealed.take().map_or(0, |sealed| sealed.len());
        }
        entries.memory = memory;
    }

    pub fn release(&self, number: u64) {
        let mut entries = self.entries();
        while let Some(entry) = entries.queue.pop_front_if(|entry| entry.number <= number) {
            entries.memory -= entry.sealed.map_or(0, |sealed| sealed.len());
        }
        drop(entries);
        self.released.send_if_modified(|released| {
            let moved = *released < number;
            *released = number.max(*released);
            moved
        });
    }

    /// The next ones behind a number.
    pub fn behind(&self, number: u64, most: usize) -> Vec<Outgoing> {
        let entries = self.entries();
        let from = entries.queue.partition_point(|entry| entry.number <= number);
        let next = entries.queue.range(from..).take(most);
        let outgoing = next.filter_map(|entry| {
            let Entry { number, numbers, .. } = *entry;
            match (&entry.sealed, &entry.lies) {
                (Some(sealed), _) => Some(Outgoing::Here(NumberedPiece { number, numbers, sealed: sealed.clone() })),
                (None, Some(lies)) => Some(Outgoing::OnDisk { number, numbers, lies: lies.clone() }),
                (None, None) => None,
            }
        });
        outgoing.collect()
    }
}

impl Outgoing {
    pub fn number(&self) -> u64 {
        match self {
            Outgoing::Here(piece) => piece.number,
            Outgoing::OnDisk { number, .. } => *number,
        }
    }

    /// An error too if it was let go of meanwhile.
    pub async fn read(self) -> Result<NumberedPiece, SpoolError> {
        match self {
            Outgoing::Here(piece) => Ok(piece),
            Outgoing::OnDisk { number, numbers, lies } => {
                let sealed = on_disk(move || lies.read()).await?;
                Ok(NumberedPiece { number, numbers, sealed })
            }
        }
    }
}
