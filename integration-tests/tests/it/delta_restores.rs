//! A restore over a copy of the cluster, however damaged, makes it what a fresh one is, and brings only what is missing.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::Signal;
use walfleet_integration_tests::fleet::standalone::{CLUSTER, Restored};
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::ports::free_port;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::judge::verify_backup;
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown};
use walfleet_integration_tests::process::{Process, run};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::tree;

const REFUSED: i32 = 4;
const LIMIT: Duration = Duration::from_secs(60);

const MARKER: &str = "walfleet.restoring";
const CONTROL: &str = "global/pg_control";

/// Everything that can be wrong in a copy: `$1` the data directory, `$2` the tablespace, `$3` a folder outside of both.
const DAMAGE: &str = r#"
set -e
cd "$1"
largest=$(find base -type f -size +2000k -printf '%s %p\n' | sort -n | tail -1 | cut -d' ' -f2)
pages=$(($(stat -c %s "$largest") / 8192))
page=7
while [ $page -lt $pages ]; do
    printf damaged | dd of="$largest" bs=1 seek=$((page * 8192 + 100)) conv=notrunc status=none
    page=$((page + 100))
done
set -- "$1" "$2" "$3" $(find base/5 -type f -size +30k -name '[0-9]*[0-9]' | sort | head -12)
[ $# -ge 14 ]
rm "$4" "$5" PG_VERSION
truncate -s 8192 "$6"
truncate -s +24576 "$7"
truncate -s 0 "$8"
chmod 000 "$9"; shift 9
chmod 666 "$1"
rm "$2" && mkdir "$2" && echo inside > "$2/file"
cp "$3" "$OUTSIDE/linked" && ln -f "$OUTSIDE/linked" "$3"
rm "$4" && ln -s "$OUTSIDE/linked" "$4"
rm -r pg_multixact && echo file > pg_multixact
mkdir -p junk/deep && echo junk > junk/deep/file && echo junk > base/5/999999 && touch standby.signal
head -c 16777216 /dev/zero > pg_wal/00000009000000000000000A
mkdir -p base/99999 && echo gone > base/99999/1 && ln -s /nowhere dangling
chmod 000 base/1
echo junk > "$(echo "$TABLESPACE"/PG_*)/junk"
echo other > "$TABLESPACE/of-another"
"#;

#[test]
fn a_damaged_copy_becomes_what_a_fresh_restore_is_and_little_is_fetched() {
    in_scratch(|scratch| {
        let host = prepared(scratch)?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        let copy = host.restore("copy", &["--latest"])?;
        let tablespace = PathBuf::from(format!("{}.fast", copy.data_dir.display()));
        let whole = contents(&copy.data_dir, &tablespace)?;

        // Nothing is damaged: what is brought again are the few slots that lie under changed pages.
        let unchanged = host.restore("copy", &["--latest", "--delta"])?;
        must_equal(&whole, &contents(&copy.data_dir, &tablespace)?)?;
        let fetched = |restored: &Restored| restored.report["fetched_bytes"].as_u64().unwrap_or_default();
        anyhow::ensure!(
            fetched(&unchanged) < fetched(&copy) / 3,
            "{} of {} bytes were fetched though nothing was missing",
            fetched(&unchanged),
            fetched(&copy)
        );

        let outside = scratch.dir("outside")?;
        let mut damage = os_user().command("sh");
        damage.args(["-c", DAMAGE, "sh"]).args([&copy.data_dir, &tablespace, &outside]);
        damage.env("OUTSIDE", &outside).env("TABLESPACE", &tablespace);
        run(damage)?;
        let linked = std::fs::read(outside.join("linked"))?;
        let mended = host.restore("copy", &["--latest", "--delta"])?;
        let others = tablespace.join("of-another");
        anyhow::ensure!(std::fs::read_to_string(&others)? == "other\n", "another's file in the tablespace is gone");
        std::fs::remove_file(others)?;
        must_equal(&whole, &contents(&copy.data_dir, &tablespace)?)?;
        anyhow::ensure!(std::fs::read(outside.join("linked"))? == linked, "a file of others was written to");
        let notes = mended.report["notes"].to_string();
        anyhow::ensure!(notes.contains("were kept") && notes.contains("were removed"), "{notes}");

        // An older state over a server that went on since.
        verify_backup(host.server.version(), &copy.data_dir)?;
        must_be_whole(&host, "server0", &mended, &expected)?;
        let again = host.restore("copy", &["--latest", "--delta"])?;
        must_be_whole(&host, "server1", &again, &expected)
    });
}

#[test]
fn a_restore_that_was_killed_goes_on_where_it_was() {
    in_scratch(|scratch| {
        let host = prepared(scratch)?;
        let expected = Fingerprint::take(&host.server.session()?)?;
        let copied = kill_in_the_midst(&host, "fresh", &["--latest"], |dir| dir.join("base/1/PG_VERSION").exists())?;
        host.run(&host.restore_words(&copied, &["--latest"]))?.exit(REFUSED)?.says("add --delta to go on")?;
        let fresh = host.restore("fresh", &["--latest", "--delta"])?;
        let kept = fresh.report["notes"].to_string();
        anyhow::ensure!(kept.contains("were kept"), "{kept}");
        must_be_whole(&host, "server2", &fresh, &expected)?;

        // Recovery has changed much of it by now; and this one is killed, too.
        let begun = |dir: &Path| dir.join(MARKER).exists() && !dir.join(CONTROL).exists();
        let copied = kill_in_the_midst(&host, "fresh", &["--latest", "--delta"], begun)?;
        anyhow::ensure!(begun(&copied), "a delta restore that was killed looks whole");
        let again = host.restore("fresh", &["--latest", "--delta"])?;
        let (kept, all) = (kept_bytes(&again)?, again.report["cluster_bytes"].as_u64().unwrap_or_default());
        anyhow::ensure!(kept > all / 2, "only {kept} of {all} bytes were kept of what lay there");
        must_be_whole(&host, "server3", &again, &expected)
    });
}

/// As the report notes it: "5 of 9 bytes were right already and were kept".
fn kept_bytes(restored: &Restored) -> anyhow::Result<u64> {
    let notes = restored.report["notes"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str);
    let kept = notes.filter(|note| note.contains("were kept")).find_map(|note| note.split(' ').next());
    Ok(kept.context("no note of what was kept")?.parse()?)
}

#[test]
fn only_a_copy_of_the_same_cluster_that_nobody_uses_is_restored_over() {
    in_scratch(|scratch| {
        let host = prepared(scratch)?;
        let delta = |dir: &Path| host.run(&host.restore_words(dir, &["--latest", "--delta"]));
        delta(host.server.data_dir())?.exit(REFUSED)?.says("running PostgreSQL")?;
        host.server.session()?.execute("SELECT 1")?;

        let mut other = PgServer::builder(scratch, "other", host.server.version()).create()?;
        other.stop(Shutdown::Fast)?;
        let before = contents(other.data_dir(), other.data_dir())?;
        delta(other.data_dir())?.exit(REFUSED)?.says("belongs to system identifier")?;
        must_equal(&before, &contents(other.data_dir(), other.data_dir())?)?;

        let strange = scratch.dir("strange")?;
        os_user().write(&strange.join("precious"), "keep me")?;
        delta(&strange)?.exit(REFUSED)?.says("says whose data it holds")?;
        anyhow::ensure!(std::fs::read_to_string(strange.join("precious"))? == "keep me", "a stranger's file is gone");

        // A tablespace's directory that is not this copy's.
        let copy = host.restore("copy", &["--latest"])?;
        let taken = scratch.dir("taken")?;
        os_user().write(&taken.join("precious"), "keep me")?;
        let mut words = host.restore_words(&copy.data_dir, &["--latest", "--delta"]);
        let flag = words.iter().position(|word| word == "--tablespace").expect("mapped by default");
        words[flag + 1] = format!("{}={}", host.tablespace, taken.display());
        host.run(&words)?.exit(REFUSED)?.says("does not lead to it")?;
        anyhow::ensure!(copy.data_dir.join(CONTROL).exists(), "a refused restore has changed the copy");

        // An empty directory is restored to as without --delta.
        let expected = Fingerprint::take(&host.server.session()?)?;
        let empty = host.restore("empty", &["--latest", "--delta"])?;
        must_be_whole(&host, "server4", &empty, &expected)
    });
}

/// Two backups, the second with pages laid over what the first stored.
fn prepared(scratch: &walfleet_integration_tests::scratch::Scratch) -> anyhow::Result<Standalone> {
    let host = Standalone::start(scratch, &PgVersion::newest()?, Place::folder(scratch)?)?;
    host.backup()?;
    host.server.session()?.execute("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 20000 < 5")?;
    host.backup()?;
    host.archive_all()?;
    Ok(host)
}

/// Runs a restore while the largest pack never comes to its end, and kills it.
fn kill_in_the_midst(
    host: &Standalone,
    name: &str,
    target: &[&str],
    mut seen: impl FnMut(&Path) -> bool,
) -> anyhow::Result<PathBuf> {
    let data_dir = host.scratch().join(name);
    let packs = host.scratch().join("repository/clusters").join(CLUSTER).join("packs");
    let pack = tree::largest_file(&packs, "")?;
    let aside = pack.with_extension("aside");
    std::fs::rename(&pack, &aside)?;
    let mut endless = os_user().command("mkfifo");
    endless.arg(&pack);
    run(endless)?;
    let command = host.command(&host.restore_words(&data_dir, target))?;
    let mut agent = Process::spawn(host.scratch(), &format!("restore-{name}"), command, Signal::KILL)?;
    let began = Instant::now();
    while !seen(&data_dir) {
        anyhow::ensure!(began.elapsed() < LIMIT, "not seen in {LIMIT:?}:\n{}", agent.log_text());
        anyhow::ensure!(agent.ended()?.is_none(), "it ended:\n{}", agent.log_text());
    }
    agent.signal(Signal::KILL);
    agent.wait(LIMIT)?;
    std::fs::rename(&aside, &pack)?;
    Ok(data_dir)
}

type Contents = BTreeMap<PathBuf, (u32, Vec<u8>)>;

/// Permissions and content, or the link's target, of everything below the two.
fn contents(data_dir: &Path, tablespace: &Path) -> anyhow::Result<Contents> {
    let mut found = BTreeMap::new();
    let all = tree::all(data_dir)?.into_iter().chain(tree::all(tablespace)?);
    // How far the archive reached when the restore was planned: WAL comes all the time.
    for (path, meta) in all.filter(|(path, _)| !path.ends_with("pg_wal/walfleet-restore.json")) {
        let content = match meta {
            ref meta if meta.is_file() => std::fs::read(&path)?,
            ref meta if meta.is_symlink() => std::fs::read_link(&path)?.into_os_string().into_encoded_bytes(),
            _ => Vec::new(),
        };
        found.insert(path, (meta.permissions().mode(), content));
    }
    Ok(found)
}

fn must_equal(expected: &Contents, found: &Contents) -> anyhow::Result<()> {
    let differ = |a: &Contents, b: &Contents| -> Vec<PathBuf> {
        a.iter().filter(|(path, content)| b.get(*path) != Some(*content)).map(|(path, _)| path.clone()).collect()
    };
    let (missing, more) = (differ(expected, found), differ(found, expected));
    anyhow::ensure!(missing.is_empty() && more.is_empty(), "missing or different: {missing:?}, too many: {more:?}");
    Ok(())
}

/// Starts it under a name of its own, and compares.
fn must_be_whole(host: &Standalone, name: &str, restored: &Restored, expected: &Fingerprint) -> anyhow::Result<()> {
    let data_dir = restored.data_dir.clone();
    let named = Restored { name: name.to_owned(), data_dir, port: free_port(), report: serde_json::Value::Null };
    let mut server = host.recovered(&named)?;
    Fingerprint::take(&server.session()?)?.must_equal(expected)?;
    server.stop(Shutdown::Fast)
}
