//! Streaming that cannot run, where somebody counts on it.

use std::time::{Duration, Instant};

use walfleet_repository::shipping::{Streaming, Synchronous};

use crate::archiving::Shipping;
use crate::postgres::server::{KeptWal, ServerFacts, ServerRole};
use crate::wal::receive::BESIDE_AFTER;

/// Longer than a server's restart, or a connection's, and shorter than anybody would wait for a commit.
const PATIENCE: Duration = BESIDE_AFTER;

/// Less is kept for every server that is away for a while.
const MUCH: u64 = 1 << 30;

const HINT: &str = "streaming takes a role that may replicate, a WAL sender (max_wal_senders), a slot (max_replication_slots) and \
     a line for replication in pg_hba.conf; `walfleet-agent doctor` looks.";

/// What is to be said of a server that answers and whose WAL is not streamed at `now`. Where `archive_command` ships, the policy
/// does not ask for more and no commit waits, nothing.
pub fn problem(server: &ServerFacts, shipping: &Shipping, now: Instant) -> Option<String> {
    let why = shipping.streamed.phase.problem()?;
    let since = shipping.streamed.waiting_since?;
    if now.duration_since(since) < PATIENCE {
        return None;
    }
    let spec = shipping.shipping;
    let archives = server.archive.mode != "off" && server.archive.command.is_some();
    let is_synchronous = spec.synchronous.unwrap_or_default() != Synchronous::Off;
    let consequence = if is_synchronous && server.role == ServerRole::Primary {
        ", and commits that wait for the agent do not return"
    } else if spec.streaming == Some(Streaming::On) || is_synchronous {
        ""
    } else if server.role == ServerRole::Primary && !archives {
        ", and until it is it is read from pg_wal now and then"
    } else {
        return None;
    };
    let (why, hint) = why.split_once("\nHINT: ").unwrap_or((why, HINT));
    Some(format!("WAL is not streamed{consequence}: {why}\nHINT: {hint}"))
}

/// What a slot keeps though nobody is to stream from it, or cannot: `pg_wal` grows without end. Whether the repository has that WAL by
/// another way is nothing to the server.
pub fn kept_for_nothing(kept: &KeptWal, slot: &str, (is_off, is_well): (bool, bool)) -> Option<String> {
    let mib = kept.bytes >> 20;
    if is_off {
        return Some(format!(
            "WAL is not to be streamed, and the replication slot {slot} keeps it all the same: {mib} MiB in pg_wal, ever more\n\
             HINT: unless something else uses it: SELECT pg_drop_replication_slot('{slot}')."
        ));
    }
    (!is_well && kept.bytes >= MUCH).then(|| {
        format!("WAL is not streamed, and the replication slot {slot} keeps it for that: {mib} MiB in pg_wal, ever more\nHINT: {HINT}")
    })
}

#[cfg(test)]
mod tests {
    use walfleet_repository::postgres::Lsn;
    use walfleet_repository::shipping::ShippingSpec;

    use super::*;
    use crate::doctor::tests::good_server;

    #[test]
    fn streaming_that_cannot_run_is_told_where_somebody_counts_on_it() {
        let waiting = Instant::now();
        let told = |change: &dyn Fn(&mut ShippingSpec, &mut ServerFacts), seconds| {
            let (mut shipping, mut server) = (Shipping::default(), good_server());
            change(&mut shipping.shipping, &mut server);
            shipping.streamed.wait("no pg_hba.conf entry for replication connection".to_owned());
            shipping.streamed.waiting_since = Some(waiting);
            problem(&server, &shipping, waiting + Duration::from_secs(seconds))
        };
        assert_eq!(told(&|_, _| (), 3600), None, "archive_command ships it");
        let on = |spec: &mut ShippingSpec, _: &mut ServerFacts| spec.streaming = Some(Streaming::On);
        assert_eq!(told(&on, 20), None, "the server may be starting");
        let problem = told(&on, 40).expect("it is asked for");
        assert!(problem.starts_with("WAL is not streamed: no pg_hba.conf entry"), "{problem}");
        assert!(problem.contains("\nHINT: streaming takes"), "{problem}");
        let waited_for = told(&|spec, _| spec.synchronous = Some(Synchronous::Repository), 40).expect("commits wait");
        assert!(waited_for.contains("do not return: no pg_hba.conf entry"), "{waited_for}");
        let alone = |_: &mut ShippingSpec, server: &mut ServerFacts| server.archive.mode = "off".to_owned();
        assert!(told(&alone, 40).expect("nothing else ships").contains("read from pg_wal now and then"));
        let standby = |spec: &mut ShippingSpec, server: &mut ServerFacts| {
            alone(spec, server);
            server.role = ServerRole::Standby;
        };
        assert_eq!(told(&standby, 3600), None, "its primary's agent brings it");
    }

    #[test]
    fn a_reason_that_changes_begins_no_new_wait() {
        let mut shipping = Shipping::default();
        shipping.streamed.wait("one".to_owned());
        let since = shipping.streamed.waiting_since;
        shipping.streamed.wait("another".to_owned());
        assert_eq!((shipping.streamed.waiting_since, shipping.streamed.phase.problem()), (since, Some("another")));
    }

    #[test]
    fn a_slot_that_nobody_moves_is_told_of() {
        let told = |mib: u64, is_off, is_well| {
            let kept = KeptWal { from: Lsn(1), bytes: mib << 20, segment_bytes: 16 << 20, is_archived: true };
            kept_for_nothing(&kept, "walfleet", (is_off, is_well)).unwrap_or_default()
        };
        assert!(told(0, true, false).contains("pg_drop_replication_slot('walfleet')"));
        assert!(told(1500, false, false).contains("keeps it for that: 1500 MiB"));
        assert_eq!((told(500, false, false), told(1500, false, true)), (String::new(), String::new()));
    }
}
