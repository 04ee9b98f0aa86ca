//! Starting a restored server and waiting until it stands where it was sent.
//!
//! The server itself is asked over SQL where that is allowed; where its pg_hba.conf lets nobody in, pg_control and the
//! log tell as much as they can.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use walfleet_repository::postgres::Lsn;

use crate::jobs::order::{TargetAction, TargetPoint};
use crate::postgres::control::{ClusterState, ControlFile};
use crate::postgres::server::{Server, ServerError, local_connection_string};
use crate::progress::Progress;

/// Beside the data directory's own files; PostgreSQL's start-up messages go here until its own logging takes over.
pub const LOG_FILE: &str = "walfleet-start.log";

const POLL: Duration = Duration::from_millis(200);

/// Without SQL, how long a consistent server is watched before it is taken to stand still at its target.
const STILL: Duration = Duration::from_secs(5);

/// Before a server that let nobody in is asked again: each attempt is a line in its log.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// Enough of the log to hold what was said since the last look, whatever else is logged meanwhile.
const LOG_BYTES: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("start PostgreSQL with {program}: {source}")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error(
        "PostgreSQL did not start in {data_dir}:\n{log}\nHINT: the directory is whole; mend its configuration and start it with pg_ctl."
    )]
    NotStarted { data_dir: PathBuf, log: String },
    #[error("PostgreSQL ended during recovery in {data_dir}:\n{log}")]
    Ended { data_dir: PathBuf, log: String },
    #[error(
        "recovery ended before the target was reached: the WAL in the repository ends first\n{log}\nHINT: the directory is whole; choose an earlier target, or --latest."
    )]
    TargetNotReached { log: String },
    #[error("read pg_control of {data_dir}: {problem}")]
    Control { data_dir: PathBuf, problem: String },
    #[error("cancelled; the server was stopped and the directory stays as it is")]
    Cancelled,
}

/// How a restored server is started.
pub struct StartSpec {
    pub data_dir: PathBuf,
    pub bin_dir: PathBuf,
    pub action: TargetAction,
    pub point: TargetPoint,
    /// Users to try, in this order.
    pub users: Vec<String>,
}

/// Where the started server stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    pub state: ServerState,
    pub reached_lsn: Option<Lsn>,
    pub reached_commit: Option<Timestamp>,
    /// For psql.
    pub connection: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServerState {
    Promoted,
    Paused,
    ShutDown,
}

impl ServerState {
    pub fn name(self) -> &'static str {
        match self {
            ServerState::Promoted => "running (promoted)",
            ServerState::Paused => "running (paused at target)",
            ServerState::ShutDown => "shut down at target",
        }
    }
}

/// Starts the server and returns once it stands at its target. Cancelling stops the server.
pub async fn start(spec: &StartSpec, progress: &Progress, cancel: &CancellationToken) -> Result<Standing, StartError> {
    progress.enter("start", 0);
    launch(spec).await?;
    progress.enter("replay", 0);
    let watch = Watch { spec, socket: None, refused: None, still_since: None, last: (Lsn::INVALID, None) };
    tokio::select! {
        standing = watch.until_standing() => standing,
        () = cancel.cancelled() => {
            stop(spec).await;
            Err(StartError::Cancelled)
        }
    }
}

/// pg_ctl returns at once; what becomes of the server is watched from here.
async fn launch(spec: &StartSpec) -> Result<(), StartError> {
    let program = spec.bin_dir.join("pg_ctl");
    let status = tokio::process::Command::new(&program)
        .arg("-D")
        .arg(&spec.data_dir)
        .arg("-l")
        .arg(spec.data_dir.join(LOG_FILE))
        // What PostgreSQL says until it stands must come here, in words that are known, whatever the source's logging
        // was; stopping and starting brings that back (pg_ctl restart repeats these options).
        .args(["-o", "-c logging_collector=off -c log_destination=stderr -c lc_messages=C -c log_min_messages=warning"])
        .args(["-W", "-s", "start"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
    let status = status.map_err(|source| StartError::Spawn { program, source })?;
    if status.success() {
        return Ok(());
    }
    Err(StartError::NotStarted { data_dir: spec.data_dir.clone(), log: log_tail(&spec.data_dir) })
}

async fn stop(spec: &StartSpec) {
    let stopped = tokio::process::Command::new(spec.bin_dir.join("pg_ctl"))
        .arg("-D")
        .arg(&spec.data_dir)
        .args(["-m", "immediate", "-w", "-t", "30", "-s", "stop"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await;
    if !stopped.is_ok_and(|status| status.success()) {
        tracing::warn!(data_dir = %spec.data_dir.display(), "the restored server could not be stopped");
    }
}

/// The first lines of postmaster.pid (src/include/utils/pidfile.h).
struct PidFile {
    pid: i32,
    port: u16,
    socket_dir: PathBuf,
    /// Connections are accepted.
    is_ready: bool,
}

fn pid_file(data_dir: &Path) -> Option<PidFile> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let mut lines = text.lines();
    let pid = lines.next()?.trim().parse().ok()?;
    let port = lines.nth(2)?.trim().parse().ok()?;
    let socket_dir = PathBuf::from(lines.next()?.trim());
    let is_ready = lines.nth(2).is_some_and(|status| status.trim() == "ready");
    Some(PidFile { pid, port, socket_dir, is_ready })
}

fn is_running(data_dir: &Path) -> bool {
    let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    let pid = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    // A single-user server writes its number negative.
    let pid = pid.filter(|pid| *pid > 0).and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok())
}

struct Watch<'a> {
    spec: &'a StartSpec,
    /// What worked last: where to connect, and as whom.
    socket: Option<String>,
    /// When nobody was let in.
    refused: Option<Instant>,
    /// Without SQL: since when nothing has moved.
    still_since: Option<Instant>,
    last: (Lsn, Option<Timestamp>),
}

/// One look at the server.
enum Seen {
    Recovering,
    Standing(ServerState),
}

impl Watch<'_> {
    async fn until_standing(mut self) -> Result<Standing, StartError> {
        let mut missing = 0;
        loop {
            tokio::time::sleep(POLL).await;
            if !is_running(&self.spec.data_dir) {
                // pg_ctl -W may return before the pid file is there.
                missing += 1;
                if missing >= 5 {
                    return self.ended();
                }
                continue;
            }
            missing = 0;
            let seen = match self.ask().await {
                Some(seen) => seen,
                None => self.look()?,
            };
            if let Seen::Standing(state) = seen {
                let (lsn, at) = self.last;
                let reached_lsn = Some(lsn).filter(|lsn| *lsn != Lsn::INVALID);
                return Ok(Standing { state, reached_lsn, reached_commit: at, connection: self.socket });
            }
        }
    }

    /// Over SQL; `None` if nobody lets us in (yet).
    async fn ask(&mut self) -> Option<Seen> {
        if self.refused.is_some_and(|at| at.elapsed() < REFUSED_PAUSE) {
            return None;
        }
        let pid = pid_file(&self.spec.data_dir).filter(|pid| pid.pid > 0 && pid.is_ready)?;
        let tried: Vec<String> = match &self.socket {
            Some(known) => vec![known.clone()],
            None => {
                let users = self.spec.users.iter();
                users.map(|user| local_connection_string(&pid.socket_dir, pid.port, user)).collect()
            }
        };
        for connection in tried {
            let Ok(server) = Server::connect(&connection).await else { continue };
            self.socket = Some(connection);
            return self.standing(&server).await.ok();
        }
        self.refused = Some(Instant::now());
        None
    }

    async fn standing(&mut self, server: &Server) -> Result<Seen, ServerError> {
        let recovery = server.recovery().await?;
        self.last = (recovery.lsn, recovery.last_commit_us.and_then(|us| Timestamp::from_microsecond(us).ok()));
        Ok(match (recovery.in_recovery, recovery.paused) {
            (false, _) => Seen::Standing(ServerState::Promoted),
            (true, true) => Seen::Standing(ServerState::Paused),
            (true, false) => Seen::Recovering,
        })
    }

    /// From pg_control alone.
    fn look(&mut self) -> Result<Seen, StartError> {
        let Ok(control) = ControlFile::read(&self.spec.data_dir) else { return Ok(Seen::Recovering) };
        // A backup of a primary brings a pg_control that says "in production"; the end of recovery removes the signal.
        let signalled = self.spec.data_dir.join("recovery.signal").exists();
        if control.state == ClusterState::InProduction && !signalled {
            self.last.0 = control.checkpoint_lsn;
            return Ok(Seen::Standing(ServerState::Promoted));
        }
        let reached = replayed(&control);
        let moved = reached != self.last.0;
        self.last.0 = reached;
        let since = *self.still_since.get_or_insert_with(Instant::now);
        if moved {
            self.still_since = None;
        }
        let paused = self.spec.action == TargetAction::Pause && self.spec.point != TargetPoint::Latest;
        let says_so = || log_end(&self.spec.data_dir, LOG_BYTES).contains("pausing at the end of recovery");
        if paused && !moved && since.elapsed() >= STILL && says_so() {
            return Ok(Seen::Standing(ServerState::Paused));
        }
        Ok(Seen::Recovering)
    }

    /// The server is gone: as it should be, or not.
    fn ended(self) -> Result<Standing, StartError> {
        let data_dir = self.spec.data_dir.clone();
        let log = log_tail(&data_dir);
        let control = ControlFile::read(&data_dir)
            .map_err(|error| StartError::Control { data_dir: data_dir.clone(), problem: error.to_string() })?;
        if self.spec.action == TargetAction::Shutdown && control.state == ClusterState::ShutDownInRecovery {
            let lsn = Some(replayed(&control));
            return Ok(Standing {
                state: ServerState::ShutDown,
                reached_lsn: lsn,
                reached_commit: self.last.1,
                connection: None,
            });
        }
        if log.contains("recovery ended before configured recovery target was reached") {
            return Err(StartError::TargetNotReached { log });
        }
        match control.state {
            ClusterState::InArchiveRecovery => Err(StartError::Ended { data_dir, log }),
            _ => Err(StartError::NotStarted { data_dir, log }),
        }
    }
}

/// As far as pg_control knows: replay may have gone further.
fn replayed(control: &ControlFile) -> Lsn {
    control.min_recovery.map_or(control.checkpoint_lsn, |(lsn, _)| lsn.max(control.checkpoint_lsn))
}

/// The last lines of what PostgreSQL said at its start.
fn log_tail(data_dir: &Path) -> String {
    const LINES: usize = 12;
    let text = log_end(data_dir, 16 << 10);
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n")
}

fn log_end(data_dir: &Path, bytes: usize) -> String {
    let mut end = Vec::new();
    // What cannot be read says nothing.
    let _ = std::fs::File::open(data_dir.join(LOG_FILE)).and_then(|mut log| {
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(bytes as u64)))?;
        log.take(bytes as u64).read_to_end(&mut end)
    });
    String::from_utf8_lossy(&end).into_owned()
}
