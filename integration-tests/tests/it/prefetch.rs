//! Replay of WAL that lies in a distant store.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::s3::S3Server;
use walfleet_integration_tests::s3::fault::{Fault, Rule};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::wait_for;

use crate::both_ways::is_segment;
use crate::gaps::{SEEN, mark, marks, write_segments};

/// Every answer takes as long as this.
const FAR: Duration = Duration::from_millis(500);
const SEGMENTS: usize = 16;

#[test]
fn segments_are_fetched_ahead_of_replay_several_at_once_and_each_once() {
    in_scratch(|scratch| {
        let store = S3Server::start(&scratch.dir("s3")?)?;
        let host = Standalone::start(scratch, &PgVersion::newest()?, Place::s3(&store))?;
        host.backup()?;
        write_segments(&host.server, SEGMENTS)?;
        mark(&host.server, "last")?;
        host.archive_all()?;
        let copy = host.restore("copy", &["--latest"])?;
        store.spoil(Rule::new(Fault::Slow(FAR)).method("GET").path_contains("/wal/"));
        let before = store.seen().len();
        let server = host.recovered(&copy)?;
        anyhow::ensure!(marks(&server)? == ["last"], "{:?}", marks(&server)?);

        let mut fetched = BTreeMap::<String, u32>::new();
        let mut times = Vec::<Instant>::new();
        for request in store.seen().split_off(before).into_iter().filter(|request| request.method == "GET") {
            let name = request.path.rsplit('/').next().unwrap_or_default().to_owned();
            if is_segment(&name) {
                *fetched.entry(name).or_default() += 1;
                times.push(request.at);
            }
        }
        anyhow::ensure!(fetched.len() >= SEGMENTS, "{fetched:?}");
        // At the end of recovery the server asks for its last segment again, and for one that is not there.
        let replayed = fetched.iter().take(fetched.len() - 2);
        let twice: Vec<_> = replayed.filter(|(_, count)| **count > 1).collect();
        anyhow::ensure!(twice.is_empty(), "fetched more than once: {twice:?}");
        // Whatever came while one was on its way was asked for ahead.
        let at_once =
            |begun: &Instant| times.iter().filter(|at| *at >= begun && at.duration_since(*begun) < FAR).count();
        let most = times.iter().map(at_once).max().unwrap_or_default();
        anyhow::ensure!(most >= 5, "{most} at once at most, of {}", times.len());
        // Nor is anything left of it.
        wait_for("what was fetched ahead to be removed", SEEN, || {
            Ok((!copy.data_dir.join("pg_wal/walfleet-ahead").exists()).then_some(()))
        })
    });
}
