//! Finding again where this server's WAL goes, by what lies in the repository, after a restart or a promotion.

use std::collections::BTreeMap;

use walfleet_repository::format::wal_history::Divergence;
use walfleet_repository::postgres::{Branch, Lsn, Segment, Timeline, TimelineHistory, WalBranch};

use super::evidence::{Kin, OwnWord};
use super::{Branches, Standing, Way};
use crate::wal::fetch::restored_from;
use crate::wal::read::{read_in_place, read_small};
use crate::wal::ship::ShipError;

impl Branches {
    /// Where a segment goes when nothing is remembered.
    ///
    /// A branch on which this server's own WAL lies before the segment is the one. Where that cannot be told, the branch that
    /// this member made last is, if nothing speaks against it: it may have been unable to archive for a while.
    pub(super) async fn locate(&self, base: WalBranch, segment: Segment) -> Result<Way, ShipError> {
        let divergences = self.source.archive.divergences(base.system_id, base.timeline).await?;
        let ways = self.ways_below(base, segment, &divergences);
        if ways.is_empty() {
            let kin = self.kin(base, segment, OwnWord::Taken).await?;
            return Ok(stand(Way::of(base), kin));
        }
        let mut own: Option<(Way, i64)> = None;
        for (way, left) in ways {
            match self.kin_of_way(&way, segment, left).await? {
                Kin::Same => return Ok(way),
                Kin::Unknown if left.member == self.source.member => {
                    let newer = own.as_ref().is_none_or(|(_, found_at_us)| *found_at_us < left.found_at_us);
                    own = if newer { Some((way, left.found_at_us)) } else { own };
                }
                Kin::Unknown | Kin::Other { .. } => {}
            }
        }
        let kin = self.kin(base, segment, OwnWord::Doubted).await?;
        match own {
            // One that was made for this very segment goes on from the same WAL as the branch that it left.
            Some((way, _))
                if kin != Kin::Same || way.steps.last().is_some_and(|(first, _)| *first == segment.number) =>
            {
                Ok(way)
            }
            _ => Ok(stand(Way::of(base), kin)),
        }
    }

    /// A way on which this server's own WAL lies before a segment, or in it, if branches were made meanwhile that lead there.
    pub(super) async fn found_way(&self, base: WalBranch, segment: Segment) -> Result<Option<Way>, ShipError> {
        let divergences = self.source.archive.divergences(base.system_id, base.timeline).await?;
        for (way, left) in self.ways_below(base, segment, &divergences) {
            if self.kin_of_way(&way, segment, left).await? == Kin::Same {
                return Ok(Some(way));
            }
        }
        Ok(None)
    }

    /// The ways to the branches that left `base`, or one that did, not behind the segment; the deepest first.
    fn ways_below<'a>(
        &self,
        base: WalBranch,
        segment: Segment,
        divergences: &'a [(WalBranch, Divergence)],
    ) -> Vec<(Way, &'a Divergence)> {
        let by_branch: BTreeMap<Branch, &Divergence> =
            divergences.iter().map(|(wal, left)| (wal.branch, left)).collect();
        let way_to = |tip: Branch| {
            let mut steps = Vec::new();
            let mut at = tip;
            while let Some(left) = by_branch.get(&at).filter(|_| steps.len() < divergences.len()) {
                steps.push((left.at.segment_number(self.source.segment_size), WalBranch { branch: at, ..base }));
                at = left.from;
            }
            steps.push((0, base));
            steps.reverse();
            (at == base.branch).then_some(Way { steps, standing: Standing::There })
        };
        let begun = |way: &Way| way.steps.last().is_some_and(|(first, _)| *first <= segment.number);
        let ways = divergences.iter().filter_map(|(wal, left)| Some((way_to(wal.branch).filter(begun)?, left)));
        let mut ways: Vec<_> = ways.collect();
        ways.sort_by_key(|(way, _)| std::cmp::Reverse(way.steps.last().map(|(first, _)| *first)));
        ways
    }

    async fn kin_of_way(&self, way: &Way, segment: Segment, left: &Divergence) -> Result<Kin, ShipError> {
        let tip = way.home(segment.number);
        let here = self.content_of(segment).await?;
        let archived = self.source.archive.directory(tip, segment, self.source.segment_size).await;
        match self.source.archive.readable(archived)? {
            Some(archived) if here.is_some() => {
                let same = here == Some(archived.content_id);
                let seen = super::evidence::Seen::File;
                return Ok(if same { Kin::Same } else { Kin::Other { whose: archived.member, seen } });
            }
            _ => {}
        }
        match way.steps.last() {
            // What lies before is the same on the branch that it left.
            Some((first, _)) if *first == segment.number => match here {
                Some(content) if content == left.content => Ok(Kin::Same),
                _ => Ok(Kin::Unknown),
            },
            _ => self.kin(tip, segment, OwnWord::Doubted).await,
        }
    }

    /// The branch of the last ancestor that a history names: the timeline's own, unless others left it before the new
    /// timeline did; then the one whose WAL this server has. `None`: that cannot be told.
    pub(super) async fn parent_of(&self, timeline: Timeline, content: &[u8]) -> Result<Option<Branch>, ShipError> {
        let Ok(history) = TimelineHistory::parse(timeline, content) else { return Ok(None) };
        let Some((ancestor, at)) = history.ancestors.last().copied() else { return Ok(None) };
        let system_id = self.source.system_id;
        let base = match ancestor {
            Timeline::FIRST => WalBranch { system_id, timeline: ancestor, branch: Branch::ROOT },
            _ => match read_small(&self.source.data_dir, &ancestor.history_name()).await? {
                Some(content) => WalBranch { system_id, timeline: ancestor, branch: Branch::of_history(&content) },
                None => return Ok(None),
            },
        };
        let divergences = self.source.archive.divergences(system_id, ancestor).await?;
        let size = self.source.segment_size;
        let last = Segment::containing(ancestor, at, size);
        let mut ways: Vec<Way> = self.ways_below(base, last, &divergences).into_iter().map(|(way, _)| way).collect();
        ways.retain(|way| way.steps.last().is_some_and(|(first, _)| self.start(*first) < at));
        if ways.is_empty() {
            return Ok(Some(base.branch));
        }
        ways.push(Way::of(base));
        let data_dir = self.source.data_dir.clone();
        let read = Segment::containing(ancestor, Lsn(at.0.saturating_sub(1)), size);
        let restored = tokio::task::spawn_blocking(move || restored_from(&data_dir, system_id, read)).await;
        if let Some(restored) = restored.map_err(|_| ShipError::Stopping)? {
            return Ok(Some(restored.branch));
        }
        let (mut same, mut unknown) = (Vec::new(), Vec::new());
        for way in ways {
            let step = way.steps.last().copied().unwrap_or((0, base));
            match self.kin_up_to(&way, (timeline, at), last).await? {
                Kin::Same => same.push(step),
                Kin::Unknown => unknown.push(step),
                Kin::Other { .. } => {}
            }
        }
        // One that was left within the last segment may have the same WAL up to there.
        let doubt = unknown.iter().any(|(first, _)| *first == last.number);
        Ok(same.into_iter().max_by_key(|(first, _)| *first).filter(|_| !doubt).map(|(_, wal)| wal.branch))
    }

    /// Whether a new timeline that left at `at` goes on from the WAL of a way. Its first segment has a copy of that up to
    /// there (XLogInitNewTimeline, src/backend/access/transam/xlog.c).
    async fn kin_up_to(&self, way: &Way, (timeline, at): (Timeline, Lsn), last: Segment) -> Result<Kin, ShipError> {
        let (archive, size, held) = (&self.source.archive, self.source.segment_size, way.home(last.number));
        let archived = match archive.readable(archive.get_segment(held, last, size).await)?.flatten() {
            Some((directory, bytes)) => Some((directory.valid_bytes as usize, bytes)),
            None => archive
                .get_partial(held, last, size)
                .await?
                .map(|(directory, bytes)| (directory.valid_bytes as usize, bytes)),
        };
        let to = at.segment_offset(size) as usize;
        let copy = Segment { timeline, ..last }.file_name(size);
        let path = self.source.data_dir.join("pg_wal").join(copy);
        let read = tokio::task::spawn_blocking(move || read_in_place(&path)).await.map_err(|_| ShipError::Stopping)?;
        if let (Some((valid, theirs)), Ok(ours)) = (archived, read)
            && to > 0
        {
            let upto = to.min(valid);
            let same = ours.get(..upto) == theirs.get(..upto);
            let seen = super::evidence::Seen::File;
            return Ok(match same {
                false => Kin::Other { whose: String::new(), seen },
                true if upto == to => Kin::Same,
                true => Kin::Unknown,
            });
        }
        match way.steps.last() {
            Some((first, _)) if *first == last.number => Ok(Kin::Unknown),
            _ => self.kin(way.home(last.number.saturating_sub(1)), last, OwnWord::Doubted).await,
        }
    }

    fn start(&self, number: u64) -> Lsn {
        Segment { timeline: Timeline::FIRST, number }.start(self.source.segment_size)
    }
}

fn stand(way: Way, kin: Kin) -> Way {
    match kin {
        Kin::Other { whose, .. } => Way { standing: Standing::Astray { whose }, ..way },
        Kin::Same | Kin::Unknown => way,
    }
}
