//! What one segment holds, seen in one pass: how far it is valid, and the few facts that recovery windows need.

use std::time::Duration;

use walfleet_repository::format::changed_blocks::ChangedBlocks;
use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

use super::changes::Changes;
use super::decoder::{Carry, Decoder};
use super::meaning::{Checkpoint, Completion, Meaning, Outcome, ParameterChange, RestorePoint, meaning};
use super::page_header::WalVersion;
use super::{EndReason, WalError};

/// Which segment is read, and what it must agree with.
#[derive(Clone, Copy, Debug)]
pub struct SegmentPlace {
    pub start: Lsn,
    pub size: SegmentSize,
    /// In the segment's name; its pages may be of ancestors, never of descendants.
    pub timeline: Timeline,
    /// `None`: any system's.
    pub system_id: Option<SystemId>,
}

/// How the WAL of a segment goes on behind its last valid record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentEnd {
    /// The last record ends with the segment, but for padding.
    Full,
    /// The last record continues in the next segment.
    Continues,
    /// A WAL switch ended it; the rest is filler.
    Switch,
    /// The bytes given end before the segment does, and are valid up to there (a record may have begun).
    MoreToCome,
    /// Nothing valid follows, though more bytes were given.
    Broken(EndReason),
}

impl SegmentEnd {
    /// Whether the segment is complete: the next record, or the rest of this one, stands in the next segment.
    pub fn is_complete(self) -> bool {
        matches!(self, SegmentEnd::Full | SegmentEnd::Continues | SegmentEnd::Switch)
    }
}

#[derive(Clone, Debug)]
pub struct SegmentDigest {
    /// Offset in the segment behind the last valid record; the segment's size if that record continues in the next.
    pub valid_bytes: u32,
    pub end: SegmentEnd,
    /// `None` if not even the first page header was valid.
    pub version: Option<WalVersion>,
    pub system_id: Option<SystemId>,
    /// The segment begins within a record whose beginning was not given: that record is neither checked nor reported.
    pub headless: bool,
    /// Ascending by LSN, thinned to the spacing asked for; the first, the last and the latest are always among them.
    pub completions: Vec<Completion>,
    pub first_commit: Option<Completion>,
    pub last_commit: Option<Completion>,
    pub restore_points: Vec<RestorePoint>,
    pub last_checkpoint: Option<Checkpoint>,
    /// Every change of timeline or end of a recovery: where, the new timeline and the one before.
    pub recovery_ends: Vec<(Lsn, Timeline, Timeline)>,
    /// End of the record and the start of the backup it ended; only primaries write it.
    pub backup_ends: Vec<(Lsn, Lsn)>,
    pub parameter_changes: Vec<ParameterChange>,
    /// Where full_page_writes was turned off: no backup from a standby spans such a place.
    pub full_page_writes_off: Option<Lsn>,
    /// The pages that the valid records which end here change; `None` if that is not known of all of them.
    pub changed_blocks: Option<ChangedBlocks>,
    pub records: u64,
    /// Records that are proven by their checksum, but not made as their headers say. Never seen in PostgreSQL's WAL.
    pub malformed: u64,
    /// For the next segment; `None` unless this one is complete.
    pub carry: Option<Carry>,
}

/// Builds a [`SegmentDigest`] from bytes as they come.
#[derive(Debug)]
pub struct SegmentScan {
    place: SegmentPlace,
    decoder: Decoder,
    fed: u64,
    findings: Findings,
}

impl SegmentScan {
    /// `spacing` thins the completions; zero keeps all, which for 1 GiB segments can be tens of millions.
    pub fn new(place: SegmentPlace, carry: Option<Carry>, spacing: Duration) -> Result<SegmentScan, WalError> {
        let decoder = Decoder::new(place.start, place.size, place.timeline, place.system_id, carry)?;
        let spacing_us = i64::try_from(spacing.as_micros()).unwrap_or(i64::MAX);
        Ok(SegmentScan { place, decoder, fed: 0, findings: Findings { spacing_us, ..Findings::default() } })
    }

    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), WalError> {
        self.fed += bytes.len() as u64;
        let findings = &mut self.findings;
        self.decoder.feed(bytes, &mut |record| {
            findings.records += 1;
            match meaning(record) {
                Ok(meaning) => {
                    findings.changes.note(record, &meaning);
                    findings.note(meaning);
                }
                Err(_) => {
                    findings.malformed += 1;
                    findings.changes.give_up();
                }
            }
        })
    }

    /// Offset in the segment behind the last valid record seen so far.
    pub fn records_end(&self) -> u32 {
        u32::try_from(self.decoder.valid_end().saturating_sub(self.place.start).min(self.fed)).unwrap_or(u32::MAX)
    }

    /// Whether records go on behind what was fed: nothing switched to the next segment, and nothing was odd.
    pub fn goes_on(&self) -> bool {
        self.decoder.ended().is_none() && !self.decoder.has_switched()
    }

    /// Transactions whose end was seen in `(from, to]`: thinned, but for the last.
    pub fn completions_between(&self, from: Lsn, to: Lsn) -> Vec<Completion> {
        let within = |end: Lsn| from < end && end <= to;
        let mut found: Vec<_> = self.findings.completions.iter().copied().filter(|kept| within(kept.end)).collect();
        let last = self.findings.last.filter(|last| within(last.end));
        found.extend(last.filter(|last| found.last().is_none_or(|kept| kept.end < last.end)));
        found
    }

    /// Restore points whose record was seen to end in `(from, to]`.
    pub fn restore_points_between(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = &RestorePoint> {
        self.findings.restore_points.iter().filter(move |point| from < point.end && point.end <= to)
    }

    /// Changes of settings whose record was seen to end in `(from, to]`.
    pub fn parameter_changes_between(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = &ParameterChange> {
        self.findings.parameter_changes.iter().filter(move |change| from < change.end && change.end <= to)
    }

    pub fn finish(self) -> SegmentDigest {
        let SegmentScan { place, decoder, fed, mut findings } = self;
        let size = place.size.bytes();
        let whole = fed >= u64::from(size);
        let end = if let Some(reason) = decoder.ended() {
            SegmentEnd::Broken(reason)
        } else if decoder.has_switched() {
            SegmentEnd::Switch
        } else if !whole {
            SegmentEnd::MoreToCome
        } else if decoder.is_inside_record() {
            SegmentEnd::Continues
        } else {
            SegmentEnd::Full
        };
        let valid_bytes = match end {
            SegmentEnd::Continues | SegmentEnd::Full => size,
            // The end includes padding that the bytes given may lack.
            _ => u32::try_from(decoder.valid_end().saturating_sub(place.start).min(fed)).unwrap_or(size),
        };
        findings.close();
        if decoder.began_headless() {
            findings.changes.give_up();
        }
        SegmentDigest {
            valid_bytes,
            end,
            version: decoder.version(),
            system_id: decoder.system_id(),
            headless: decoder.began_headless(),
            completions: findings.completions,
            first_commit: findings.first_commit,
            last_commit: findings.last_commit,
            restore_points: findings.restore_points,
            last_checkpoint: findings.last_checkpoint,
            recovery_ends: findings.recovery_ends,
            backup_ends: findings.backup_ends,
            parameter_changes: findings.parameter_changes,
            full_page_writes_off: findings.full_page_writes_off,
            changed_blocks: findings.changes.finish(),
            records: findings.records,
            malformed: findings.malformed,
            carry: decoder.into_carry(),
        }
    }
}

/// The digest of bytes that are all at hand: a segment, or its beginning.
pub fn digest_segment(
    place: SegmentPlace,
    carry: Option<Carry>,
    spacing: Duration,
    bytes: &[u8],
) -> Result<SegmentDigest, WalError> {
    let mut scan = SegmentScan::new(place, carry, spacing)?;
    scan.feed(bytes)?;
    Ok(scan.finish())
}

#[derive(Debug, Default)]
struct Findings {
    spacing_us: i64,
    completions: Vec<Completion>,
    /// Of all, thinned away or not.
    last: Option<Completion>,
    latest: Option<Completion>,
    first_commit: Option<Completion>,
    last_commit: Option<Completion>,
    restore_points: Vec<RestorePoint>,
    last_checkpoint: Option<Checkpoint>,
    recovery_ends: Vec<(Lsn, Timeline, Timeline)>,
    backup_ends: Vec<(Lsn, Lsn)>,
    parameter_changes: Vec<ParameterChange>,
    full_page_writes_off: Option<Lsn>,
    changes: Changes,
    records: u64,
    malformed: u64,
}

impl Findings {
    fn note(&mut self, meaning: Meaning) {
        match meaning {
            Meaning::Completed(completion) => self.note_completion(completion),
            Meaning::RestorePoint(point) => self.restore_points.push(point),
            Meaning::Checkpoint(checkpoint) => {
                if checkpoint.timeline != checkpoint.previous_timeline {
                    self.recovery_ends.push((checkpoint.start, checkpoint.timeline, checkpoint.previous_timeline));
                }
                self.last_checkpoint = Some(checkpoint);
            }
            Meaning::EndOfRecovery { end, timeline, previous_timeline } => {
                self.recovery_ends.push((end, timeline, previous_timeline));
            }
            Meaning::BackupEnd { end, backup_start } => self.backup_ends.push((end, backup_start)),
            Meaning::ParameterChange(change) => {
                // A window may end here, at the last one before.
                if change.ends_archive_recovery()
                    && let Some(last) = self.last
                {
                    let is_thinned = self.completions.last().is_none_or(|kept| kept.end < last.end);
                    self.completions.extend(Some(last).filter(|_| is_thinned));
                }
                self.parameter_changes.push(change);
            }
            Meaning::FullPageWrites { end, on: false } => self.full_page_writes_off = Some(end),
            Meaning::FullPageWrites { on: true, .. } | Meaning::Switch | Meaning::Other => {}
        }
    }

    fn note_completion(&mut self, completion: Completion) {
        // Clocks jitter backwards between neighbours; only a step of a spacing or more is worth an entry of its own.
        let keep = self
            .completions
            .last()
            .is_none_or(|kept| completion.at_us.saturating_sub(kept.at_us).saturating_abs() >= self.spacing_us);
        if keep {
            self.completions.push(completion);
        }
        self.last = Some(completion);
        if self.latest.is_none_or(|latest| latest.at_us < completion.at_us) {
            self.latest = Some(completion);
        }
        if completion.outcome == Outcome::Commit {
            self.first_commit.get_or_insert(completion);
            self.last_commit = Some(completion);
        }
    }

    /// Puts in what thinning may have left out but must be there.
    fn close(&mut self) {
        let extremes = [self.latest, self.first_commit, self.last_commit, self.last];
        for completion in extremes.into_iter().flatten() {
            let place = self.completions.partition_point(|kept| kept.end < completion.end);
            if self.completions.get(place).is_none_or(|kept| kept.end != completion.end) {
                self.completions.insert(place, completion);
            }
        }
    }
}
