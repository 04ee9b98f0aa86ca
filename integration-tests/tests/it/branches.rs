//! Which WAL a restore follows where a name or a number means more than one thing: restore points of one name, and
//! promotions to one timeline.

use walfleet_integration_tests::fleet::standalone::{CLUSTER, Restored, archive_all};
use walfleet_integration_tests::fleet::{Agent, Place, Standalone};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::scratch::in_scratch;

const NOT_RECOVERABLE: i32 = 7;
const USAGE: i32 = 2;

fn steps(server: &PgServer) -> anyhow::Result<String> {
    server.session()?.value("SELECT coalesce(string_agg(n::text, ' ' ORDER BY n), 'none') FROM step")
}

fn step(server: &PgServer, n: u32) -> anyhow::Result<()> {
    server.session()?.execute(&format!("INSERT INTO step VALUES ({n})"))
}

/// Asks for a plan that must be refused; what is said.
fn refused(host: &Standalone, code: i32, target: &[&str]) -> anyhow::Result<String> {
    let mut words = host.restore_words(&host.scratch().join("never"), target);
    words.push("--plan".to_owned());
    let answer = host.run(&words)?;
    anyhow::ensure!(answer.code == code, "{target:?}: {answer:?}");
    Ok(answer.stderr)
}

fn restored(host: &Standalone, name: &str, target: &[&str]) -> anyhow::Result<(PgServer, Restored)> {
    let restored = host.restore(name, target)?;
    let server = host.recovered(&restored)?;
    Ok((server, restored))
}

/// The word behind `before` in a message.
fn word_behind(text: &str, before: &str) -> anyhow::Result<String> {
    let behind = text.split_once(before).map(|(_, behind)| behind.trim_start());
    let word = behind.and_then(|behind| behind.split([' ', ';', ',']).next());
    word.map(str::to_owned).ok_or_else(|| anyhow::anyhow!("no {before:?} in {text}"))
}

/// Goes on with a restored copy as a member of the cluster, on the timeline that it opened.
fn adopt(host: &Standalone, name: &str, mut server: PgServer, n: u32) -> anyhow::Result<(Agent, PgServer)> {
    server.stop(Shutdown::Fast)?;
    let agent = Agent::builder(host.scratch(), name).instance(CLUSTER, &server);
    let mut agent = agent.repository(&host.place, &host.key_file).postgres(server.version()).build()?;
    agent.start()?;
    server.set_override("archive_mode", "on");
    server.set_override("archive_command", &agent.archive_command());
    server.start()?;
    step(&server, n)?;
    archive_all(&server)?;
    Ok((agent, server))
}

#[test]
fn names_and_numbers_that_mean_two_things_are_refused_with_how_to_say_which() {
    in_scratch(|scratch| {
        // Both copies are rightly found to share a system identifier.
        scratch.allow_log("WARN");
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        let point = |name: &str| host.server.session()?.value(&format!("SELECT pg_create_restore_point('{name}')"));
        host.server.session()?.execute("CREATE TABLE step (n int)")?;
        let first = host.backup()?["id"].as_str().unwrap_or_default().to_owned();
        step(&host.server, 1)?;
        point("here")?;
        point("twice")?;
        step(&host.server, 2)?;
        point("twice")?;
        host.backup()?;
        step(&host.server, 3)?;
        point("here")?;
        step(&host.server, 4)?;
        host.archive_all()?;

        // Recovery by name would stop at the older one: the newest is reached by its position.
        let says = refused(&host, NOT_RECOVERABLE, &["--to-name", "twice"])?;
        let at = word_behind(&says, "--to-lsn")?;
        let (second, _) = restored(&host, "twice", &["--to-lsn", &at, "--exclusive"])?;
        assert_eq!(steps(&second)?, "1 2", "{says}");
        drop(second);
        let (old, _) = restored(&host, "old", &["--to-name", "here", "--backup", &first])?;
        let (new, report) = restored(&host, "new", &["--to-name", "here"])?;
        assert_eq!((steps(&old)?, steps(&new)?), ("1".to_owned(), "1 2 3".to_owned()));
        assert!(report.report.to_string().contains("restore point \\\"here\\\" is at"), "{}", report.report);
        let by_xid = host
            .run(&[host.restore_words(&scratch.join("never"), &["--to-xid", "900"]), vec!["--plan".into()]].concat())?;
        assert!(by_xid.ok()?.stdout.contains("oldest backup"), "a plan says why replay is long");

        // Neither knew of the other when it opened: both are timeline 2.
        let (_old_agent, _old) = adopt(&host, "host2", old, 100)?;
        let (_new_agent, _new) = adopt(&host, "host3", new, 200)?;
        for target in [&["--timeline", "2"][..], &["--latest"]] {
            let says = refused(&host, NOT_RECOVERABLE, target)?;
            assert!(says.contains("2 branches of timeline 2") && says.contains("left timeline 1 at"), "{says}");
        }
        let says = refused(&host, NOT_RECOVERABLE, &["--timeline", "2"])?;
        let mut found = Vec::new();
        for name in says.split([' ', ';', ',']).filter(|word| word.len() == 18 && word.starts_with("2-")).take(2) {
            // As much as tells the two apart, by one chance in a million not.
            let (copy, _) = restored(&host, &format!("of-{name}"), &["--latest", "--timeline", &name[..7]])?;
            found.push(steps(&copy)?);
        }
        found.sort_unstable();
        assert_eq!(found, ["1 100", "1 2 3 200"], "{says}");
        let (copy, _) = restored(&host, "of-1", &["--latest", "--timeline", "1"])?;
        assert_eq!(steps(&copy)?, "1 2 3 4");
        refused(&host, USAGE, &["--timeline", "2-"])?;
        refused(&host, USAGE, &["--timeline", "2-xyz"])?;
        Ok(())
    });
}
