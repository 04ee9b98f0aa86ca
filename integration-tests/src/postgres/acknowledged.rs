//! A workload that remembers what it was told: which commits were acknowledged, and when. It is the judge of what may be
//! lost with a host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::{PgServer, Session};

/// Clients that insert row after row, each its own numbers, one a transaction. One whose connection is lost connects again,
/// and goes on behind what it finds.
pub struct Acknowledged {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<anyhow::Result<Vec<Told>>>>,
}

/// Before a connection is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// When a client was told that a commit is durable.
#[derive(Clone, Copy)]
struct Told {
    at: Instant,
    clock: SystemTime,
}

/// When each client's commits were acknowledged, in their order.
pub struct Record {
    clients: Vec<Vec<Told>>,
}

/// What a restored server lacks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    pub commits: usize,
    /// From the first acknowledged commit that is missing to the disaster.
    pub time: Duration,
    /// When the first of them was acknowledged.
    pub since: Option<SystemTime>,
}

impl Acknowledged {
    /// `settings` for each session: "SET synchronous_commit = remote_write".
    pub fn start(server: &PgServer, clients: u32, settings: &str) -> anyhow::Result<Acknowledged> {
        let session = server.session()?;
        session.execute(
            "CREATE TABLE IF NOT EXISTS acknowledged (client int, number int, filler text, PRIMARY KEY (client, number));
             TRUNCATE acknowledged",
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..clients)
            .map(|client| {
                let (stop, connection) = (Arc::clone(&stop), server.connection());
                let settings = settings.to_owned();
                std::thread::spawn(move || insert(&connection, client, &settings, &stop))
            })
            .collect();
        Ok(Acknowledged { stop, clients })
    }

    /// What was acknowledged until now, or until the server ended.
    pub fn end(self) -> anyhow::Result<Record> {
        self.stop.store(true, Ordering::Relaxed);
        let join = |client: JoinHandle<anyhow::Result<Vec<Told>>>| {
            client.join().unwrap_or_else(|bug| std::panic::resume_unwind(bug))
        };
        Ok(Record { clients: self.clients.into_iter().map(join).collect::<Result<_, _>>()? })
    }
}

fn insert(connection: &str, client: u32, settings: &str, stop: &AtomicBool) -> anyhow::Result<Vec<Told>> {
    let mut acknowledged: Vec<Told> = Vec::new();
    let told = || Told { at: Instant::now(), clock: SystemTime::now() };
    while !stop.load(Ordering::Relaxed) {
        let Ok(session) = begin(connection, settings) else {
            std::thread::sleep(AGAIN);
            continue;
        };
        // What was committed when the last connection was lost nobody was told; now it is seen.
        let Ok(found) = session.number(&format!("SELECT count(*) FROM acknowledged WHERE client = {client}")) else {
            continue;
        };
        let found = usize::try_from(found).context("a count")?;
        anyhow::ensure!(
            found >= acknowledged.len(),
            "client {client} was told of {}, and {found} are there",
            acknowledged.len()
        );
        acknowledged.resize_with(found, told);
        while !stop.load(Ordering::Relaxed) {
            let number = acknowledged.len() + 1;
            let sql = format!("INSERT INTO acknowledged VALUES ({client}, {number}, repeat('x', {}))", number % 500);
            if session.execute(&sql).is_err() {
                break;
            }
            acknowledged.push(told());
        }
    }
    Ok(acknowledged)
}

fn begin(connection: &str, settings: &str) -> anyhow::Result<Session> {
    let session = Session::open(connection)?;
    session.execute(settings)?;
    Ok(session)
}

impl Record {
    pub fn commits(&self) -> usize {
        self.clients.iter().map(Vec::len).sum()
    }

    /// Holds a restored server against it. Numbers must be there without a hole: recovery ends at one place in the WAL.
    pub fn lost(&self, session: &Session, disaster: Instant) -> anyhow::Result<Lost> {
        self.lost_in(session, "acknowledged", disaster)
    }

    /// The same where the table was renamed since.
    pub fn lost_in(&self, session: &Session, table: &str, disaster: Instant) -> anyhow::Result<Lost> {
        let mut lost = Lost::default();
        for (client, acknowledged) in self.clients.iter().enumerate() {
            let sql = format!("SELECT count(*), coalesce(max(number), 0) FROM {table} WHERE client = {client}");
            let row = session.rows(&sql)?.pop().context("one row")?;
            let number = |column: usize| row.get(column).cloned().flatten().and_then(|text| text.parse::<usize>().ok());
            let (count, last) = (number(0).context("a count")?, number(1).context("a number")?);
            anyhow::ensure!(count == last, "client {client} has {count} rows, numbered up to {last}");
            if let Some(missing) = acknowledged.get(last..).filter(|missing| !missing.is_empty()) {
                lost.commits += missing.len();
                let first = missing.first().map_or(disaster, |told| told.at);
                lost.time = lost.time.max(disaster.saturating_duration_since(first));
                lost.since = lost.since.into_iter().chain(missing.iter().map(|told| told.clock)).min();
            }
        }
        Ok(lost)
    }
}
