//! Ahead of a recovering server: brings the segments that it will ask for next, so that replay and not fetching is the limit.
//!
//! A process of its own, started by `wal fetch` and ended by itself: when there is no more to bring, when the server is
//! gone, or when nobody has taken anything for a while. What it brings lies beside `pg_wal`'s own files; delivering it is a
//! rename. Nothing depends on it: what it does not bring, `wal fetch` brings itself.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, test_kill_process};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use walfleet_repository::postgres::Segment;
use walfleet_repository::wal_archive::WalArchive;

use crate::postgres::instance::Postmaster;

use super::fetch::{AHEAD_FOLDER, FetchError, PARTIAL, Plan, RestoreSource, open_archive};

/// Held while one brings segments; says which are coming, a name a line.
const LOCK: &str = "lock";

/// What it says until that is known.
const PLANNING: &str = "?\n";

/// Segments being fetched at once, and kept ahead, at first; doubled whenever the server had to wait, up to as many sealed
/// ones as fit into [`SEALED_BYTES`] if they do not compress, and to what the restore was told.
const FIRST_AT_ONCE: usize = 4;
const FIRST_WINDOW: usize = 8;
const SEALED_BYTES: usize = 128 << 20;

/// Being opened at once: more would take the server's CPU, and not be sooner.
const OPENING: usize = 4;

/// Of the file system's free space, what lies ahead may take a tenth.
const SHARE_OF_FREE: u64 = 10;

/// Between two looks at what was taken.
const LOOK: Duration = Duration::from_millis(5);

/// A server that asks for nothing for so long replays something long, or is paused; the next call begins anew.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a segment that is coming is waited for, and how long for one to be begun.
const COMING: Duration = Duration::from_secs(60);
const BEGUN: Duration = Duration::from_millis(50);

fn folder() -> &'static Path {
    Path::new(AHEAD_FOLDER)
}

fn lock_path() -> PathBuf {
    folder().join(LOCK)
}

/// Whether somebody brings segments at this moment.
fn is_running() -> bool {
    let Ok(file) = File::open(lock_path()) else { return false };
    flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Starts bringing what follows a segment, unless somebody does. It is never waited for.
pub fn start(source: &Path, after: &str) {
    if is_running() || std::fs::create_dir_all(folder()).is_err() {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.args(["wal", "prefetch", "--source"]).arg(source).arg(after);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let _ = command.spawn();
}

/// In the lock file, which never says nothing meanwhile.
fn say(lock: &File, names: &str) {
    let _ = lock.write_all_at(names.as_bytes(), 0);
    let _ = lock.set_len(names.len() as u64);
}

/// What one that ended had begun to write. Only who has the lock writes here.
fn remove_halves() {
    for entry in std::fs::read_dir(folder()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(PARTIAL) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Waits while somebody brings this segment; whether it came.
pub fn wait_for(name: &str) -> bool {
    let (begun, waiting) = (Instant::now(), folder().join(name));
    loop {
        // In this order: whoever brought it may have ended since.
        let running = is_running();
        let coming = std::fs::read_to_string(lock_path())
            .is_ok_and(|names| names == PLANNING || names.lines().any(|coming| coming == name));
        if waiting.exists() {
            return true;
        }
        if !running || begun.elapsed() > if coming { COMING } else { BEGUN } {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Brings what follows a segment until there is no more to do.
pub fn run(source_file: &Path, after: &str) -> Result<(), FetchError> {
    let Ok(lock) = File::options().create(true).write(true).truncate(false).open(lock_path()) else { return Ok(()) };
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    let told = PLANNING.to_owned();
    say(&lock, &told);
    remove_halves();
    let (source, plan) = RestoreSource::read(source_file)?;
    let after = plan.segment(after)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| FetchError::Internal(format!("start the runtime: {error}")))?;
    let brought = runtime.block_on(async {
        let (mut plan, archive) = (plan.clone(), open_archive(&plan, &source).await?);
        plan.read_divergences(&archive).await?;
        let mut ahead = Ahead {
            most: source.read_ahead.max(1) as usize,
            window: FIRST_WINDOW,
            at_once: FIRST_AT_ONCE,
            most_at_once: (SEALED_BYTES / plan.size().bytes() as usize).clamp(FIRST_AT_ONCE, 16),
            opening: Arc::new(Semaphore::new(OPENING)),
            told,
            next: plan.after(after),
            waiting: VecDeque::new(),
            taken: Instant::now(),
            server: server(),
            lock: &lock,
            plan,
            archive,
        };
        ahead.bring().await
    });
    runtime.shutdown_timeout(Duration::from_millis(100));
    drop(lock);
    brought
}

struct Ahead<'a> {
    plan: Plan,
    lock: &'a File,
    /// Its process, if it leaves a trace.
    server: Option<u32>,
    archive: WalArchive,
    /// Kept ahead, and the most that may be.
    window: usize,
    most: usize,
    at_once: usize,
    most_at_once: usize,
    opening: Arc<Semaphore>,
    /// What the lock file says.
    told: String,
    /// `None`: there is no more.
    next: Option<Segment>,
    /// Brought and not taken, or being brought, in the order of replay.
    waiting: VecDeque<Segment>,
    taken: Instant,
}

impl Ahead<'_> {
    async fn bring(&mut self) -> Result<(), FetchError> {
        let mut tasks: JoinSet<Result<(Segment, bool), FetchError>> = JoinSet::new();
        let mut coming = BTreeSet::new();
        loop {
            self.note_taken(&coming);
            while tasks.len() < self.at_once && self.waiting.len() < self.window.min(self.room()) {
                let Some(segment) = self.next else { break };
                self.next = self.plan.after(segment);
                self.waiting.push_back(segment);
                if self.path(segment).exists() {
                    continue;
                }
                coming.insert(segment);
                let (archive, plan, opening) = (self.archive.clone(), self.plan.clone(), Arc::clone(&self.opening));
                tasks.spawn(async move {
                    let destination = folder().join(segment.file_name(plan.size()));
                    Ok((segment, plan.bring(&archive, segment, destination, &opening).await?))
                });
            }
            self.tell(&coming);
            if self.server != server()
                || tasks.is_empty() && (self.waiting.is_empty() || self.taken.elapsed() > PATIENCE)
            {
                return Ok(());
            }
            tokio::select! {
                Some(done) = tasks.join_next() => {
                    let (segment, found) = done.map_err(|bug| FetchError::Internal(bug.to_string()))??;
                    coming.remove(&segment);
                    if !found {
                        // The end of what there is.
                        self.next = None;
                        self.waiting.retain(|waiting| *waiting < segment);
                    }
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Forgets what the server has taken. If it took the last that was there, it could have used more.
    fn note_taken(&mut self, coming: &BTreeSet<Segment>) {
        let before = self.waiting.len();
        let gone = |ahead: &Ahead<'_>, segment: &Segment| !coming.contains(segment) && !ahead.path(*segment).exists();
        while let Some(first) = self.waiting.front().copied().filter(|first| gone(self, first)) {
            self.waiting.retain(|waiting| *waiting != first);
        }
        if self.waiting.len() < before {
            self.taken = Instant::now();
            let starved = self.waiting.front().is_none_or(|first| coming.contains(first));
            if starved {
                self.window = (self.window * 2).min(self.most);
                self.at_once = (self.at_once * 2).min(self.most_at_once);
            }
        }
    }

    /// What is coming, and what will be begun when that is there. A fetch that reads it half written looks again.
    fn tell(&mut self, coming: &BTreeSet<Segment>) {
        let room = self.window.min(self.room()).saturating_sub(self.waiting.len());
        let planned = std::iter::successors(self.next, |segment| self.plan.after(*segment)).take(room);
        let names: String =
            coming.iter().copied().chain(planned).map(|segment| segment.file_name(self.plan.size()) + "\n").collect();
        if names != self.told {
            say(self.lock, &names);
            self.told = names;
        }
    }

    fn path(&self, segment: Segment) -> PathBuf {
        folder().join(segment.file_name(self.plan.size()))
    }

    /// As many segments as the disk has room for.
    fn room(&self) -> usize {
        let Ok(space) = rustix::fs::statvfs(folder()) else { return 0 };
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        usize::try_from(free / SHARE_OF_FREE / u64::from(self.plan.size().bytes())).unwrap_or(usize::MAX)
    }
}

/// The process of the server that runs here: its working directory is ours.
fn server() -> Option<u32> {
    let found = Postmaster::parse(&std::fs::read("postmaster.pid").ok()?).ok()?;
    let pid = Pid::from_raw(i32::try_from(found.pid).ok()?)?;
    test_kill_process(pid).is_ok().then_some(found.pid)
}
