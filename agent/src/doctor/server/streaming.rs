//! What a server's settings mean for its WAL stream, and for commits that wait for it.

use walfleet_repository::shipping::{LetGoAt, Synchronous};

use super::{Finding, RELOAD, RESTART, ServerView};
use crate::postgres::server::{Rights, ServerRole};
use crate::wal::receive::APPLICATION_NAME;

pub fn findings(subject: &str, view: &ServerView<'_>) -> Vec<Finding> {
    let right = view.rights.and_then(|rights| right(subject, rights)).into_iter();
    let commits = synchronous(subject, view).into_iter().chain(exceptions(subject, view));
    right.chain(commits).chain(let_go(subject, view)).chain(memory(subject, view)).collect()
}

/// Segments beyond this size are worth a word: the open one is held in memory.
const LARGE_SEGMENT: u32 = 64 << 20;

/// So many times the size of a segment are held at most: what was received, the same sealed, and the one before, sealed, on its
/// way.
const HELD: u32 = 3;

fn memory(subject: &str, view: &ServerView<'_>) -> Option<Finding> {
    let size = view.facts.wal_segment_size.bytes();
    (view.streams && size > LARGE_SEGMENT).then(|| {
        let mib = size >> 20;
        Finding::advice(
            "wal_segment_size",
            subject,
            format!(
                "segments are of {mib} MiB, and the agent that streams holds the open one: up to {} MiB",
                HELD * mib
            ),
            "see that the host has as much memory to spare",
        )
    })
}

/// Whether letting go of the slot would free anything.
fn let_go(subject: &str, view: &ServerView<'_>) -> Option<Finding> {
    const CHECK: &str = "let_go_at";
    let limit = view.shipping.let_go_at.filter(|limit| *limit != LetGoAt::Never)?;
    let mode = &view.facts.archive.mode;
    let is_kept = match view.facts.role {
        ServerRole::Primary => mode != "off",
        ServerRole::Standby => mode == "always",
    };
    if !is_kept {
        return Some(Finding::ok(CHECK, subject, format!("WAL that cannot be stored is let go of at {limit}")));
    }
    Some(Finding::fix(
        CHECK,
        subject,
        format!(
            "let_go_at is {limit} and archive_mode is {mode}: PostgreSQL keeps WAL until archive_command has succeeded, \
             and that never says so of WAL that is not stored; pg_wal can fill"
        ),
        format!("where WAL is streamed: ALTER SYSTEM SET archive_mode = 'off'; {RESTART}"),
    ))
}

fn right(subject: &str, rights: &Rights) -> Option<Finding> {
    const CHECK: &str = "streaming";
    if rights.replication {
        return Some(Finding::ok(CHECK, subject, format!("{} may stream WAL", rights.user)));
    }
    let user = rights.user.replace('"', "\"\"");
    Some(Finding::advice(
        CHECK,
        subject,
        format!("role {} may not stream WAL: the repository trails by whole segments", rights.user),
        format!("as a superuser: ALTER ROLE \"{user}\" REPLICATION;"),
    ))
}

/// Whom commits wait for, and whether that can end well.
fn synchronous(subject: &str, view: &ServerView<'_>) -> Option<Finding> {
    const CHECK: &str = "synchronous_standby_names";
    let names = &view.facts.synchronous.standby_names;
    let named = names_us(names);
    let wanted = view.shipping.synchronous.unwrap_or_default();
    let off = format!("ALTER SYSTEM SET synchronous_commit = 'on'; {RELOAD}");
    match (wanted, named) {
        (Synchronous::Off, Named::Not) => None,
        (_, Named::ByName | Named::ByStar) if view.facts.synchronous.commit == "remote_apply" => Some(Finding::fix(
            CHECK,
            subject,
            "synchronous_commit is remote_apply and an agent may be waited for: it applies nothing, such commits never return",
            off,
        )),
        (Synchronous::Off, Named::ByName) => Some(Finding::advice(
            CHECK,
            subject,
            format!("commits wait for {APPLICATION_NAME}, and that stores on a timer: each takes as long as the timer"),
            "set wal.synchronous to repository or spool in the policy, or take the agent out of synchronous_standby_names",
        )),
        (Synchronous::Off, Named::ByStar) => Some(Finding::advice(
            CHECK,
            subject,
            "synchronous_standby_names is * and so names the agent, too: with no standby left, each commit waits for its timer",
            "name the standbys that commits shall wait for",
        )),
        (Synchronous::Repository | Synchronous::Spool, Named::Not) => Some(Finding::fix(
            CHECK,
            subject,
            format!(
                "commits are to wait for the {}, and synchronous_standby_names does not name the agent",
                match wanted {
                    Synchronous::Spool => "spools",
                    _ => "repository",
                }
            ),
            format!("ALTER SYSTEM SET synchronous_standby_names = '{APPLICATION_NAME}'; {RELOAD}"),
        )),
        (Synchronous::Repository, Named::ByName | Named::ByStar) => match view.facts.synchronous.commit.as_str() {
            "off" | "local" | "remote_write" => Some(Finding::advice(
                CHECK,
                subject,
                format!(
                    "synchronous_commit is {}: commits do not wait for the repository",
                    view.facts.synchronous.commit
                ),
                off,
            )),
            _ => Some(Finding::ok(CHECK, subject, "commits wait until the repository has them")),
        },
        (Synchronous::Spool, Named::ByName | Named::ByStar) => match view.facts.synchronous.commit.as_str() {
            "remote_write" => Some(Finding::ok(CHECK, subject, "commits wait until two hosts' spools have them")),
            "off" | "local" => Some(Finding::advice(
                CHECK,
                subject,
                format!("synchronous_commit is {}: commits do not wait for the spools", view.facts.synchronous.commit),
                format!("ALTER SYSTEM SET synchronous_commit = 'remote_write'; {RELOAD}"),
            )),
            _ => Some(Finding::advice(
                CHECK,
                subject,
                format!(
                    "synchronous_commit is {}: commits wait for the repository, that stores on a timer, and not for the spools",
                    view.facts.synchronous.commit
                ),
                format!("ALTER SYSTEM SET synchronous_commit = 'remote_write'; {RELOAD}"),
            )),
        },
    }
}

/// The same of sessions that have a setting of their own.
fn exceptions<'v>(subject: &'v str, view: &'v ServerView<'_>) -> impl Iterator<Item = Finding> + 'v {
    let synchronous = &view.facts.synchronous;
    let is_named = names_us(&synchronous.standby_names) != Named::Not;
    let hanging = synchronous.exceptions.iter().filter(move |exception| is_named && exception.commit == "remote_apply");
    hanging.map(move |exception| {
        let quoted = |name: &String| format!("\"{}\"", name.replace('"', "\"\""));
        let (role, database) = (exception.role.as_ref().map(quoted), exception.database.as_ref().map(quoted));
        let (whose, alter) = match (role, database) {
            (Some(role), Some(database)) => {
                (format!("role {role} in database {database}"), format!("ROLE {role} IN DATABASE {database}"))
            }
            (Some(role), None) => (format!("role {role}"), format!("ROLE {role}")),
            (None, Some(database)) => (format!("database {database}"), format!("DATABASE {database}")),
            (None, None) => ("all roles".to_owned(), "ROLE ALL".to_owned()),
        };
        Finding::fix(
            "synchronous_commit",
            subject,
            format!("synchronous_commit of {whose} is remote_apply and an agent may be waited for: it applies nothing, such commits never return"),
            format!("ALTER {alter} RESET synchronous_commit;"),
        )
    })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Named {
    Not,
    ByName,
    ByStar,
}

/// Whether the setting names the agent (syncrep_gram.y: names, quoted or not, and numbers between commas and brackets).
fn names_us(setting: &str) -> Named {
    let words = || setting.split([',', '(', ')', ' ']).map(|word| word.trim_matches('"'));
    if words().any(|word| word.eq_ignore_ascii_case(APPLICATION_NAME)) {
        Named::ByName
    } else if words().any(|word| word == "*") {
        Named::ByStar
    } else {
        Named::Not
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::tests::good_server;
    use crate::postgres::server::{Server, SynchronousException};
    use crate::postgres::test_server::{TestServer, oldest_and_newest};
    use walfleet_repository::shipping::ShippingSpec;

    #[tokio::test]
    async fn remote_apply_is_refused_wherever_it_is_set() {
        let mut facts = good_server();
        facts.synchronous.standby_names = "ANY 1 (walfleet, s1)".to_owned();
        for installation in oldest_and_newest() {
            let server = TestServer::start(&installation, &[], "");
            let statements = [
                "CREATE ROLE \"Or\"\"ders\"",
                "ALTER ROLE \"Or\"\"ders\" SET synchronous_commit = 'Remote_Apply'",
                "ALTER ROLE \"Or\"\"ders\" IN DATABASE postgres SET SYNCHRONOUS_COMMIT TO remote_apply",
                "ALTER DATABASE postgres SET synchronous_commit = remote_apply",
                "ALTER ROLE ALL SET synchronous_commit = local",
                "ALTER DATABASE template1 SET work_mem = '1MB'",
            ];
            server.sql(&statements).await;
            let asked = Server::connect(&server.connection_string()).await.unwrap().facts().await.unwrap();
            facts.synchronous.exceptions = asked.synchronous.exceptions;
            let all = SynchronousException { commit: "local".to_owned(), ..SynchronousException::default() };
            assert!(facts.synchronous.exceptions.contains(&all), "{facts:?}");
            let found = |names: &str| {
                let mut facts = facts.clone();
                facts.synchronous.standby_names = names.to_owned();
                let (rights, socket, program) = (None, None, None);
                let shipping = ShippingSpec::NONE;
                let view = ServerView { facts: &facts, rights, socket, program, streams: true, shipping };
                exceptions("orders", &view).map(|finding| finding.fix.unwrap_or_default()).collect::<Vec<_>>()
            };
            let mut typed = found("ANY 1 (walfleet, s1)");
            typed.sort();
            let expected = [
                "ALTER DATABASE \"postgres\" RESET synchronous_commit;",
                "ALTER ROLE \"Or\"\"ders\" IN DATABASE \"postgres\" RESET synchronous_commit;",
                "ALTER ROLE \"Or\"\"ders\" RESET synchronous_commit;",
            ];
            assert_eq!(typed, expected, "{}", installation.major);
            assert!(found("s1").is_empty(), "nobody waits for an agent");
        }
    }

    #[test]
    fn what_commits_wait_for_is_judged_by_the_policy_and_by_both_settings() {
        use crate::doctor::Verdict;
        const NOBODY: &str = "s1";
        const US: &str = "walfleet";
        let judged = |wanted, names: &str, commit: &str| {
            let mut facts = good_server();
            (facts.synchronous.standby_names, facts.synchronous.commit) = (names.to_owned(), commit.to_owned());
            let shipping = ShippingSpec { synchronous: Some(wanted), ..ShippingSpec::NONE };
            let (rights, socket, program) = (None, None, None);
            let view = ServerView { facts: &facts, rights, socket, program, streams: true, shipping };
            synchronous("orders", &view).map(|finding| (finding.verdict, finding.fix.unwrap_or_default()))
        };
        for wanted in [Synchronous::Off, Synchronous::Repository, Synchronous::Spool] {
            for names in [US, "*", "FIRST 1 (s1, walfleet)"] {
                let (verdict, fix) = judged(wanted, names, "remote_apply").expect("it is refused");
                assert_eq!(verdict, Verdict::Fix, "{wanted:?} {names}: such commits never return");
                assert!(fix.contains("synchronous_commit = 'on'"), "{fix}");
            }
        }
        let verdict = |wanted, names, commit| judged(wanted, names, commit).map(|(verdict, _)| verdict);
        let (off, repository, spool) = (Synchronous::Off, Synchronous::Repository, Synchronous::Spool);
        assert_eq!(verdict(off, NOBODY, "remote_apply"), None, "standbys apply");
        assert_eq!(verdict(off, US, "on"), Some(Verdict::Advice));
        assert_eq!(verdict(repository, NOBODY, "on"), Some(Verdict::Fix), "nobody waits for it");
        assert_eq!(verdict(repository, US, "on"), Some(Verdict::Ok));
        assert_eq!(verdict(repository, US, "remote_write"), Some(Verdict::Advice));
        assert_eq!(verdict(spool, US, "remote_write"), Some(Verdict::Ok));
        assert_eq!(verdict(spool, US, "on"), Some(Verdict::Advice));
    }

    #[test]
    fn the_agent_is_found_among_the_standbys_however_they_are_written() {
        for (setting, named) in [
            ("", Named::Not),
            ("s1", Named::Not),
            ("walfleet", Named::ByName),
            ("FIRST 2 (s1, \"walfleet\")", Named::ByName),
            ("ANY 1 (s1,Walfleet)", Named::ByName),
            ("walfleet2", Named::Not),
            ("*", Named::ByStar),
            ("ANY 1 (*)", Named::ByStar),
        ] {
            assert_eq!(names_us(setting), named, "{setting}");
        }
    }
}
