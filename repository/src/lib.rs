//! The stored format and its engine: what lies in a bucket, and the rules by which many hosts write it at once and anyone
//! with the key restores from it. Knows no PostgreSQL process, and no network beyond the object store.
//!
//! **Nothing is overwritten and, so far, nothing is deleted.** Every object is created once, atomically, under a name of
//! its own ([`layout`]). So readers need no locks: what was there stays as it was. One thing changes, each cluster's log
//! ([`cluster_log`]), and it changes by creating the next number. What the log says exists; all else is either not there
//! yet or garbage that nothing refers to.
//!
//! **Bottom-up.** What is referred to is durable before the reference: wrapped keys before [`Begin`], a history file before
//! its timeline's segments, packs before the manifest, manifest, reference part and WAL before [`Commit`]. A crash between
//! two steps leaves objects that nobody names.
//!
//! **Two kinds of objects.** In clear and signed: what one without a key must know, or decide by ([`format::clear`],
//! [`signature`]). Sealed: content, and what tells of content ([`format::sealed`]). Both are published, byte for byte, in
//! `docs/format.md`.
//!
//! # What may run at the same time
//!
//! In any number of processes on any number of hosts, without a lock between them. A lost reply of a create is settled by
//! reading the object back ([`store::Store::create`]).
//!
//! | operation | at the same time as | why that is safe |
//! |---|---|---|
//! | make a repository ([`open::Repository::init`]) | others that make the same one | one root object is created; its random id tells whose; the others take it if its keys are theirs, and refuse it else |
//! | begin a cluster ([`cluster::OpenCluster::open_or_begin`]) | others that begin it | each wraps a key of its own first; the first `Begin` names the cluster's, and the others' keys seal nothing |
//! | append to a log ([`cluster_log::ClusterLog::append`]) | any other append | an entry is decided on exactly the prefix that it follows: if another took the number, the decision is made again on what is there then |
//! | grant a key ([`keyring::Keyring::grant`]) | others that grant it, to the same recipient too | one object for each recipient; whichever wrap is there opens the same key |
//! | store a segment ([`wal_archive::WalArchive::put_segment`]) | the same or another segment from any member | created once; who finds it there compares content ids: the same records are the same segment, others are an error and overwrite nothing |
//! | store a history | the same from any member | its name holds the hash of its content |
//! | note what is known of a gap ([`gap_notes::store`]) | anything, the gap's being filled too | a name of its own; it says why WAL is missing, and counts only as long as it is |
//! | tell where `wal_level` changed (`wal_archive/levels.rs`) | the same from any member | its name says all of it; it is there before the WAL that it is about, so that whoever sees that sees it |
//! | a backup session ([`backup::commit::BackupSession`]) | other sessions of the same cluster, and of the same run | packs lie under the session's own name; it refers only to packs of parents that were live at its `Open`; of two that serve one run the log lets one open |
//! | abort another's session | that session, still writing | its `Commit` is void from then on, and no later session can name its packs |
//! | expire, bring back, purge, hold, trim, borrow, move (entries, not deletions) | anything above | each has rules in the fold that a model check needs ([`cluster_log::fold`]); an entry that breaks one is void for every reader alike |
//! | restore, verify, list, compute windows | anything above | they act on a prefix of a log, whose objects were durable before; a listing of WAL that misses the newest segment promises less, never more |
//! | probe a store ([`store::probe`]) | anything | it touches nothing but a random name below `probe/` |
//! | remove garbage ([`collect::collect`]) | anything above, other collectors too | what the log does not need at one prefix no later entry can name ([`collect::needs`]); restores under way have the plan's time, and those the keeper knows of a hold |
//! | remove superseded pieces ([`superseded::remove`]) | the same | what takes their place was there all the time |
//!
//! Within a process: [`store::Store`], [`open::Repository`], [`cluster::OpenCluster`] and [`wal_archive::WalArchive`] are
//! cheap to clone and shared freely; a [`cluster_log::ClusterLog`] is one position and used by one task at a time; of one
//! [`backup::write::PackSession`] each thread has a [`backup::write::ChunkWriter`] of its own.
//!
//! # What a writer may, and what a reader believes
//!
//! Whoever can create objects can create any object. So nothing is believed for lying there: an entry counts if its signer's
//! certificates lead to the root key and the fold lets it ([`signature::TrustRoot`], [`cluster_log::Rule`]), a reference
//! part and a manifest if the log names their digests, a domain key if the log commits to it ([`keyring`]), a frame if it
//! opens under its own object's key and name, a chunk if it is what its id says. An entry of a stranger is passed over; one
//! that is damaged stops, since nothing may be decided on a log with a hole.
//!
//! [`Begin`]: format::log_entry::Action::Begin
//! [`Commit`]: format::log_entry::Action::Commit

pub mod backup;
pub mod checksum;
pub mod cluster;
pub mod cluster_log;
pub mod collect;
pub mod crypto;
pub mod format;
pub mod gap_notes;
pub mod ids;
pub mod kept;
pub mod key_file;
pub mod keyring;
pub mod layout;
pub mod limits;
pub mod lineage;
pub mod open;
pub mod postgres;
pub mod recovery_window;
pub mod replicate;
pub mod retention;
pub mod shipping;
pub mod signature;
pub mod store;
pub mod superseded;
pub mod verify;
pub mod wal_archive;
pub mod wal_catalog;
