//! A restore that dies at any step leaves nothing that PostgreSQL would start, or a whole copy, and never stands in the
//! way of the next one.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Restored};
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::output::Output;
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::process::{Process, run};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::tree::largest_file;
use walfleet_integration_tests::wait_for;

const REFUSED: i32 = 4;
const LIMIT: Duration = Duration::from_secs(60);

const MARKER: &str = "walfleet.restoring";
const CONTROL: &str = "global/pg_control";

/// What comes into being after the copy, in this order.
const LAST_STEPS: [&str; 5] =
    ["backup_manifest", "pg_wal/walfleet-restore.json", "recovery.signal", "global/pg_control.walfleet-new", CONTROL];

#[test]
fn a_killed_restore_leaves_nothing_that_starts_or_a_whole_copy_and_can_be_done_again() {
    in_scratch(|scratch| {
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
        host.backup()?;
        host.server.session()?.execute("CREATE TABLE written_later AS SELECT 1 AS n")?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        host.archive_all()?;

        // In the midst of the copy, for as long as it takes: the largest pack never comes to its end.
        let pack = largest_file(&scratch.join("repository/clusters").join(CLUSTER).join("packs"), "")?;
        let aside = pack.with_extension("aside");
        std::fs::rename(&pack, &aside)?;
        let mut endless = os_user().command("mkfifo");
        endless.arg(&pack);
        run(endless)?;
        let copying = kill_once(&host, "copying", &[], |data_dir| data_dir.join("base/1/PG_VERSION").exists())?;
        std::fs::rename(&aside, &pack)?;
        anyhow::ensure!(!copying.join(CONTROL).exists(), "a copy without its largest pack has a pg_control");
        judge(&host, &copying, &expected)?;
        // The hint is to be typed as it stands.
        let said = host.run(&host.restore_words(&copying, &["--latest"]))?.exit(REFUSED)?.stderr;
        let typed = said.split_once("(rm -r ").and_then(|(_, rest)| rest.split_once(')')).map(|(paths, _)| paths);
        let mut remove = os_user().command("rm");
        remove.arg("-r").args(typed.unwrap_or_default().split(' '));
        run(remove)?;
        let again = host.restore("copying", &["--latest"])?;
        must_be_whole(&host, &again, &expected)?;

        for step in LAST_STEPS {
            let name = format!("at-{}", step.replace(['/', '.'], "-"));
            // A temporary name may be gone again before anyone looked.
            let seen = |data_dir: &Path| data_dir.join(step).exists() || data_dir.join(CONTROL).exists();
            let data_dir = kill_once(&host, &name, &[], seen)?;
            judge(&host, &data_dir, &expected)?;
        }

        // From here on the copy is PostgreSQL's, and needs nobody to watch.
        let port = free_port();
        let config = host.agent.config().display().to_string();
        let words = ["--start", "--port", &port.to_string(), "--config", &config];
        let data_dir = kill_once(&host, "started", &words, |data_dir| data_dir.join("postmaster.pid").exists())?;
        let started = Restored { name: "started".to_owned(), data_dir, port, report: serde_json::Value::Null };
        let server = host.server_of(&started, true)?;
        let session = wait_for("the server that was started", LIMIT, || Ok(server.session().ok()))?;
        server.wait_until_writable()?;
        Fingerprint::take(&session)?.must_equal(&expected)?;
        host.run(&host.restore_words(&started.data_dir, &["--latest"]))?.exit(REFUSED)?.says("running PostgreSQL")?;
        Ok(())
    });
}

/// Restores into a new folder, and kills the agent, and it alone, as soon as something is to be seen there.
fn kill_once(
    host: &Standalone,
    name: &str,
    words: &[&str],
    mut seen: impl FnMut(&Path) -> bool,
) -> anyhow::Result<std::path::PathBuf> {
    let data_dir = host.scratch().join(name);
    let command = host.command(&host.restore_words(&data_dir, &[&["--latest"], words].concat()))?;
    let mut agent = Process::spawn(host.scratch(), &format!("restore-{name}"), command, Signal::KILL)?;
    let began = Instant::now();
    // Without a pause between two looks: the last steps take less than a millisecond each. An agent that ended meanwhile
    // has done its work.
    while !seen(&data_dir) {
        anyhow::ensure!(began.elapsed() < LIMIT, "{name}: not seen in {LIMIT:?}:\n{}", agent.log_text());
        if let Some(status) = agent.ended()? {
            anyhow::ensure!(status.success() && seen(&data_dir), "{name}: it ended ({status}):\n{}", agent.log_text());
            return Ok(data_dir);
        }
    }
    agent.signal(Signal::KILL);
    agent.wait(LIMIT)?;
    Ok(data_dir)
}

/// Without pg_control it is unfinished: it says so to whoever looks, PostgreSQL does not start, and no restore goes on
/// as if it were empty. With it, it is whole.
fn judge(host: &Standalone, data_dir: &Path, expected: &Fingerprint) -> anyhow::Result<()> {
    let again = host.restore_words(data_dir, &["--latest"]);
    if data_dir.join(CONTROL).exists() {
        host.run(&again)?.exit(REFUSED)?.says("not empty")?;
        let name = data_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let whole =
            Restored { name, data_dir: data_dir.to_owned(), port: free_port(), report: serde_json::Value::Null };
        return must_be_whole(host, &whole, expected);
    }
    let marker = std::fs::read_to_string(data_dir.join(MARKER))?;
    anyhow::ensure!(marker.contains(CLUSTER), "the marker does not say what it marks: {marker}");
    let mut postgres = host.server.version().command("postgres");
    postgres.args(["-c", "port=1", "-D"]).arg(data_dir);
    let refused = Output::of(postgres, Duration::from_secs(20))?;
    anyhow::ensure!(refused.code != 0, "PostgreSQL starts in {}", data_dir.display());
    host.run(&again)?.exit(REFUSED)?.says("is an unfinished restore\nHINT: ")?;
    anyhow::ensure!(data_dir.join(MARKER).exists() && !data_dir.join(CONTROL).exists(), "the refused restore wrote");
    Ok(())
}

fn must_be_whole(host: &Standalone, restored: &Restored, expected: &Fingerprint) -> anyhow::Result<()> {
    let server = host.recovered(restored)?;
    Fingerprint::take(&server.session()?)?.must_equal(expected)
}
