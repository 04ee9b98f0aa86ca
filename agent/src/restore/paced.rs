//! A sink that waits for the host's limits before it reads from the directory that is restored, or writes to it.

use std::io;
use std::sync::Arc;

use walfleet_repository::backup::fetch::{FileNumber, Found, PieceFile, PieceSink};
use walfleet_repository::format::manifest::FileEntry;

use crate::limits::Allowance;
use crate::restore::sink::FileSink;

pub struct PacedSink {
    pub sink: Arc<FileSink>,
    pub allowance: Allowance,
}

impl PieceSink for PacedSink {
    fn entry(&self, number: FileNumber, entry: &FileEntry) -> io::Result<Found> {
        self.sink.entry(number, entry)
    }

    fn expect(&self, file: &PieceFile, offset: u64, len: u64) {
        self.sink.expect(file, offset, len);
    }

    fn write(&self, file: &PieceFile, offset: u64, content: &[u8]) -> io::Result<()> {
        self.allowance.write(content.len() as u64);
        self.sink.write(file, offset, content)
    }

    fn opened(&self) {
        self.allowance.work();
    }

    fn read(&self, file: &PieceFile, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.allowance.read(into.len() as u64);
        self.sink.read(file, offset, into)
    }

    fn kept(&self, bytes: u64) {
        self.sink.kept(bytes);
    }
}
