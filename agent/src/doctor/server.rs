//! What a server's settings and rights mean for its protection.

mod streaming;

use std::path::Path;

use walfleet_repository::shipping::ShippingSpec;

use super::{Finding, Verdict};
use crate::config::{DEFAULT_STATE_DIR, default_socket};
use crate::postgres::server::{Rights, ServerFacts, ServerRole};

/// What is known of a server and of the agent beside it.
pub struct ServerView<'a> {
    pub facts: &'a ServerFacts,
    /// `None`: not asked for.
    pub rights: Option<&'a Rights>,
    /// Where this agent listens; `None`: which socket is named does not matter here.
    pub socket: Option<&'a Path>,
    /// This program, for the line to type.
    pub program: Option<&'a Path>,
    /// Whether its WAL is received over the replication protocol; then archive_command may be left out.
    pub streams: bool,
    pub shipping: ShippingSpec,
}

const RELOAD: &str = "SELECT pg_reload_conf();";
const RESTART: &str = "then restart the server";

pub fn server_findings(subject: &str, view: &ServerView<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(view.rights.map(|rights| rights_finding(subject, rights)));
    findings.push(wal_level(subject, view.facts));
    findings.push(full_page_writes(subject, view.facts));
    let archives = view.facts.archive.mode != "off";
    if view.streams && !archives {
        findings.push(Finding::ok("archive_mode", subject, "off; WAL is streamed"));
    } else {
        findings.push(archive_mode(subject, view.facts));
        findings.push(archive_command(subject, view));
    }
    match view.streams {
        true => findings.extend(early_segments(subject, view.facts)),
        false => findings.push(archive_timeout(subject, view.facts)),
    }
    findings.extend(streaming::findings(subject, view));
    findings.extend(archiver(subject, view.facts));
    findings.push(checksums(subject, view.facts));
    findings
}

fn rights_finding(subject: &str, rights: &Rights) -> Finding {
    if rights.missing_grants.is_empty() {
        return Finding::ok("rights", subject, format!("{} may take backups", rights.user));
    }
    let message = format!("role {} lacks rights that backups need", rights.user);
    Finding::fix("rights", subject, message, format!("as a superuser: {}", rights.missing_grants.join(" ")))
}

fn wal_level(subject: &str, facts: &ServerFacts) -> Finding {
    match facts.wal_level.as_str() {
        level @ ("replica" | "logical") => Finding::ok("wal_level", subject, level),
        level => Finding::fix(
            "wal_level",
            subject,
            format!("wal_level is {level}: its WAL cannot be restored from"),
            format!("ALTER SYSTEM SET wal_level = 'replica'; {RESTART}"),
        ),
    }
}

fn full_page_writes(subject: &str, facts: &ServerFacts) -> Finding {
    if facts.full_page_writes {
        return Finding::ok("full_page_writes", subject, "on");
    }
    Finding::fix(
        "full_page_writes",
        subject,
        "full_page_writes is off: a crash can leave torn pages, and no standby can be backed up",
        format!("ALTER SYSTEM SET full_page_writes = 'on'; {RELOAD}"),
    )
}

fn archive_mode(subject: &str, facts: &ServerFacts) -> Finding {
    match facts.archive.mode.as_str() {
        "off" => Finding::fix(
            "archive_mode",
            subject,
            "archive_mode is off: no WAL is archived, and nothing after a backup can be restored",
            format!("ALTER SYSTEM SET archive_mode = 'on'; {RESTART}"),
        ),
        mode => Finding::ok("archive_mode", subject, mode),
    }
}

fn archive_command(subject: &str, view: &ServerView<'_>) -> Finding {
    const CHECK: &str = "archive_command";
    let wanted = wanted_command(view);
    let line = format!("ALTER SYSTEM SET archive_command = '{}'; {RELOAD}", wanted.replace('\'', "''"));
    if let Some(library) = &view.facts.archive.library {
        let message = format!("archive_library is {library}: WAL goes there and not to this agent");
        return Finding::fix(CHECK, subject, message, format!("ALTER SYSTEM SET archive_library = ''; {line}"));
    }
    let Some(command) = &view.facts.archive.command else {
        return Finding::fix(CHECK, subject, "archive_command is not set, or this role may not see it", line);
    };
    let ours = command.contains("walfleet-agent") && command.contains("wal push") && command.contains("%p");
    if !ours {
        return Finding::fix(
            CHECK,
            subject,
            format!("archive_command is \"{command}\": WAL does not go to this agent"),
            line,
        );
    }
    // A command that reaches another agent's socket, or none.
    let named = view
        .socket
        .is_none_or(|socket| is_default(socket) || socket.to_str().is_some_and(|socket| command.contains(socket)));
    if !named {
        return Finding::fix(
            CHECK,
            subject,
            format!("archive_command \"{command}\" does not name this agent's socket"),
            line,
        );
    }
    Finding::ok(CHECK, subject, command.clone())
}

fn wanted_command(view: &ServerView<'_>) -> String {
    let program = view.program.map_or("walfleet-agent".into(), shell);
    match view.socket.filter(|socket| !is_default(socket)) {
        Some(socket) => format!("{program} wal push --socket {} %p", shell(socket)),
        None => format!("{program} wal push %p"),
    }
}

fn is_default(socket: &Path) -> bool {
    socket == default_socket(DEFAULT_STATE_DIR.as_ref())
}

/// As a word for sh, and for Postgres, which replaces %p and the like.
fn shell(path: &Path) -> String {
    let text = path.to_string_lossy().replace('%', "%%");
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'-' | b'_' | b'%' | b'+' | b',' | b'=');
    if text.bytes().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn archive_timeout(subject: &str, facts: &ServerFacts) -> Finding {
    const CHECK: &str = "archive_timeout";
    match facts.archive.timeout_seconds {
        0 => Finding::advice(
            CHECK,
            subject,
            "archive_timeout is 0: on a quiet server the newest changes wait for their segment to fill",
            format!("ALTER SYSTEM SET archive_timeout = '60s'; {RELOAD}"),
        ),
        seconds @ 3601.. => Finding::advice(
            CHECK,
            subject,
            format!("archive_timeout is {seconds} s: as much can be lost on a quiet server"),
            format!("ALTER SYSTEM SET archive_timeout = '60s'; {RELOAD}"),
        ),
        seconds => Finding::ok(CHECK, subject, format!("{seconds} s")),
    }
}

/// Where WAL is streamed no segment need be finished before it is full (CheckArchiveTimeout, src/backend/postmaster/checkpointer.c,
/// which heeds no archive_mode).
fn early_segments(subject: &str, facts: &ServerFacts) -> Option<Finding> {
    let seconds = u64::from(facts.archive.timeout_seconds);
    let a_day = 86_400_u64.checked_div(seconds)?;
    Some(Finding::advice(
        "archive_timeout",
        subject,
        format!(
            "archive_timeout is {seconds} s: up to {a_day} segments a day are finished early, and WAL is streamed before that"
        ),
        format!("ALTER SYSTEM SET archive_timeout = 0; {RELOAD}"),
    ))
}

fn archiver(subject: &str, facts: &ServerFacts) -> Option<Finding> {
    const CHECK: &str = "archiver";
    let archiver = facts.archiver.as_ref()?;
    if archiver.is_failing() {
        let segment = archiver.last_failed.as_ref().map_or("a segment", |(name, _)| name.as_str());
        return Some(Finding::fix(
            CHECK,
            subject,
            format!("archiving fails: {segment}, {} failures", archiver.failed_count),
            "look into the agent's log and the server's log for the reason; Postgres tries again by itself",
        ));
    }
    let message = match &archiver.last_archived {
        Some((name, _)) => format!("last archived {name}"),
        None if facts.role == ServerRole::Standby => "a standby archives nothing unless archive_mode is always".into(),
        None => "nothing was archived yet".into(),
    };
    Some(Finding::ok(CHECK, subject, message))
}

fn checksums(subject: &str, facts: &ServerFacts) -> Finding {
    if facts.data_checksums {
        return Finding::ok("data_checksums", subject, "on");
    }
    Finding {
        verdict: Verdict::Advice,
        ..Finding::fix(
            "data_checksums",
            subject,
            "data checksums are off: damaged pages are backed up without a word",
            "pg_checksums --enable, while the server is stopped",
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::postgres::server::{ArchiveSettings, ArchiverState, SynchronousSettings};
    use walfleet_repository::postgres::{Lsn, SegmentSize, SystemId, Timeline};

    pub(crate) fn good_server() -> ServerFacts {
        ServerFacts {
            version_num: 170_000,
            role: ServerRole::Primary,
            system_id: SystemId(1),
            catalog_version: 1,
            control_version: 1700,
            timeline: Timeline(1),
            current_lsn: Lsn(1),
            wal_segment_size: SegmentSize::DEFAULT,
            block_bytes: 8192,
            data_checksums: true,
            data_directory: None,
            config_file: None,
            hba_file: None,
            log_directory: None,
            wal_level: "replica".into(),
            full_page_writes: true,
            archive: ArchiveSettings {
                mode: "on".into(),
                command: Some("walfleet-agent wal push %p".into()),
                library: None,
                timeout_seconds: 60,
            },
            archiver: Some(ArchiverState::default()),
            synchronous: SynchronousSettings::default(),
            tablespaces: Vec::new(),
            clock_us: 0,
        }
    }

    fn check(change: impl FnOnce(&mut ServerFacts), socket: &str) -> Vec<Finding> {
        let mut facts = good_server();
        change(&mut facts);
        let view = ServerView {
            facts: &facts,
            rights: None,
            socket: Some(Path::new(socket)),
            program: Some(Path::new("/usr/bin/walfleet-agent")),
            streams: false,
            shipping: ShippingSpec::NONE,
        };
        server_findings("orders", &view).into_iter().filter(|finding| finding.verdict != Verdict::Ok).collect()
    }

    const DEFAULT_SOCKET: &str = "/var/lib/walfleet-agent/agent.sock";

    #[test]
    fn a_server_as_it_should_be_needs_nothing() {
        assert!(check(|_| {}, DEFAULT_SOCKET).is_empty());
    }

    #[test]
    fn each_setting_that_endangers_recovery_comes_with_what_to_type() {
        type Change = fn(&mut ServerFacts);
        let table: [(Change, &str, &str); 8] = [
            (|facts| facts.wal_level = "minimal".into(), "wal_level", "wal_level = 'replica'"),
            (|facts| facts.full_page_writes = false, "full_page_writes", "full_page_writes = 'on'"),
            (|facts| facts.archive.mode = "off".into(), "archive_mode", "archive_mode = 'on'"),
            (
                |facts| facts.archive.command = None,
                "archive_command",
                "ALTER SYSTEM SET archive_command = '/usr/bin/walfleet-agent wal push %p'; SELECT pg_reload_conf();",
            ),
            (
                |facts| facts.archive.command = Some("pgbackrest archive-push %p".into()),
                "archive_command",
                "wal push %p",
            ),
            (|facts| facts.archive.library = Some("basic_archive".into()), "archive_command", "archive_library = ''"),
            (|facts| facts.archive.timeout_seconds = 0, "archive_timeout", "archive_timeout = '60s'"),
            (
                |facts| facts.archiver.as_mut().unwrap().last_failed = Some(("0001".into(), 5)),
                "archiver",
                "the agent's log",
            ),
        ];
        for (change, check_name, types) in table {
            let findings = check(change, DEFAULT_SOCKET);
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert_eq!(findings[0].check, check_name);
            assert!(findings[0].fix.as_ref().unwrap().contains(types), "{findings:?}");
        }
    }

    #[test]
    fn segments_need_not_be_finished_early_where_wal_is_streamed() {
        let advice = |seconds| {
            let mut facts = good_server();
            facts.archive.timeout_seconds = seconds;
            early_segments("orders", &facts).map(|finding| (finding.message, finding.fix.unwrap_or_default()))
        };
        assert_eq!(advice(0), None);
        let (message, fix) = advice(60).unwrap();
        assert!(message.contains("up to 1440 segments a day"), "{message}");
        assert!(fix.contains("archive_timeout = 0"), "{fix}");
    }

    #[test]
    fn another_socket_must_be_named_in_the_command() {
        let findings = check(|_| {}, "/srv/it's 100%/a.sock");
        let fix = findings[0].fix.as_ref().unwrap();
        // Quoted for sh, for Postgres's own %, and for SQL.
        assert!(fix.contains(r"--socket ''/srv/it''\''''s 100%%/a.sock'' %p"), "{fix}");
        let named = |facts: &mut ServerFacts| {
            facts.archive.command = Some("walfleet-agent wal push --socket /run/a.sock %p".into());
        };
        assert!(check(named, "/run/a.sock").is_empty());
    }
}
