//! The scan against trees that hold every case of the rules. (Against pg_basebackup's own choice: `manifest_json`.)

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

struct Tree {
    _dir: tempfile::TempDir,
    data_dir: PathBuf,
    outside: PathBuf,
}

impl Tree {
    fn new(paths: &[&str]) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let (data_dir, outside) = (dir.path().join("data"), dir.path().join("outside"));
        fs::create_dir_all(&data_dir).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o750)).unwrap();
        let tree = Tree { _dir: dir, data_dir, outside };
        tree.add("pg_tblspc/");
        tree.add("global/pg_control");
        paths.iter().for_each(|path| tree.add(path));
        tree
    }

    /// A file with its path as content; with a slash at the end, a directory.
    fn add(&self, path: &str) {
        let absolute = self.data_dir.join(path);
        if path.ends_with('/') {
            fs::create_dir_all(absolute).unwrap();
        } else {
            fs::create_dir_all(absolute.parent().unwrap()).unwrap();
            fs::write(absolute, path).unwrap();
        }
    }

    fn scan(&self) -> Scan {
        let without_content = vec!["log".into(), self.data_dir.join("more/log"), "global".into()];
        Scan::new(ScanSpec { data_dir: self.data_dir.clone(), major: 18, catalog_version: 202506291, without_content })
            .unwrap()
    }

    fn paths(&self) -> Vec<String> {
        let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
        let line = |scanned| match scanned {
            Scanned::File(file) if file.kind == ScannedKind::Directory => text(&file.path) + "/",
            Scanned::File(file) => text(&file.path),
            Scanned::Omitted(omitted) => text(&omitted.path) + "?",
        };
        self.scan().map(|scanned| line(scanned.unwrap())).collect()
    }
}

#[test]
fn what_pg_basebackup_leaves_out_is_left_out_and_the_rest_is_there_in_order() {
    let tree = Tree::new(&[
        "PG_VERSION",
        "backup_label",
        "backup_label.old",
        "base/1/112",
        "base/1/112_fsm",
        "base/1/pg_internal.init.77",
        "base/1/t3_16400",
        "base/1-x",
        "base/13/16384",
        "base/13/16384.1",
        "base/13/16384_init",
        "base/13/16384_vm",
        "base/13/16385",
        "base/pgsql_tmp/pgsql_tmp1.0",
        "current_logfiles.tmp",
        "extension/t3_16400",
        "global/1260",
        "global/pg_internal.init",
        "log/today.log",
        "lost+found/x",
        "more/log/today.log",
        "pg_notify/0000",
        "pg_replslot/one/state",
        "pg_stat/pgstat.stat",
        "pg_subtrans/0000",
        "pg_wal/000000010000000000000001",
        "pg_wal/archive_status/x.ready",
        "postgresql.auto.conf",
        "postgresql.auto.conf.tmp",
        "postmaster.opts",
        "postmaster.pid",
        "tablespace_map",
    ]);
    let expected = [
        "PG_VERSION",
        "backup_label.old",
        "base/",
        "base/1/",
        "base/1-x",
        "base/1/112",
        "base/1/112_fsm",
        "base/13/",
        "base/13/16384_init",
        "base/13/16385",
        "extension/",
        "extension/t3_16400",
        "global/",
        "global/1260",
        "log/",
        "lost+found?",
        "more/",
        "more/log/",
        "pg_notify/",
        "pg_replslot/",
        "pg_stat/",
        "pg_stat/pgstat.stat",
        "pg_subtrans/",
        "pg_tblspc/",
        "pg_wal/",
        "pg_wal/archive_status/",
        "pg_wal/summaries/",
        "postgresql.auto.conf",
    ];
    assert_eq!(tree.paths(), expected);
    let control = tree.scan().pg_control().unwrap();
    assert_eq!((control.path.as_slice(), control.size), (&b"global/pg_control"[..], 17));
}

#[test]
fn paths_ascend_in_byte_order_whatever_the_names() {
    let tree = Tree::new(&["a/b", "a-b", "a.b/c", "a!", "a/b-c", "a/b.d/e", "a0/"]);
    tree.add("base/5/weird \u{fc}\n\"name");
    fs::write(tree.data_dir.join(OsStr::from_bytes(b"\xff\xfe")), "x").unwrap();
    let paths: Vec<Vec<u8>> = tree
        .scan()
        .map(|scanned| match scanned.unwrap() {
            Scanned::File(file) => file.path,
            Scanned::Omitted(omitted) => omitted.path,
        })
        .collect();
    assert!(paths.is_sorted(), "{paths:?}");
    assert!(paths.contains(&b"\xff\xfe".to_vec()));
}

#[test]
fn tablespaces_are_read_once_and_only_where_they_belong_to_this_release() {
    let tree = Tree::new(&[
        "inside/PG_18_202506291/5/16390",
        "pg_tblspc/16402/PG_18_202506291/5/16391",
        "pg_tblspc/16402/PG_17_202406281/5/16391",
        "pg_tblspc/strange/x",
    ]);
    let outside = tree.outside.join("PG_18_202506291/5");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("16392.1"), "rows").unwrap();
    fs::create_dir_all(tree.outside.join("PG_13_202007201/5")).unwrap();
    symlink(&tree.outside, tree.data_dir.join("pg_tblspc/16400")).unwrap();
    symlink(tree.data_dir.join("inside"), tree.data_dir.join("pg_tblspc/16401")).unwrap();
    let expected = [
        "global/",
        "inside/",
        "pg_tblspc/",
        "pg_tblspc/16400/PG_18_202506291/",
        "pg_tblspc/16400/PG_18_202506291/5/",
        "pg_tblspc/16400/PG_18_202506291/5/16392.1",
        "pg_tblspc/16401/PG_18_202506291/",
        "pg_tblspc/16401/PG_18_202506291/5/",
        "pg_tblspc/16401/PG_18_202506291/5/16390",
        "pg_tblspc/16402/",
        "pg_tblspc/16402/PG_18_202506291/",
        "pg_tblspc/16402/PG_18_202506291/5/",
        "pg_tblspc/16402/PG_18_202506291/5/16391",
        "pg_tblspc/strange?",
    ];
    assert_eq!(tree.paths(), expected);
    let scan = tree.scan();
    let locations: Vec<_> = scan.tablespaces().iter().map(|space| (space.oid, space.location.clone())).collect();
    let inside = tree.data_dir.join("inside");
    assert_eq!(locations, [(16400, Some(tree.outside.clone())), (16401, Some(inside)), (16402, None)]);
    let relation = scan.filter_map(|scanned| match scanned.unwrap() {
        Scanned::File(ScannedFile { kind: ScannedKind::Relation(relation), .. }) => Some(relation),
        _ => None,
    });
    let places: Vec<_> =
        relation.map(|relation| (relation.tablespace, relation.database, relation.file.segment)).collect();
    assert_eq!(places, [(16400, 5, 1), (16401, 5, 0), (16402, 5, 0)]);
}

#[test]
fn a_tablespace_that_is_not_mounted_is_an_error_not_an_empty_directory() {
    let tree = Tree::new(&[]);
    symlink(&tree.outside, tree.data_dir.join("pg_tblspc/16400")).unwrap();
    let error = tree.scan().find_map(Result::err).expect("an error");
    assert!(matches!(error, ScanError::TablespaceContent { oid: 16400, .. }), "{error}");
    fs::remove_dir(&tree.outside).unwrap();
    let error = tree.scan().find_map(Result::err).expect("an error");
    assert!(matches!(error, ScanError::TablespaceContent { oid: 16400, .. }), "{error}");
}

#[test]
fn links_are_followed_for_pg_wal_only_and_never_in_silence() {
    let tree = Tree::new(&["base/1/112"]);
    fs::write(tree.outside.join("000000010000000000000001"), "wal").unwrap();
    symlink(&tree.outside, tree.data_dir.join("pg_wal")).unwrap();
    symlink("/etc/postgresql.conf", tree.data_dir.join("postgresql.conf")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, tree.data_dir.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let paths = tree.paths();
    let rest: Vec<&str> = paths.iter().map(String::as_str).skip_while(|path| *path != "global/").collect();
    let expected = [
        "global/",
        "pg_tblspc/",
        "pg_wal/",
        "pg_wal/archive_status/",
        "pg_wal/summaries/",
        "pipe?",
        "postgresql.conf?",
    ];
    assert_eq!(rest, expected);
    let mode = tree.scan().find_map(|scanned| match scanned.unwrap() {
        Scanned::File(file) if file.path == b"pg_wal" => Some(file.mode),
        _ => None,
    });
    assert_eq!(mode, Some(0o750), "a directory in the place of a link has the data directory's mode");

    symlink(&tree.outside, tree.data_dir.join("base/16384")).unwrap();
    let error = tree.scan().find_map(Result::err).expect("an error");
    assert!(matches!(error, ScanError::LinkInPlace { .. }), "{error}");
}

#[test]
fn what_vanishes_meanwhile_is_passed_over() {
    let tree = Tree::new(&["base/1/112", "base/1/113", "base/2/114"]);

    let mut paths = Vec::new();
    for scanned in tree.scan() {
        let Scanned::File(file) = scanned.unwrap() else { continue };
        if file.path == b"base/1/112" {
            fs::remove_dir_all(tree.data_dir.join("base/1")).unwrap();
            fs::remove_dir_all(tree.data_dir.join("base/2")).unwrap();
        }
        paths.push(String::from_utf8(file.path).unwrap());
    }
    assert_eq!(paths, ["base", "base/1", "base/1/112", "global", "pg_tblspc"]);
}
