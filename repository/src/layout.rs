//! Every key of a repository, built and read back here and nowhere else.
//!
//! | key | what | written by | ever overwritten |
//! |---|---|---|---|
//! | `walfleet-repository` | format version, repository id, root of trust, order of appends | `repository init` | never |
//! | `keys/<domain>/<version>/<recipient>` | a domain key, wrapped for one recipient | whoever has the domain key | never; a recipient is added as a new object |
//! | `clusters/<cluster>/log/<sequence>` | one entry of the cluster's log | agents and keeper | never, and never deleted |
//! | `clusters/<cluster>/log/<sequence>.checkpoint` | the log folded up to there | keeper | never, and never deleted |
//! | `clusters/<cluster>/collect/<sequence>` | what a collector means to remove, seen at that prefix of the log; in clear and signed | keeper | never; the keeper deletes it once all of that is gone |
//! | `clusters/<cluster>/collect/<sequence>.done` | what it has removed | keeper | never; the keeper deletes all but the newest |
//! | `clusters/<cluster>/packs/<session>/<pack>` | frames of chunks; the name is BLAKE3 of the stored bytes | the session's agent | never; the keeper deletes |
//! | `clusters/<cluster>/backups/<backup>` | the manifest, sealed | the session's agent | never; the keeper deletes |
//! | `clusters/<cluster>/backups/<backup>.refs` | its reference part, in clear and signed | the session's agent | never |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/<segment>` | one WAL segment, sealed | any member's agent | never; the keeper deletes |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/history` | the timeline's history file, sealed; of a branch that a diverging member's WAL went to, where that one left which branch | any member's agent | never |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/origin` | the positions of that history, in clear: who holds no key must know which WAL a backup needs | any member's agent | never |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/partial/<segment>.<content>` | the last segment of a timeline that a promotion left unfinished, sealed; several promotions may leave several, told apart by the first 8 bytes of the content id | any member's agent | never; the keeper deletes |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/<segment>.<offset>.backup` | a backup history file, sealed | any member's agent | never; the keeper deletes |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/gaps/<from>-<to>.<tag>` | what is known of WAL that is missing in `[from, to)`: who let go of it and why, or who has acknowledged it; in clear and signed | any member's agent, keeper | never; the keeper deletes |
//! | `clusters/<cluster>/wal/<system id>/<timeline>-<branch>/levels/<at>.<level>` | where `wal_level` changed: `minimal`, and nothing from before is recovered beyond `<at>`; or `replica`; sealed | any member's agent | never; the keeper deletes |
//! | `clusters/<cluster>/wal/<system id>/catalog/<range>.<n>` | a cache of what the archive holds | keeper | never; the newest `n` wins |
//! | `tails/<cluster>/<system id>/<timeline>-<branch>/<segment>/<from>-<to>.<member>` | `[from, to)` of an unfinished segment | the member's agent | never; the keeper deletes in batches |
//! | `probe/<random>` | what the store probe tried | `repository init`, daily probe | never; litter, for a lifecycle rule to expire |
//!
//! `<sequence>` has 20 decimal digits, `<timeline>` 8 hexadecimal ones in upper case as in PostgreSQL's own names,
//! `<branch>` 16 in lower case. Ids and names are checked when they are made ([`crate::ids`]), so no key escapes its folder.

mod level_name;

use std::fmt;

pub use level_name::{WalLevelClass, WalLevelName};

use object_store::path::Path;

use crate::ids::{BackupId, ChunkId, ClusterName, DomainId, PackId, RecipientId};
use crate::postgres::{Branch, Lsn, Segment, SegmentSize, SystemId, Timeline, WalBranch};

const HISTORY: &str = "history";
const GAPS: &str = "gaps";
const LEVELS: &str = "levels";
const REFERENCE_SUFFIX: &str = ".refs";
const CHECKPOINT_SUFFIX: &str = ".checkpoint";
const COLLECTED_SUFFIX: &str = ".done";

pub fn root() -> Path {
    Path::from("walfleet-repository")
}

pub fn domain_key(domain: DomainId, version: u32, recipient: RecipientId) -> Path {
    domain_keys(domain).join(version.to_string()).join(recipient.to_string())
}

/// Below it lie all versions of a domain's key, for all recipients.
pub fn domain_keys(domain: DomainId) -> Path {
    Path::from("keys").join(domain.to_string())
}

/// Below it lies one folder per cluster.
pub fn clusters() -> Path {
    Path::from("clusters")
}

pub fn cluster(cluster: &ClusterName) -> Path {
    clusters().join(cluster.as_str())
}

pub fn log(cluster: &ClusterName) -> Path {
    self::cluster(cluster).join("log")
}

pub fn log_entry(cluster: &ClusterName, sequence: u64) -> Path {
    log(cluster).join(format!("{sequence:020}"))
}

pub fn checkpoint(cluster: &ClusterName, sequence: u64) -> Path {
    log(cluster).join(format!("{sequence:020}{CHECKPOINT_SUFFIX}"))
}

/// Below it lie plans of removals, and reports of them.
pub fn collect(cluster: &ClusterName) -> Path {
    self::cluster(cluster).join("collect")
}

pub fn collect_plan(cluster: &ClusterName, sequence: u64) -> Path {
    collect(cluster).join(format!("{sequence:020}"))
}

pub fn collected(cluster: &ClusterName, sequence: u64) -> Path {
    collect(cluster).join(format!("{sequence:020}{COLLECTED_SUFFIX}"))
}

/// What a key below [`collect`] is.
pub fn parse_collect(cluster: &ClusterName, key: &Path) -> Option<CollectObject> {
    let [name] = parts_below(&collect(cluster), key)?;
    match name.strip_suffix(COLLECTED_SUFFIX) {
        Some(number) => sequence(number).map(CollectObject::Collected),
        None => sequence(&name).map(CollectObject::Plan),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum CollectObject {
    Plan(u64),
    Collected(u64),
}

/// Below it lies one folder per session.
pub fn packs(cluster: &ClusterName) -> Path {
    self::cluster(cluster).join("packs")
}

pub fn session_packs(cluster: &ClusterName, session: &BackupId) -> Path {
    packs(cluster).join(session.as_str())
}

pub fn pack(cluster: &ClusterName, session: &BackupId, pack: PackId) -> Path {
    session_packs(cluster, session).join(pack.to_string())
}

pub fn backups(cluster: &ClusterName) -> Path {
    self::cluster(cluster).join("backups")
}

pub fn manifest(cluster: &ClusterName, backup: &BackupId) -> Path {
    backups(cluster).join(backup.as_str())
}

pub fn reference(cluster: &ClusterName, backup: &BackupId) -> Path {
    backups(cluster).join(format!("{backup}{REFERENCE_SUFFIX}"))
}

/// Below it lies one folder per system identifier.
pub fn wal(cluster: &ClusterName) -> Path {
    self::cluster(cluster).join("wal")
}

pub fn wal_system(cluster: &ClusterName, system_id: SystemId) -> Path {
    wal(cluster).join(system_id.to_string())
}

pub fn wal_branch(cluster: &ClusterName, branch: &WalBranch) -> Path {
    wal_system(cluster, branch.system_id).join(branch_folder(branch))
}

pub fn wal_segment(cluster: &ClusterName, branch: &WalBranch, segment: Segment, size: SegmentSize) -> Path {
    wal_branch(cluster, branch).join(segment.file_name(size))
}

pub fn wal_history(cluster: &ClusterName, branch: &WalBranch) -> Path {
    wal_branch(cluster, branch).join(HISTORY)
}

/// Where a branch comes from, in clear.
pub fn wal_origin(cluster: &ClusterName, branch: &WalBranch) -> Path {
    wal_branch(cluster, branch).join("origin")
}

/// An unfinished last segment of a timeline: each promotion off it may leave another.
pub fn wal_partial(
    cluster: &ClusterName,
    branch: &WalBranch,
    segment: Segment,
    size: SegmentSize,
    content: ChunkId,
) -> Path {
    let content: String = content.0.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    wal_partials(cluster, branch).join(format!("{}.{content}", segment.file_name(size)))
}

/// Below it lie the unfinished last segments of a timeline.
pub fn wal_partials(cluster: &ClusterName, branch: &WalBranch) -> Path {
    wal_branch(cluster, branch).join("partial")
}

/// The segment of a key below [`wal_partials`].
pub fn parse_wal_partial(cluster: &ClusterName, branch: &WalBranch, key: &Path, size: SegmentSize) -> Option<Segment> {
    let [name] = parts_below(&wal_partials(cluster, branch), key)?;
    let (segment, _) = name.split_once('.')?;
    Segment::from_file_name(segment, size).ok().filter(|segment| segment.timeline == branch.timeline)
}

/// What is known of WAL that the archive lacks.
pub fn gap_note(cluster: &ClusterName, note: &GapNoteName) -> Path {
    wal_branch(cluster, &note.wal).join(GAPS).join(note.to_string())
}

/// The note of a key below [`wal_branch`].
pub fn parse_gap_note(cluster: &ClusterName, key: &Path) -> Option<GapNoteName> {
    let [system_id, folder, gaps, name] = parts_below(&wal(cluster), key)?;
    let wal = parse_branch_folder(&system_id, &folder).filter(|_| gaps == GAPS)?;
    let (range, tag) = name.split_once('.')?;
    let (from, to) = range.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let found = GapNoteName { wal, from: Lsn(number(from)?), to: Lsn(number(to)?), tag: number(tag)? };
    Some(found).filter(|found| found.from < found.to && found.to_string() == name)
}

/// What the name of a gap note says: WAL `[from, to)` of a branch, and a tag that tells several notes apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GapNoteName {
    pub wal: WalBranch,
    pub from: Lsn,
    pub to: Lsn,
    pub tag: u64,
}

impl fmt::Display for GapNoteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}.{:016x}", self.from.0, self.to.0, self.tag)
    }
}

/// Where `wal_level` changed in a branch's WAL.
pub fn wal_level(cluster: &ClusterName, name: &WalLevelName) -> Path {
    wal_branch(cluster, &name.wal).join(LEVELS).join(name.to_string())
}

/// The change of a key below [`wal_branch`].
pub fn parse_wal_level(cluster: &ClusterName, key: &Path) -> Option<WalLevelName> {
    let [system_id, folder, levels, name] = parts_below(&wal(cluster), key)?;
    let wal = parse_branch_folder(&system_id, &folder).filter(|_| levels == LEVELS)?;
    WalLevelName::parse(wal, &name)
}

/// A backup history file (BackupHistoryFileName, src/include/access/xlog_internal.h).
pub fn wal_backup_history(
    cluster: &ClusterName,
    branch: &WalBranch,
    segment: Segment,
    size: SegmentSize,
    offset: u32,
) -> Path {
    wal_branch(cluster, branch).join(format!("{}.{offset:08X}.backup", segment.file_name(size)))
}

/// The segment of a backup history file's key.
pub fn parse_wal_backup_history(
    cluster: &ClusterName,
    branch: &WalBranch,
    key: &Path,
    size: SegmentSize,
) -> Option<Segment> {
    let [name] = parts_below(&wal_branch(cluster, branch), key)?;
    let (segment, _) = name.strip_suffix(".backup")?.split_once('.')?;
    Segment::from_file_name(segment, size).ok().filter(|segment| segment.timeline == branch.timeline)
}

/// Below it lies one folder per system identifier, with pieces of unfinished segments.
pub fn cluster_tails(cluster: &ClusterName) -> Path {
    Path::from("tails").join(cluster.as_str())
}

/// Below it lie the pieces of all of a system's branches.
pub fn system_tails(cluster: &ClusterName, system_id: SystemId) -> Path {
    cluster_tails(cluster).join(system_id.to_string())
}

/// The piece of a key below [`cluster_tails`], with whose it is.
pub fn parse_piece(cluster: &ClusterName, key: &Path, size: SegmentSize) -> Option<(WalBranch, Segment, TailName)> {
    let [system_id, folder, segment, _] = parts_below(&cluster_tails(cluster), key)?;
    let wal = parse_branch_folder(&system_id, &folder)?;
    let segment = Segment::from_file_name(&segment, size).ok().filter(|segment| segment.timeline == wal.timeline)?;
    let name = tail_name(key).filter(|found| found.to <= size.bytes())?;
    Some((wal, segment, name))
}

/// Below it lie the pieces of a branch's unfinished segments, one folder per segment.
pub fn tails(cluster: &ClusterName, branch: &WalBranch) -> Path {
    cluster_tails(cluster).join(branch.system_id.to_string()).join(branch_folder(branch))
}

/// The key of the whole segment whose pieces lie in a folder.
pub fn segment_of_tails(cluster: &ClusterName, folder: &Path) -> Option<Path> {
    let [system_id, branch, segment] = parts_below(&cluster_tails(cluster), folder)?;
    parse_branch_folder(&system_id, &branch)?;
    Some(wal(cluster).join(system_id).join(branch).join(segment))
}

/// What the name of a piece says, wherever it lies.
pub fn tail_name(key: &Path) -> Option<TailName> {
    let name = key.filename()?;
    let (range, member) = name.split_once('.')?;
    let (from, to) = range.split_once('-')?;
    let offset = |text: &str| u32::from_str_radix(text, 16).ok().filter(|offset| format!("{offset:08x}") == text);
    let found = TailName { from: offset(from)?, to: offset(to)?, member: member.to_owned() };
    Some(found).filter(|found| found.from < found.to && !found.member.is_empty())
}

/// Below it lie the pieces of one segment.
pub fn segment_tails(cluster: &ClusterName, branch: &WalBranch, segment: Segment, size: SegmentSize) -> Path {
    tails(cluster, branch).join(segment.file_name(size))
}

/// `[from, to)` of an unfinished segment, as one member's agent received it.
pub fn tail(
    cluster: &ClusterName,
    branch: &WalBranch,
    (segment, size): (Segment, SegmentSize),
    piece: &TailName,
) -> Path {
    segment_tails(cluster, branch, segment, size).join(piece.to_string())
}

/// What the name of a piece says: offsets in its segment, and who received it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TailName {
    pub from: u32,
    pub to: u32,
    pub member: String,
}

impl TailName {
    /// Whether it holds all that another piece of the same member does, and more.
    pub fn takes_in(&self, other: &TailName) -> bool {
        self.member == other.member && self.from <= other.from && other.to <= self.to && self != other
    }
}

impl fmt::Display for TailName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}.{}", self.from, self.to, self.member)
    }
}

/// The segment of a folder below [`tails`].
pub fn parse_tail_segment(
    cluster: &ClusterName,
    branch: &WalBranch,
    folder: &Path,
    size: SegmentSize,
) -> Option<Segment> {
    let [name] = parts_below(&tails(cluster, branch), folder)?;
    Segment::from_file_name(&name, size).ok().filter(|segment| segment.timeline == branch.timeline)
}

/// The piece of a key below [`segment_tails`].
pub fn parse_tail(
    cluster: &ClusterName,
    branch: &WalBranch,
    (segment, size): (Segment, SegmentSize),
    key: &Path,
) -> Option<TailName> {
    let [_] = parts_below(&segment_tails(cluster, branch, segment, size), key)?;
    tail_name(key).filter(|found| found.to <= size.bytes())
}

pub fn probe(run: &str) -> Path {
    Path::from("probe").join(run)
}

fn branch_folder(branch: &WalBranch) -> String {
    format!("{:08X}-{}", branch.timeline.0, branch.branch)
}

/// What lies in a WAL branch's folder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum WalObject {
    Segment(Segment),
    History,
}

/// The cluster of a folder below [`clusters`].
pub fn parse_cluster(key: &Path) -> Option<ClusterName> {
    let [name] = parts_below(&clusters(), key)?;
    name.parse().ok()
}

/// The number of a log entry; `None` for checkpoints and strangers.
pub fn parse_log_entry(cluster: &ClusterName, key: &Path) -> Option<u64> {
    let [name] = parts_below(&log(cluster), key)?;
    sequence(&name)
}

/// A number of 20 digits.
fn sequence(name: &str) -> Option<u64> {
    if name.len() == 20 && name.bytes().all(|byte| byte.is_ascii_digit()) { name.parse().ok() } else { None }
}

/// The session of a folder below [`packs`].
pub fn parse_session(cluster: &ClusterName, key: &Path) -> Option<BackupId> {
    let [session] = parts_below(&packs(cluster), key)?;
    session.parse().ok()
}

pub fn parse_pack(cluster: &ClusterName, key: &Path) -> Option<(BackupId, PackId)> {
    let [session, pack] = parts_below(&packs(cluster), key)?;
    Some((session.parse().ok()?, pack.parse().ok()?))
}

pub fn parse_domain_key(key: &Path) -> Option<(DomainId, u32, RecipientId)> {
    let [domain, version, recipient] = parts_below(&Path::from("keys"), key)?;
    let number: u32 = version.parse().ok()?;
    let canonical = number.to_string() == version;
    Some((domain.parse().ok()?, number, recipient.parse().ok()?)).filter(|_| canonical)
}

/// The system identifier of a folder below [`wal`].
pub fn parse_wal_system(cluster: &ClusterName, key: &Path) -> Option<SystemId> {
    let [system_id] = parts_below(&wal(cluster), key)?;
    parse_system_id(&system_id)
}

/// The branch of a folder below [`wal_system`].
pub fn parse_wal_branch(cluster: &ClusterName, key: &Path) -> Option<WalBranch> {
    let [system_id, folder] = parts_below(&wal(cluster), key)?;
    parse_branch_folder(&system_id, &folder)
}

/// A segment or history file. `size` is the cluster's segment size, by which names are read.
pub fn parse_wal_object(cluster: &ClusterName, key: &Path, size: SegmentSize) -> Option<(WalBranch, WalObject)> {
    let [system_id, folder, name] = parts_below(&wal(cluster), key)?;
    let branch = parse_branch_folder(&system_id, &folder)?;
    if name == HISTORY {
        return Some((branch, WalObject::History));
    }
    let segment = Segment::from_file_name(&name, size).ok()?;
    Some((branch, WalObject::Segment(segment))).filter(|_| segment.timeline == branch.timeline)
}

fn parse_system_id(text: &str) -> Option<SystemId> {
    let number: u64 = text.parse().ok()?;
    Some(SystemId(number)).filter(|id| id.to_string() == text)
}

fn parse_branch_folder(system_id: &str, folder: &str) -> Option<WalBranch> {
    let (timeline, branch) = folder.split_once('-')?;
    let number = u32::from_str_radix(timeline, 16).ok()?;
    let parsed = WalBranch {
        system_id: parse_system_id(system_id)?,
        timeline: Timeline::new(number).ok()?,
        branch: branch.parse::<Branch>().ok()?,
    };
    Some(parsed).filter(|parsed| branch_folder(parsed) == folder)
}

/// The parts of a key below a prefix, if there are exactly `N`.
fn parts_below<const N: usize>(prefix: &Path, key: &Path) -> Option<[String; N]> {
    let parts: Vec<String> = key.prefix_match(prefix)?.map(|part| part.as_ref().to_owned()).collect();
    parts.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders() -> ClusterName {
        "orders".parse().unwrap()
    }

    #[test]
    fn keys_are_as_the_format_says() {
        let branch = WalBranch { system_id: SystemId(7412), timeline: Timeline(10), branch: Branch([0xAB; 8]) };
        let segment = Segment { timeline: Timeline(10), number: 257 };
        let backup: BackupId = "bk_1".parse().unwrap();
        let name = |path: Path| path.to_string();
        assert_eq!(name(log_entry(&orders(), 42)), "clusters/orders/log/00000000000000000042");
        assert_eq!(name(checkpoint(&orders(), 42)), "clusters/orders/log/00000000000000000042.checkpoint");
        assert_eq!(name(reference(&orders(), &backup)), "clusters/orders/backups/bk_1.refs");
        assert_eq!(
            name(wal_segment(&orders(), &branch, segment, SegmentSize::DEFAULT)),
            "clusters/orders/wal/7412/0000000A-abababababababab/0000000A0000000100000001"
        );
        let recipient = RecipientId([1; 32]);
        assert_eq!(
            name(domain_key(DomainId([2; 16]), 3, recipient)),
            format!("keys/{}/3/{}", "02".repeat(16), "01".repeat(32))
        );
    }

    #[test]
    fn what_is_built_is_read_back() {
        let (size, cluster) = (SegmentSize::DEFAULT, orders());
        let branch = WalBranch { system_id: SystemId(u64::MAX), timeline: Timeline(2), branch: Branch([7; 8]) };
        let segment = Segment { timeline: Timeline(2), number: 9 };
        let (backup, pack_id): (BackupId, _) = (BackupId::generate(), PackId([9; 32]));
        let key = wal_segment(&cluster, &branch, segment, size);
        assert_eq!(parse_wal_object(&cluster, &key, size), Some((branch, WalObject::Segment(segment))));
        let key = wal_history(&cluster, &branch);
        assert_eq!(parse_wal_object(&cluster, &key, size), Some((branch, WalObject::History)));
        assert_eq!(parse_wal_branch(&cluster, &wal_branch(&cluster, &branch)), Some(branch));
        assert_eq!(parse_wal_system(&cluster, &wal_system(&cluster, branch.system_id)), Some(branch.system_id));
        assert_eq!(parse_pack(&cluster, &pack(&cluster, &backup, pack_id)), Some((backup.clone(), pack_id)));
        assert_eq!(parse_session(&cluster, &session_packs(&cluster, &backup)), Some(backup));
        assert_eq!(parse_log_entry(&cluster, &log_entry(&cluster, 7)), Some(7));
        assert_eq!(parse_collect(&cluster, &collect_plan(&cluster, 7)), Some(CollectObject::Plan(7)));
        assert_eq!(parse_collect(&cluster, &collected(&cluster, 7)), Some(CollectObject::Collected(7)));
        assert_eq!(parse_collect(&cluster, &log_entry(&cluster, 7)), None);
        assert_eq!(parse_cluster(&self::cluster(&cluster)), Some(cluster));
        let key = domain_key(DomainId([2; 16]), 3, RecipientId([1; 32]));
        assert_eq!(parse_domain_key(&key), Some((DomainId([2; 16]), 3, RecipientId([1; 32]))));
    }

    #[test]
    fn pieces_of_a_segment_are_told_from_strangers() {
        let (size, cluster) = (SegmentSize::DEFAULT, orders());
        let branch = WalBranch { system_id: SystemId(7412), timeline: Timeline(2), branch: Branch([7; 8]) };
        let segment = Segment { timeline: Timeline(2), number: 9 };
        let piece = TailName { from: 0, to: 0x0100_0000, member: "pg1.db.example".into() };
        let key = tail(&cluster, &branch, (segment, size), &piece);
        assert_eq!(
            key.to_string(),
            "tails/orders/7412/00000002-0707070707070707/000000020000000000000009/00000000-01000000.pg1.db.example"
        );
        assert_eq!(parse_tail(&cluster, &branch, (segment, size), &key), Some(piece.clone()));
        assert_eq!(parse_piece(&cluster, &key, size), Some((branch, segment, piece)));
        let folder = segment_tails(&cluster, &branch, segment, size);
        assert_eq!(parse_tail_segment(&cluster, &branch, &folder, size), Some(segment));
        let strangers =
            ["0-1.pg1", "00000000-00000000.pg1", "00000000-01000001.pg1", "00000001-00000002", "0000000A-0000000B.pg1"];
        for name in strangers {
            assert_eq!(parse_tail(&cluster, &branch, (segment, size), &folder.clone().join(name)), None, "{name}");
        }
    }

    #[test]
    fn gap_notes_are_found_among_a_branch_s_objects() {
        let (size, cluster) = (SegmentSize::DEFAULT, orders());
        let wal = WalBranch { system_id: SystemId(7412), timeline: Timeline(2), branch: Branch([7; 8]) };
        let note = GapNoteName { wal, from: Lsn(0x1_0000_0000), to: Lsn(0x1_0300_0000), tag: 0xabc };
        let key = gap_note(&cluster, &note);
        assert_eq!(
            key.to_string(),
            "clusters/orders/wal/7412/00000002-0707070707070707/gaps/0000000100000000-0000000103000000.0000000000000abc"
        );
        assert_eq!((parse_gap_note(&cluster, &key), parse_wal_object(&cluster, &key, size)), (Some(note), None));
        let folder = wal_branch(&cluster, &wal);
        for name in ["0000000100000000-0000000100000000.0000000000000abc", "1-2.3", "0000000000000001-0000000000000002"]
        {
            assert_eq!(parse_gap_note(&cluster, &folder.clone().join("gaps").join(name)), None, "{name}");
        }
        assert_eq!(parse_gap_note(&cluster, &folder.join("partial").join(note.to_string())), None);
    }

    #[test]
    fn strangers_are_not_taken_for_ours() {
        let (cluster, size) = (orders(), SegmentSize::DEFAULT);
        assert_eq!(parse_log_entry(&cluster, &checkpoint(&cluster, 7)), None);
        for key in [
            "clusters/orders/wal/7412/00000002-0707070707070707/000000010000000000000009",
            "clusters/orders/wal/7412/00000002-0707070707070707/partial/000000020000000000000009.0011223344556677",
            "clusters/orders/wal/07412/00000002-0707070707070707/history",
            "clusters/orders/wal/7412/0000000a-0707070707070707/history",
            "clusters/other/wal/7412/00000002-0707070707070707/history",
            "clusters/orders/wal/7412/catalog/1.1",
        ] {
            assert_eq!(parse_wal_object(&cluster, &Path::from(key), size), None, "{key}");
        }
    }
}
