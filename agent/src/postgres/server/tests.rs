//! Against real servers of every installed release.

use super::*;
use crate::postgres::backup_label::BackupSource;
use crate::postgres::control::{ClusterState, ControlFile};
use crate::postgres::test_server::{Installation, TestServer, installations, oldest_and_newest};

#[tokio::test]
async fn facts_and_backups_of_a_primary_and_its_standby() {
    for installation in installations() {
        let primary = TestServer::start(&installation, &["--wal-segsize=1"], "archive_command='/bin/true'");
        let server = Server::connect(&primary.connection_string()).await.unwrap();
        let facts = server.facts().await.unwrap();
        assert_eq!((server.major(), facts.role, facts.timeline.0), (installation.major, ServerRole::Primary, 1));
        assert_eq!(facts.wal_segment_size.bytes(), 1 << 20);
        assert_eq!(facts.data_directory.as_deref(), Some(primary.data_dir.as_path()));
        assert_eq!(facts.data_checksums, installation.major >= 18);
        assert_eq!((facts.archive.mode.as_str(), facts.archive.command), ("off", None));
        assert!(server.cluster_bytes().await.unwrap().unwrap() > 10 << 20);
        assert_eq!(server.rights().await.unwrap().missing_grants, Vec::<String>::new());

        let session = server.start_backup("walfleet test: é", CheckpointPace::Fast).await.unwrap();
        let start_lsn = session.start_lsn;
        let stop = session.stop().await.unwrap();
        assert_eq!((stop.label.start_lsn, stop.label.source), (start_lsn, BackupSource::Primary));
        assert_eq!(stop.label.label, "walfleet test: é");
        assert!(stop.stop_lsn > start_lsn && stop.tablespace_map.is_empty());
        assert!(stop.label_file.ends_with(b"\n"));

        let is_either = oldest_and_newest().iter().any(|either| either.major == installation.major);
        if is_either && installation.has("pg_basebackup") {
            on_a_standby(&installation, &primary).await;
        }
    }
}

async fn on_a_standby(installation: &Installation, primary: &TestServer) {
    let standby = TestServer::create(installation);
    let (host, data_dir) = (primary.folder().display().to_string(), standby.data_dir.display().to_string());
    installation
        .run("pg_basebackup", &["-h", &host, "-U", "postgres", "-D", &data_dir, "-R", "-X", "stream", "-c", "fast"]);
    standby.configure("");
    standby.launch();
    let server = Server::connect(&standby.connection_string()).await.unwrap();
    let facts = server.facts().await.unwrap();
    assert_eq!((facts.role, facts.timeline.0), (ServerRole::Standby, 1));
    let error = server.switch_wal().await.unwrap_err();
    assert!(matches!(error, ServerError::Refused { .. }), "{error}");
    primary.sql(&["CHECKPOINT"]).await;
    let session = server.start_backup("from a standby", CheckpointPace::Fast).await.unwrap();
    let stop = session.stop().await.unwrap();
    assert_eq!((stop.label.source, stop.timeline.0), (BackupSource::Standby, 1));
    let control = ControlFile::read(&standby.data_dir).unwrap();
    assert_eq!(control.state, ClusterState::InArchiveRecovery);
    let (min_recovery, timeline) = control.min_recovery.unwrap();
    assert!(min_recovery >= stop.stop_lsn && timeline.0 == 1, "the copy of pg_control ends the backup");

    installation.run("pg_ctl", &["-D", &data_dir, "-w", "promote"]);
    let server = Server::connect(&standby.connection_string()).await.unwrap();
    let facts = server.facts().await.unwrap();
    assert_eq!((facts.role, facts.timeline.0), (ServerRole::Primary, 2));
}

#[tokio::test]
async fn an_unprivileged_role_is_told_what_to_grant_and_then_works() {
    for installation in oldest_and_newest() {
        let primary = TestServer::start(&installation, &[], "");
        primary.sql(&["CREATE ROLE \"Wal Fleet\" LOGIN"]).await;
        let connection = local_connection_string(&primary.folder(), primary.port, "Wal Fleet");
        let server = Server::connect(&connection).await.unwrap();
        let rights = server.rights().await.unwrap();
        assert_eq!((rights.user.as_str(), rights.superuser, rights.missing_grants.len()), ("Wal Fleet", false, 4));
        assert_eq!(server.facts().await.unwrap().data_directory, None);
        assert_eq!(server.cluster_bytes().await.unwrap(), None);
        let switch = server.switch_wal().await.unwrap_err();
        assert!(matches!(&switch, ServerError::MissingRight { grant, .. } if rights.missing_grants.contains(grant)));
        let start = server.start_backup("x", CheckpointPace::Fast).await.unwrap_err();
        let ServerError::MissingRight { grant, .. } = &start else { panic!("{start}") };

        let grants: Vec<&str> = rights.missing_grants.iter().map(String::as_str).chain([grant.as_str()]).collect();
        primary.sql(&grants).await;
        let server = Server::connect(&connection).await.unwrap();
        assert_eq!(server.rights().await.unwrap().missing_grants, Vec::<String>::new());
        assert!(server.facts().await.unwrap().data_directory.is_some());
        server.switch_wal().await.unwrap();
        server.start_backup("x", CheckpointPace::Fast).await.unwrap().stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_backup_whose_session_is_lost_says_so_at_once_and_at_its_end() {
    let Some(installation) = installations().pop() else { return };
    let primary = TestServer::start(&installation, &[], "");
    let start = async || {
        let server = Server::connect(&primary.connection_string()).await.unwrap();
        server.start_backup("x", CheckpointPace::Fast).await.unwrap()
    };
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walfleet-agent'";
    let session = start().await;
    let never = tokio::time::timeout(Duration::from_millis(100), session.lost()).await;
    assert!(never.is_err(), "an idle session is not lost");
    primary.sql(&[kill]).await;
    let error = tokio::time::timeout(Duration::from_secs(5), session.lost()).await.expect("noticed at once");
    assert!(matches!(error, ServerError::Lost { operation: "hold the backup", .. }));
    let error = session.stop().await.unwrap_err();
    assert!(matches!(error, ServerError::Lost { .. }) && error.is_transient(), "{error:?}");

    let session = start().await;
    primary.stop("immediate");
    let error = session.stop().await.unwrap_err();
    assert!(matches!(error, ServerError::Lost { .. }), "{error:?}");
    let error = Server::connect(&primary.connection_string()).await.unwrap_err();
    assert!(matches!(error, ServerError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn refusals_to_connect_are_told_apart() {
    let Some(installation) = installations().pop() else { return };
    let primary = TestServer::start(&installation, &[], "");
    primary.sql(&["CREATE ROLE secret LOGIN PASSWORD 'right'", "CREATE ROLE nobody"]).await;
    let hba = "local all secret scram-sha-256\nlocal all refused reject\nlocal all all trust\n";
    std::fs::write(primary.data_dir.join("pg_hba.conf"), hba).unwrap();
    primary.sql(&["SELECT pg_reload_conf()"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let connect = async |user: &str, more: &str| {
        let connection = local_connection_string(&primary.folder(), primary.port, user) + more;
        Server::connect(&connection).await.map(|_| ())
    };
    connect("secret", " password=right").await.unwrap();
    for (user, more, says) in [
        ("secret", " password=wrong", "password"),
        ("secret", "", "password"),
        ("refused", "", "pg_hba"),
        ("nobody", "", "LOGIN"),
        ("absent", "", "absent"),
        ("postgres", " dbname=none", "existing database"),
        ("postgres", " sslmode=require", "sslmode=disable"),
    ] {
        let error = connect(user, more).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ServerError::Rejected { .. }) && text.contains(says), "{user}{more}: {text}");
        assert!(!text.contains("wrong"), "no password is told: {text}");
    }
    assert!(matches!(connect("postgres", " nonsense").await.unwrap_err(), ServerError::ConnectionString { .. }));
}

#[tokio::test]
async fn a_server_that_is_starting_up_is_not_a_failure_for_good() {
    let Some(installation) = installations().pop() else { return };
    let primary = TestServer::start(&installation, &[], "");
    primary.stop("fast");
    std::fs::write(primary.data_dir.join("standby.signal"), "").unwrap();
    primary.configure("hot_standby=off\nrestore_command='false'");
    let data_dir = primary.data_dir.display().to_string();
    installation.run("pg_ctl", &["-D", &data_dir, "-W", "-l", &format!("{data_dir}/log"), "start"]);
    let error = loop {
        match Server::connect(&primary.connection_string()).await {
            Err(ServerError::Unreachable { .. }) => tokio::time::sleep(Duration::from_millis(50)).await,
            other => break other.unwrap_err(),
        }
    };
    assert!(matches!(error, ServerError::StartingUp { .. }) && error.is_transient(), "{error}");
}
