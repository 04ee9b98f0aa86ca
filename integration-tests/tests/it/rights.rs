//! The rights that operation.md asks for are enough.

use serde_json::json;
use walfleet_integration_tests::fleet::standalone::Setup;
use walfleet_integration_tests::fleet::{Place, Standalone};
use walfleet_integration_tests::postgres::PgVersion;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::scratch::in_scratch;

const ROLE: &str = "CREATE ROLE walfleet LOGIN REPLICATION; \
    GRANT pg_read_all_settings, pg_read_all_stats, pg_checkpoint TO walfleet; \
    GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean), pg_switch_wal() TO walfleet";

#[test]
fn a_role_with_the_rights_that_are_asked_for_streams_archives_and_backs_up() {
    in_scratch(|scratch| {
        let role = Some(("walfleet".to_owned(), ROLE.to_owned()));
        let setup = Setup { role, wal: json!({ "streaming": "on" }), ..Setup::default() };
        let mut host = Standalone::set_up(scratch, &PgVersion::newest()?, Place::folder(scratch)?, setup)?;
        host.backup()?;
        let session = host.server.session()?;
        session.execute("CREATE TABLE written AS SELECT generate_series(1, 1000) n; SELECT pg_switch_wal()")?;
        session.execute("INSERT INTO written SELECT generate_series(1, 1000)")?;
        let expected = Fingerprint::take(&session)?;
        drop(session);
        host.streamed_all()?;
        host.server.kill_nine()?;
        host.agent.kill_nine()?;
        let restored = host.restore("restored", &["--latest"])?;
        let found = Fingerprint::take(&host.recovered(&restored)?.session()?)?;
        anyhow::ensure!(found == expected, "{found:?} was restored, {expected:?} was written");
        Ok(())
    });
}
