//! A steady load of writing transactions: pgbench's bank, and documents that come, change and go.

use std::time::Duration;

use rustix::process::Signal;

use super::barrier::GATE;
use super::dataset::Dataset;
use super::{PgServer, Session};
use crate::os_user::os_user;
use crate::process::Process;
use crate::scratch::Scratch;
use crate::wait_for;

const SESSIONS_END: Duration = Duration::from_secs(20);

/// Balances agree at every commit: [`must_balance`].
fn script() -> String {
    format!(
        r"\set account random(1, 100000 * :scale)
\set branch random(1, :scale)
\set teller random(1, 10 * :scale)
\set delta random(-5000, 5000)
\set document random(1, 2000)
\set size random(1, 300)
BEGIN;
SELECT pg_advisory_xact_lock_shared({GATE});
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :account;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :teller;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :branch;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:teller, :branch, :account, :delta, CURRENT_TIMESTAMP);
UPDATE document SET body = repeat(md5((:delta)::text), :size), at = now() WHERE id = :document;
INSERT INTO document (body, tags) VALUES (repeat(md5((:account)::text), 1 + :size % 50), ARRAY[:teller, :size % 13]);
DELETE FROM document WHERE id IN (SELECT id FROM document WHERE id > 2000 ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED);
COMMIT;
"
    )
}

/// Stops when dropped.
pub struct Load {
    process: Process,
    connection: String,
}

impl Load {
    /// `per_second` bounds the transactions of all clients together; None: as many as it can.
    pub fn start(
        scratch: &Scratch,
        server: &PgServer,
        dataset: &Dataset,
        clients: u32,
        per_second: Option<u32>,
    ) -> anyhow::Result<Load> {
        let name = format!("{}.load", server.name());
        let file = scratch.join(&format!("{name}.sql"));
        os_user().write(&file, script())?;
        let mut command = server.client("pgbench");
        command.args(["-n", "-T", "86400", "-s", &dataset.scale.to_string()]);
        command.args(["-c", &clients.to_string(), "-j", "1", "-f"]).arg(&file);
        if let Some(rate) = per_second {
            command.args(["-R", &rate.to_string()]);
        }
        let process = Process::spawn(scratch, &name, command, Signal::TERM)?;
        Ok(Load { process, connection: server.connection() })
    }

    /// A load that ended by itself has lost its server, or met an error.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.process.ended()?.is_none())
    }

    /// Ends it and waits until the server is done with it: a commit that pgbench no longer waited for may still come.
    pub fn stop(mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.is_running()?, "the load had ended by itself:\n{}", self.process.log_text());
        self.process.stop()?;
        let session = Session::open(&self.connection)?;
        wait_for("the end of the load's sessions", SESSIONS_END, || {
            let left = session.number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'")?;
            Ok((left == 0).then_some(()))
        })
    }

    pub fn leave_running(self) {
        self.process.leave_running();
    }
}

/// How many of the load's transactions a server holds.
pub fn transactions(session: &Session) -> anyhow::Result<i64> {
    session.number("SELECT count(*) FROM pgbench_history")
}

/// Accounts, tellers, branches and history agree, as at every commit: the test of consistency where no fingerprint of the
/// source is at hand.
pub fn must_balance(session: &Session) -> anyhow::Result<()> {
    let sums = session.rows(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
                (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
    )?;
    let equal = sums.iter().all(|row| row.windows(2).all(|pair| pair.first() == pair.last()));
    anyhow::ensure!(equal, "accounts, tellers, branches and history do not agree: {sums:?}");
    Ok(())
}
