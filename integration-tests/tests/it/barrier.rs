//! The measure itself is measured: restored by PostgreSQL's own means, each kind of target yields the barrier's state.

use walfleet_integration_tests::postgres::barrier::{Barrier, Barriers, OwnRow};
use walfleet_integration_tests::postgres::dataset::Dataset;
use walfleet_integration_tests::postgres::load::Load;
use walfleet_integration_tests::postgres::{PgServer, PgVersion};
use walfleet_integration_tests::process::run;
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::{os_user, wait_for};

use std::time::Duration;

#[test]
fn a_barrier_is_what_recovery_reaches_by_time_lsn_name_and_xid() {
    for major in [13, 18] {
        in_scratch(|scratch| {
            let version = PgVersion::of(major)?;
            let archive = scratch.dir("archive")?;
            let primary = PgServer::builder(scratch, "primary", &version)
                .setting("archive_mode", "on")
                .setting("archive_command", format!("cp %p {}/%f", archive.display()))
                .create()?;
            let dataset = Dataset { scale: 1 };
            dataset.create(&primary)?;
            let mut barriers = Barriers::install(&primary)?;
            let mut load = Load::start(scratch, &primary, &dataset, 4, None)?;
            let base = scratch.join("base");
            let mut backup = primary.client("pg_basebackup");
            backup.args(["-c", "fast", "-X", "none", "-D"]).arg(&base);
            run(backup)?;
            let mut passed = Vec::new();
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(300));
                passed.push(barriers.pass()?);
            }
            std::thread::sleep(Duration::from_millis(300));
            assert!(load.is_running()?);
            load.stop()?;
            barriers.switch_wal()?;

            let middle = &passed[1];
            for (kind, target, own) in targets(middle) {
                let restored_dir = scratch.join(kind);
                let mut copy = os_user::os_user().command("cp");
                copy.arg("-a").arg(&base).arg(&restored_dir);
                run(copy)?;
                os_user::os_user().write(&restored_dir.join("recovery.signal"), "")?;
                let mut builder = PgServer::builder(scratch, &format!("from-{kind}"), &version)
                    .setting("archive_mode", "off")
                    .setting("restore_command", format!("cp {}/%f %p", archive.display()));
                for (name, value) in target {
                    builder = builder.setting(name, value);
                }
                let mut restored = builder.open(&restored_dir)?;
                restored.start()?;
                let session = restored.session()?;
                wait_for("recovery to pause", Duration::from_secs(30), || {
                    Ok(session.is_true("SELECT pg_is_wal_replay_paused()")?.then_some(()))
                })?;
                middle.must_be_state_of(&session, own)?;
            }
            Ok(())
        });
    }
}

type Target<'a> = (&'static str, Vec<(&'static str, String)>, OwnRow);

fn targets(barrier: &Barrier) -> Vec<Target<'_>> {
    let exclusive = || ("recovery_target_inclusive", "off".to_owned());
    let xid = || ("recovery_target_xid", barrier.xid.to_string());
    vec![
        ("time", vec![("recovery_target_time", barrier.time.clone())], OwnRow::Absent),
        ("lsn", vec![("recovery_target_lsn", barrier.lsn.to_string())], OwnRow::Absent),
        ("name", vec![("recovery_target_name", barrier.name.clone())], OwnRow::Absent),
        ("xid", vec![xid()], OwnRow::Present),
        ("xid-exclusive", vec![xid(), exclusive()], OwnRow::Absent),
    ]
}
