//! On made-up directories, and on a real server through its life and death.

use std::fs;
use std::time::Duration;

use tokio_postgres::config::Host;

use super::*;
use crate::postgres::test_server::{TestServer, installations, oldest_and_newest};

#[test]
fn a_pid_file_reads_whole_and_unfinished() {
    let whole = b"4711\n/srv/pg\n1780583519\n5433\n/run/postgresql\n*\n  1082011     98304\nready   \n";
    let postmaster = Postmaster::parse(whole).unwrap();
    let expected = Postmaster {
        pid: 4711,
        data_dir: "/srv/pg".into(),
        started_at: 1_780_583_519,
        port: 5433,
        socket_dir: Some("/run/postgresql".into()),
        listen_address: Some("*".to_owned()),
        shared_memory: Some(98_304),
        status: PostmasterStatus::Ready,
    };
    assert_eq!(postmaster, expected);
    let young = Postmaster::parse(b"-4711\n/srv/pg\n1780583519\n5433\n\n").unwrap();
    assert_eq!((young.pid, young.socket_dir, young.status), (4711, None, PostmasterStatus::Unknown));
    for (text, line) in [("", 1), ("0\n", 1), ("x\n/d\n", 1), ("1\n/d\nyesterday\n", 3), ("1\n/d\n2\n99999\n", 4)] {
        assert_eq!(Postmaster::parse(text.as_bytes()).unwrap_err().line, line, "{text:?}");
    }
}

#[test]
fn only_data_directories_of_supported_releases_are_instances() {
    let dir = tempfile::tempdir().unwrap();
    let error = inspect(dir.path()).unwrap_err();
    assert!(matches!(error, InstanceError::Read { .. }) && error.to_string().contains("HINT"), "{error}");
    for (text, is_known) in
        [("18\n", true), ("13", true), ("9.6\n", false), ("12\n", false), ("", false), ("x\n", false)]
    {
        fs::write(dir.path().join("PG_VERSION"), text).unwrap();
        assert_eq!(inspect(dir.path()).is_ok(), is_known, "{text:?}");
    }
}

#[test]
fn a_pid_that_another_process_took_over_is_no_server() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("PG_VERSION"), "18\n").unwrap();
    let pid_file = dir.path().join("postmaster.pid");
    fs::write(&pid_file, format!("{}\n{}\n", std::process::id(), dir.path().display())).unwrap();
    assert!(inspect(dir.path()).unwrap().is_stopped());
    fs::write(&pid_file, "").unwrap();
    assert!(inspect(dir.path()).unwrap().is_stopped());
    fs::write(&pid_file, "garbage").unwrap();
    assert!(matches!(inspect(dir.path()).unwrap_err(), InstanceError::PidFile { .. }));
}

#[test]
fn a_server_is_found_while_it_runs_and_gone_when_all_of_it_is() {
    for installation in oldest_and_newest() {
        let server = TestServer::start(&installation, &[], "");
        let found = discover(&[]);
        let (_, instance) = found.into_iter().find(|(path, _)| *path == server.data_dir).expect("a running server");
        let instance = instance.unwrap();
        assert_eq!(instance.major, installation.major);
        let InstanceState::Running(postmaster) = &instance.state else { panic!("{instance:?}") };
        assert_eq!((postmaster.port, postmaster.status), (server.port, PostmasterStatus::Ready));
        assert_eq!(postmaster.socket_dir, Some(server.folder()));
        assert_eq!(process::executable_dir(postmaster.pid), installation.bin.canonicalize().ok());
        assert!(process::is_shared_memory_attached(postmaster.shared_memory.unwrap()));
        let connection: tokio_postgres::Config = instance.connection_string().unwrap().parse().unwrap();
        assert_eq!(connection.get_hosts(), [Host::Unix(server.folder())]);
        assert_eq!(connection.get_ports(), [server.port]);

        let pid = rustix::process::Pid::from_raw(postmaster.pid as i32).unwrap();
        // A stopped child outlives its postmaster: the data are still in use.
        let child = process::servers_in(&server.data_dir).into_iter().find(|pid| *pid != postmaster.pid).unwrap();
        let child = rustix::process::Pid::from_raw(child as i32).unwrap();
        rustix::process::kill_process(child, rustix::process::Signal::STOP).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let state = inspect(&server.data_dir).unwrap().state;
        assert!(matches!(state, InstanceState::Orphaned { .. }), "{state:?}");
        rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
        let gone = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(50));
            inspect(&server.data_dir).unwrap().is_stopped()
        });
        assert!(gone, "its pid file does not make it run");
        fs::remove_file(server.data_dir.join("postmaster.pid")).unwrap();
    }
}

#[test]
fn programs_are_found_by_their_own_word() {
    let installations = installations();
    for installation in &installations {
        let folder = installation.bin.parent().unwrap().to_owned();
        for extra in [&folder, &installation.bin] {
            let found = find_bin_dir(installation.major, std::slice::from_ref(extra)).unwrap();
            assert_eq!(found, installation.bin);
        }
    }
    let extra: Vec<PathBuf> = installations.into_iter().map(|installation| installation.bin).collect();
    let error = find_bin_dir(99, &extra).unwrap_err().to_string();
    assert!(error.contains("PostgreSQL 99") && error.contains("/usr/pgsql-99/bin"), "{error}");
}
