//! What other members have of a segment in the branch that this server's WAL goes to. Where that is something else, one of the
//! two leaves.

use walfleet_repository::ids::ChunkId;
use walfleet_repository::postgres::{Segment, WalBranch};
use walfleet_repository::wal_archive::Mark;

use super::{Branches, Refusal};
use crate::tasks::on_disk;
use crate::wal::read::read_in_place;
use crate::wal::ship::ShipError;

impl Branches {
    /// To be called before a whole segment is stored: under its name may lie nothing yet, and pieces of another's beside. Only
    /// the first that this process stores in a branch is looked at. Whoever is to leave does so within the segment in which
    /// the two parted, and that is where an agent begins that stores another server's WAL.
    pub async fn look_at_others(&self, base: WalBranch, segment: Segment) -> Result<(), ShipError> {
        let size = self.source.segment_size;
        let wal = self.home(base, segment).await?;
        let is_first = !self.newest_of().contains_key(&wal);
        // What lies there whole is compared when it is stored.
        if !is_first || self.source.archive.has_segment(wal, segment, size).await? {
            return Ok(());
        }
        let path = self.source.data_dir.join("pg_wal").join(segment.file_name(size));
        match on_disk(move || read_in_place(&path)).await {
            Ok(ours) => self.apart_from_others(base, (wal, segment), &ours).await,
            Err(_) => Ok(()),
        }
    }

    /// Where another member has other bytes of a segment than `ours`, which may be its beginning alone.
    pub async fn apart_from_others(
        &self,
        base: WalBranch,
        (wal, segment): (WalBranch, Segment),
        ours: &[u8],
    ) -> Result<(), ShipError> {
        let (archive, size) = (&self.source.archive, self.source.segment_size);
        let upto = u32::try_from(ours.len()).unwrap_or(u32::MAX);
        let marks = archive.others_marks(wal, (segment, size), (&self.source.member, upto)).await?;
        let id = |end: u32| archive.id_of(ours.get(..end as usize).unwrap_or_default());
        let (same, differ): (Vec<Mark>, Vec<Mark>) = marks.into_iter().partition(|mark| id(mark.end) == mark.content);
        let Some(other) = differ.into_iter().next() else { return Ok(()) };
        match archive.has_segment(wal, segment, size).await? {
            // The name is taken.
            true => self.leave(base, (wal, segment), id(upto), other.member).await,
            false => self.yield_to(base, (wal, segment), id(upto), (other.member, &same)).await,
        }
    }

    /// Leaves a branch in which another member stores another beginning of the same segment, unless it is the other who is to
    /// leave: who brought what lies before stays, and who has the same bytes as that one; otherwise whose name comes first.
    /// `content`: of what this server has of the segment; `same`: who has that, too.
    pub async fn yield_to(
        &self,
        base: WalBranch,
        (wal, segment): (WalBranch, Segment),
        content: ChunkId,
        (stored_by, same): (String, &[Mark]),
    ) -> Result<(), ShipError> {
        let size = self.source.segment_size;
        let before = match segment.number.checked_sub(1) {
            Some(number) => self.source.archive.directory(wal, Segment { number, ..segment }, size).await,
            None => return Ok(()),
        };
        let before = self.source.archive.readable(before)?;
        let stays = match before {
            Some(before) if before.member == self.source.member => true,
            Some(before) if before.member == stored_by => false,
            Some(before) if same.iter().any(|mark| mark.member == before.member) => true,
            _ => self.source.member < stored_by,
        };
        if stays { Ok(()) } else { self.leave(base, (wal, segment), content, stored_by).await }
    }

    /// Leaves a branch which has other bytes of a segment than this server, of which `content` was received.
    pub async fn leave(
        &self,
        base: WalBranch,
        (wal, segment): (WalBranch, Segment),
        content: ChunkId,
        stored_by: String,
    ) -> Result<(), ShipError> {
        self.until_settled_before((segment.timeline, segment.number)).await;
        self.part(base, segment, Refusal { wal, content, stored_by }).await
    }
}
