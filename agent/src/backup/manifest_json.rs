//! Writes PostgreSQL's own `backup_manifest`, by which `pg_verifybackup` judges a backup or what was restored from it
//! (doc/src/sgml/backup-manifest.sgml; src/backend/backup/backup_manifest.c).
//!
//! It streams: what is held does not grow with the number of files.

use std::io::{self, Write};

use aws_lc_rs::digest;
use jiff::Timestamp;
use walfleet_repository::postgres::{Lsn, SystemId, Timeline};

/// WAL that recovery from the backup needs: [start, end) of one timeline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalRange {
    pub timeline: Timeline,
    pub start: Lsn,
    pub end: Lsn,
}

/// Files first, in any order, then [`ManifestWriter::finish`].
pub struct ManifestWriter<W> {
    out: Hashed<W>,
    is_first: bool,
}

impl<W: Write> ManifestWriter<W> {
    /// `major` decides the form: 17 and later name the system.
    pub fn new(out: W, major: u32, system_id: SystemId) -> io::Result<ManifestWriter<W>> {
        let mut out = Hashed { out, context: digest::Context::new(&digest::SHA256) };
        if major >= 17 {
            write!(out, "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {system_id},\n")?;
        } else {
            out.write_all(b"{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n")?;
        }
        out.write_all(b"\"Files\": [")?;
        Ok(ManifestWriter { out, is_first: true })
    }

    /// A file as it will be found: directories, WAL and the manifest itself are not listed. `crc32c` is of its content;
    /// without it `pg_verifybackup` looks at the file's size alone.
    pub fn file(&mut self, path: &[u8], size: u64, mtime_us: i64, crc32c: Option<u32>) -> io::Result<()> {
        self.out.write_all(if self.is_first { b"\n" } else { b",\n" })?;
        self.is_first = false;
        match std::str::from_utf8(path) {
            // JSON strings are PostgreSQL's escape_json() as well as serde's.
            Ok(path) => write!(self.out, "{{ \"Path\": {}", serde_json::to_string(path)?)?,
            Err(_) => write!(self.out, "{{ \"Encoded-Path\": \"{}\"", hexadecimal(path))?,
        }
        let modified = Timestamp::from_microsecond(mtime_us).unwrap_or(Timestamp::UNIX_EPOCH);
        write!(self.out, ", \"Size\": {size}, \"Last-Modified\": \"{}\"", modified.strftime("%Y-%m-%d %H:%M:%S GMT"))?;
        if let Some(crc32c) = crc32c {
            // In the order that the server has it in memory, which on all supported hosts is this one.
            let checksum = hexadecimal(&crc32c.to_le_bytes());
            write!(self.out, ", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{checksum}\"")?;
        }
        self.out.write_all(b" }")
    }

    /// Gives the output back, complete but neither flushed nor synced.
    pub fn finish(mut self, wal_ranges: &[WalRange]) -> io::Result<W> {
        self.out.write_all(b"\n],\n\"WAL-Ranges\": [\n")?;
        for (index, WalRange { timeline, start, end }) in wal_ranges.iter().enumerate() {
            let separator = if index == 0 { "" } else { ",\n" };
            write!(
                self.out,
                "{separator}{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            )?;
        }
        self.out.write_all(b"\n],\n")?;
        let Hashed { mut out, context } = self.out;
        writeln!(out, "\"Manifest-Checksum\": \"{}\"}}", hexadecimal(context.finish().as_ref()))?;
        Ok(out)
    }
}

/// What goes through is hashed.
struct Hashed<W> {
    out: W,
    context: digest::Context,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.context.update(bytes.get(..count).unwrap_or(bytes));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
