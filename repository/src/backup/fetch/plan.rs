//! The one that walks the list: makes files at the sink, gathers pieces by window, and sends what the sink has not as
//! ranges. It reads lists and maps, never content.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::laid::LaidFile;
use super::sift::{self, Sifted, Window, ZeroRun};
use super::{COALESCE_GAP, FetchError, FileNumber, Found, Goes, Piece, PieceFile, PieceSink, Range};
use crate::backup::read::{BackupReader, ReadError};
use crate::format::manifest::{Content, EntryKind};
use crate::ids::PackId;

/// Plain bytes gathered before they are sorted by pack: the more, the fewer and larger the ranges.
const WINDOW_BYTES: u64 = 1 << 30;

/// The first window is so much smaller, and each twice the one before: making files takes its time, and meanwhile there
/// is something to fetch and open.
const FIRST_WINDOW_BYTES: u64 = 32 << 20;

pub(super) struct Plan<'a> {
    reader: &'a BackupReader,
    sink: &'a Arc<dyn PieceSink>,
    threads: usize,
    /// Stored bytes of one range at most.
    range_bytes: u64,
    stop: &'a CancellationToken,
    /// Of the present window.
    window_bytes: u64,
    /// The last ranges of the window before, kept back so that there is something to open while held pages come.
    back: Vec<Range>,
    pub kept_bytes: u64,
}

impl<'a> Plan<'a> {
    pub fn new(
        reader: &'a BackupReader,
        sink: &'a Arc<dyn PieceSink>,
        (threads, range_bytes): (usize, u64),
        stop: &'a CancellationToken,
    ) -> Plan<'a> {
        Plan {
            reader,
            sink,
            threads,
            range_bytes,
            stop,
            window_bytes: FIRST_WINDOW_BYTES,
            back: Vec::new(),
            kept_bytes: 0,
        }
    }

    /// Announces every entry to the sink and sends ranges; returns the number of entries.
    pub async fn ranges(&mut self, sender: mpsc::Sender<Range>) -> Result<u64, FetchError> {
        let mut number: FileNumber = 0;
        let mut window = Window::new(self.window_bytes);
        for part in &self.reader.manifest.file_list {
            for entry in self.reader.file_list_part(part).await? {
                let found = self.sink.entry(number, &entry).map_err(FetchError::Sink)?;
                if let EntryKind::File { size, content, .. } = &entry.kind {
                    let file = PieceFile { number, path: entry.path.clone() };
                    self.gather(file, found, *size, content, &mut window, &sender).await?;
                }
                number += 1;
                if window.is_full() {
                    let filled = self.filled(&mut window);
                    self.send(filled, &sender).await?;
                }
            }
        }
        self.send(window, &sender).await?;
        send_all(std::mem::take(&mut self.back), &sender).await;
        Ok(number)
    }

    async fn gather(
        &mut self,
        file: PieceFile,
        found: Found,
        size: u64,
        content: &Content,
        window: &mut Window,
        sender: &mpsc::Sender<Range>,
    ) -> Result<(), FetchError> {
        match content {
            Content::Empty => {}
            Content::Zero => window.zero(&file, found, 0, size),
            Content::Chunk(place) => window.push(Piece { file, place: *place, goes: Goes::Whole(0), found }),
            Content::Map(place) => {
                let map = self.reader.file_map(place).await?;
                if found == Found::Nothing {
                    map.for_each_filled(|offset, len| self.sink.expect(&file, offset, len));
                }
                if found == Found::Nothing && !map.overlays.is_empty() {
                    let mut file = LaidFile::new(file, map).map_err(ReadError::Map)?;
                    while !file.gather(window) {
                        let filled = self.filled(window);
                        self.send(filled, sender).await?;
                    }
                    return Ok(());
                }
                let pieces =
                    map.for_each_chunk(|place, runs| window.push(Piece::new(file.clone(), found, *place, runs)));
                pieces.map_err(ReadError::Map)?;
                let zeros = map.for_each_zero(|offset, len| window.zero(&file, found, offset, len));
                zeros.map_err(ReadError::Map)?;
            }
        }
        Ok(())
    }

    /// The window, and a larger one in its place.
    fn filled(&mut self, window: &mut Window) -> Window {
        self.window_bytes = (2 * self.window_bytes).min(WINDOW_BYTES);
        std::mem::replace(window, Window::new(self.window_bytes))
    }

    /// Sends what the sink has not as ranges, all but the last of a window with held pages.
    async fn send(&mut self, mut window: Window, sender: &mpsc::Sender<Range>) -> Result<(), FetchError> {
        let is_laid = !window.held.is_empty();
        let (laid, held) = (window.laid.clone(), std::mem::take(&mut window.held));
        laid.expect(held.len());
        let is_heard = send_all(coalesce(held, self.range_bytes), sender).await
            && send_all(std::mem::take(&mut self.back), sender).await;
        if !is_heard {
            return Ok(());
        }
        laid.wait().await;
        let pieces = match window.found {
            false => window.pieces,
            true => {
                let (sink, keys) = (self.sink.clone(), self.reader.keys().clone());
                let (threads, stop) = (self.threads, self.stop.clone());
                let sifting =
                    tokio::task::spawn_blocking(move || sift::sift(window, &*sink, keys.newest(), threads, &stop));
                let Sifted { missing, not_zero, kept_bytes } = sifting.await.map_err(|_| FetchError::Lost)??;
                self.kept_bytes += kept_bytes;
                for ZeroRun { file, offset, len } in not_zero {
                    let zeros = vec![0; len as usize];
                    self.sink.write(&file, offset, &zeros).map_err(FetchError::Sink)?;
                }
                missing
            }
        };
        let mut ranges = coalesce(pieces, self.range_bytes);
        if is_laid {
            self.back = ranges.split_off(ranges.len() / 2);
        }
        send_all(ranges, sender).await;
        Ok(())
    }
}

/// False if nobody listens any more: an error is on record then, or a thread was lost.
async fn send_all(ranges: Vec<Range>, sender: &mpsc::Sender<Range>) -> bool {
    for range in ranges {
        if sender.send(range).await.is_err() {
            return false;
        }
    }
    true
}

/// Sorts pieces by place and joins neighbours.
fn coalesce(mut pieces: Vec<Piece>, range_bytes: u64) -> Vec<Range> {
    // Packs in the order the files name them first, so that content reaches a disk roughly in file order.
    let mut order: HashMap<PackId, usize> = HashMap::new();
    for piece in &pieces {
        let next = order.len();
        order.entry(piece.place.pack).or_insert(next);
    }
    pieces.sort_by_key(|piece| (order.get(&piece.place.pack).copied(), piece.place.frame.offset));
    let mut ranges: Vec<Range> = Vec::new();
    for piece in pieces {
        let (start, end) = (u64::from(piece.place.frame.offset), piece.place.frame.end());
        match ranges.last_mut() {
            Some(range)
                if range.pack == piece.place.pack
                    && start <= range.end + COALESCE_GAP
                    && end.max(range.end) - range.start <= range_bytes =>
            {
                range.end = range.end.max(end);
                range.pieces.push(piece);
            }
            _ => ranges.push(Range { pack: piece.place.pack, start, end, pieces: vec![piece] }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::format::file_map::{ChunkPlace, ShortId};
    use crate::format::sealed::FramePlace;

    fn piece(file: u64, pack: u8, offset: u32, len: u32) -> Piece {
        let frame = FramePlace { offset, stored_len: len, raw_len: len };
        let file = PieceFile { number: file, path: Bytes::new() };
        let place = ChunkPlace { pack: PackId([pack; 32]), frame, id: ShortId::default() };
        Piece { file, place, goes: Goes::Whole(0), found: Found::Nothing }
    }

    #[test]
    fn neighbours_become_one_range_and_strangers_do_not() {
        let pieces = vec![
            piece(0, 2, 96, 1000),
            piece(1, 1, 5_000_000, 1000),
            piece(2, 2, 1096, 1000),
            piece(3, 1, 96, 1000),
            piece(4, 2, 100_000, 7 << 20),
            piece(5, 2, 100_000 + (7 << 20), 2 << 20),
        ];
        let ranges = coalesce(pieces, 8 << 20);
        let seen: Vec<_> = ranges.iter().map(|r| (r.pack.0[0], r.start, r.end, r.pieces.len())).collect();
        let seven = 7 << 20;
        assert_eq!(
            seen,
            [
                (2, 96, 100_000 + seven, 3),
                (2, 100_000 + seven, 100_000 + seven + (2 << 20), 1),
                (1, 96, 1096, 1),
                (1, 5_000_000, 5_001_000, 1),
            ]
        );
    }
}
