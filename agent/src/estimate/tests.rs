use super::*;

const MB: u64 = 1_000_000;

fn phases(of: &[(&str, f64)]) -> Vec<PhaseCost> {
    of.iter().map(|(phase, seconds)| PhaseCost { phase: (*phase).to_owned(), seconds: *seconds, bytes: 0 }).collect()
}

fn backup_of(day: i64, host: &str, read: Reads, cluster_mb: u64, read_mb: u64, copy: f64) -> Past {
    Past {
        host: host.to_owned(),
        finished_at: Timestamp::from_second(day * 86_400).unwrap(),
        cluster_bytes: cluster_mb * MB,
        requests: read_mb,
        seconds: copy + 2.0,
        phases: phases(&[("checkpoint", 0.5), ("copy", copy), ("wait for wal", 1.0), ("commit", 0.5)]),
        work: PastWork::Backup {
            backup: format!("bk_{day}").parse().unwrap(),
            read,
            read_bytes: read_mb * MB,
            stored_bytes: read_mb * MB / 4,
        },
    }
}

fn restore_of(day: i64, host: &str, cluster_mb: u64, copy: f64, (wal_mb, replay): (u64, f64), delta: bool) -> Past {
    Past {
        host: host.to_owned(),
        finished_at: Timestamp::from_second(day * 86_400).unwrap(),
        cluster_bytes: cluster_mb * MB,
        requests: 90,
        seconds: copy + replay,
        phases: phases(&[("restore", copy - 0.5), ("finish", 0.5), ("replay", replay)]),
        work: PastWork::Restore { wal_bytes: wal_mb * MB, delta },
    }
}

#[test]
fn backups_of_changes_are_judged_by_their_like_and_one_odd_night_moves_nothing() {
    let mut past: Vec<Past> = (1..=5).map(|day| backup_of(day, "db1", Reads::Changes, 1000, 20, 3.0)).collect();
    past.push(backup_of(6, "db1", Reads::Changes, 1000, 900, 60.0));
    past.push(backup_of(7, "db1", Reads::First, 1000, 1000, 40.0));
    let found = backup(&past, Reads::Changes, 1000 * MB, "db1").unwrap();
    assert_eq!((found.read_bytes, found.stored_bytes, found.store_requests), (20 * MB, Some(5 * MB), Some(20)));
    assert_eq!((found.expected.seconds, found.expected.moved_bytes), (5.0, Some(20 * MB)));
    assert_eq!(found.expected.basis, "the last 5 backups that read what changed");
    assert_eq!(found.expected.phase_seconds("wait for wal"), Some(1.0));
}

#[test]
fn reading_everything_grows_with_the_cluster() {
    let past = [backup_of(1, "db1", Reads::All, 1000, 1000, 40.0), backup_of(2, "db1", Reads::Changes, 1900, 20, 3.0)];
    let found = backup(&past, Reads::All, 2000 * MB, "db1").unwrap();
    assert_eq!((found.read_bytes, found.stored_bytes), (2000 * MB, Some(500 * MB)));
    assert_eq!(found.expected.phase_seconds("copy"), Some(80.0));
    assert_eq!(found.expected.phase_seconds("commit"), Some(0.5), "which does not");
    assert_eq!(found.expected.basis, "the last backup that read everything");
}

#[test]
fn what_a_first_backup_stored_says_nothing_of_a_later_one() {
    let past = [backup_of(1, "db1", Reads::First, 1000, 1000, 40.0)];
    let found = backup(&past, Reads::All, 1000 * MB, "db1").unwrap();
    assert_eq!((found.read_bytes, found.stored_bytes, found.store_requests), (1000 * MB, None, None));
    assert_eq!(backup(&past, Reads::Changes, 1000 * MB, "db1"), None, "nor how much changes");
    assert_eq!(backup(&[], Reads::All, 1000 * MB, "db1"), None);
}

#[test]
fn this_host_is_asked_before_others() {
    let past = [restore_of(2, "lab1", 1000, 10.0, (0, 0.0), false), restore_of(1, "lab2", 1000, 50.0, (0, 0.0), false)];
    let needs = RestoreNeeds { cluster_bytes: 2000 * MB, wal_bytes: 0 };
    let here = restore(&past, needs, "lab2").unwrap();
    assert_eq!((here.seconds, here.basis.as_str()), (100.0, "the last restore"));
    let elsewhere = restore(&past, needs, "lab3").unwrap();
    assert_eq!(elsewhere.basis, "the last 2 restores on other hosts");
}

#[test]
fn replay_counts_by_its_bytes_and_is_named_where_nobody_measured_it() {
    let needs = |wal_mb| RestoreNeeds { cluster_bytes: 1000 * MB, wal_bytes: wal_mb * MB };
    let past = [restore_of(1, "lab1", 1000, 10.0, (100, 4.0), false)];
    assert_eq!(restore(&past, needs(300), "lab1").unwrap().seconds, 22.0);
    assert_eq!(restore(&past, needs(1), "lab1").unwrap().seconds, 14.0, "no start was quicker");
    let unmeasured = [restore_of(1, "lab1", 1000, 10.0, (0, 0.0), false)];
    let found = restore(&unmeasured, needs(300), "lab1").unwrap();
    assert_eq!((found.seconds, found.basis.as_str()), (10.0, "the last restore, without replay"));
}

#[test]
fn without_a_restore_backups_that_read_everything_speak_and_say_so() {
    let needs = RestoreNeeds { cluster_bytes: 1000 * MB, wal_bytes: 0 };
    let mut past =
        vec![backup_of(1, "db1", Reads::First, 500, 500, 20.0), backup_of(2, "db1", Reads::Changes, 1000, 1, 1.0)];
    // Over a copy much may have been right already.
    past.push(restore_of(3, "lab1", 1000, 1.0, (0, 0.0), true));
    let found = restore(&past, needs, "lab1").unwrap();
    assert_eq!(found.seconds, 40.0);
    assert_eq!(found.basis, "the last backup that read everything on another host, since no restore is known");
    assert_eq!(restore(&past[1..], needs, "lab1"), None, "changes say nothing of the whole");
}

#[test]
fn nonsense_in_history_gives_no_nonsense() {
    let mut odd = restore_of(1, "lab1", 0, 10.0, (u64::MAX / MB, f64::NAN), false);
    let needs = RestoreNeeds { cluster_bytes: u64::MAX, wal_bytes: u64::MAX };
    assert_eq!(restore(std::slice::from_ref(&odd), needs, "lab1"), None);
    odd.cluster_bytes = 1;
    assert!(restore(&[odd], needs, "lab1").is_none_or(|found| !found.seconds.is_nan()));
}
