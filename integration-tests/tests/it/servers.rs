//! The servers that all other tests stand on: every version boots, is loaded, crashes, recovers, and has a standby.

use walfleet_integration_tests::postgres::dataset::Dataset;
use walfleet_integration_tests::postgres::fingerprint::Fingerprint;
use walfleet_integration_tests::postgres::load::{Load, must_balance, transactions};
use walfleet_integration_tests::postgres::{PgServer, PgVersion, Shutdown, judge};
use walfleet_integration_tests::scratch::in_scratch;
use walfleet_integration_tests::wait_for;

use std::time::Duration;

#[test]
fn postgresql_13_to_15_survive_a_crash_under_load_and_feed_a_standby() {
    [13, 14, 15].into_iter().for_each(survive);
}

#[test]
fn postgresql_16_to_18_survive_a_crash_under_load_and_feed_a_standby() {
    [16, 17, 18].into_iter().for_each(survive);
}

fn survive(major: u32) {
    in_scratch(|scratch| {
        let version = PgVersion::of(major)?;
        let dataset = Dataset { scale: 1 };
        let mut primary = PgServer::builder(scratch, "primary", &version).create()?;
        dataset.create(&primary)?;
        let load = Load::start(scratch, &primary, &dataset, 2, None)?;
        wait_for("50 transactions", Duration::from_secs(20), || {
            Ok((transactions(&primary.session()?)? >= 50).then_some(()))
        })?;
        primary.kill_nine()?;
        drop(load);
        primary.start()?;
        must_balance(&primary.session()?)?;

        let mut standby = PgServer::builder(scratch, "standby", &version).create_standby_of(&primary)?;
        let expected = Fingerprint::take(&primary.session()?)?;
        primary.stop(Shutdown::Fast)?;
        standby.promote()?;
        Fingerprint::take(&standby.session()?)?.must_equal(&expected)?;
        judge::check_relations(&standby)?;
        standby.stop(Shutdown::Fast)?;
        judge::check_pages(&version, standby.data_dir())
    });
}
