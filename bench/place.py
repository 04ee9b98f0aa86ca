"""Where a benchmark works and as whom: folders, the unprivileged user, PostgreSQL's programs, the sizes of the data.

Everything lies below one folder (WALFLEET_BENCH, default /var/tmp/walfleet-bench), which may be removed at any time.
"""

import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class BenchError(Exception):
    """Something that a benchmark needs is missing or failed; the text says what, and what to do."""


@dataclass(frozen=True)
class Sizes:
    """How much data, and how patient the measuring is."""

    scale: int  # of pgbench: 100,000 accounts each, about 15 MB
    documents: int  # rows of about 1.4 kB of text and jsonb
    samples: int
    wal_samples: int  # of what takes seconds, and differs by more from one time to the next
    more_samples: int  # at most so many again if a sample was disturbed by foreign load
    patience_seconds: float  # to wait for a quiet machine before each sample
    further_samples: int  # of the peers that are shown for information, and of object stores
    segments: int  # of WAL that are shipped and fetched
    calls: int  # of archive_command under load, in each sample
    replayed: int  # segments that are replayed up to the first query
    pairs: int  # of what streaming costs transactions, and of what stands in its place
    seconds: int  # that each measurement of those takes
    destructions: int  # of a host


FULL = Sizes(scale=250, documents=700_000, samples=3, wal_samples=7, more_samples=3, patience_seconds=180, further_samples=2,
             segments=200, calls=40, replayed=66, pairs=10, seconds=15, destructions=50)
QUICK = Sizes(scale=40, documents=70_000, samples=2, wal_samples=2, more_samples=0, patience_seconds=6, further_samples=1,
              segments=40, calls=12, replayed=12, pairs=2, seconds=6, destructions=5)

# Nothing that is run here takes nearly so long: what does hangs.
LIMIT_SECONDS = 1800

# What a run needs at its peak, with what it keeps from run to run.
PEAK_BYTES = {"quick": 6 << 30, "full": 22 << 30}


# Programs of this folder that are run as the unprivileged user.
SCRIPTS = ("miniature.py", "time_call.sh", "first_query.sh")


class Place:
    def __init__(self, quick: bool):
        self.quick = quick
        self.sizes = QUICK if quick else FULL
        if patience := os.environ.get("WALFLEET_BENCH_PATIENCE"):
            self.sizes = replace(self.sizes, patience_seconds=float(patience))
        self.folder = Path(os.environ.get("WALFLEET_BENCH", "/var/tmp/walfleet-bench")).absolute()
        self.user = choose_user()
        self.postgres = choose_postgres()
        self.sockets = self.folder / "run"
        self.logs = self.folder / "logs"
        self.agent = self.folder / "bin" / "walfleet-agent"
        self.environment: dict[str, str] = {}  # what commands get beside the clean one
        self.report = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "target")) / "bench"

    def make(self, agent: Path):
        """Makes the folders, and copies what is run to where the unprivileged user may run it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report.mkdir(parents=True, exist_ok=True)
        self.lock()
        for folder in ("run", "logs", "home", "tmp", "etc", "bin", "repositories", "restored"):
            path = self.folder / folder
            path.mkdir(exist_ok=True)
            self.give(path)
        self.lay(agent, self.agent)
        for name in SCRIPTS:
            self.lay(PROJECT / "bench" / name, self.script(name))
        held = sum(path.lstat().st_size for path in self.folder.rglob("*") if not path.is_dir())
        free, wanted = shutil.disk_usage(self.folder).free, PEAK_BYTES["quick" if self.quick else "full"] - held
        if free < wanted:
            raise BenchError(f"{self.folder} has {free >> 30} GiB free, and {wanted >> 30} GiB are needed\n"
                             "HINT: set WALFLEET_BENCH to a folder with room, or QUICK=1.")

    def lock(self):
        """Until this process ends: of two runs in one folder each would remove what the other works on."""
        self.held = open(self.folder / "lock", "w", encoding="ascii")
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchError(f"another run works in {self.folder}\nHINT: wait for it, or set WALFLEET_BENCH.") from None

    def lay(self, program: Path, path: Path):
        path.unlink(missing_ok=True)
        shutil.copy(program, path)
        path.chmod(0o755)

    def script(self, name: str) -> Path:
        return self.folder / "bin" / name

    def give(self, path: Path):
        if self.user:
            shutil.chown(path, self.user, self.user_group())

    def user_group(self) -> int:
        return pwd.getpwnam(self.user).pw_gid

    def fresh(self, path: Path, mode: int = 0o700) -> Path:
        """An empty folder of the unprivileged user, whatever was there."""
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, mode=mode)
        self.give(path)
        return path

    def discard(self, path: Path):
        """Frees the room of what lies there, and has `remove_discarded` remove it.

        Of files that were removed within the last minutes ext4 passes over the inodes one by one whenever it makes a new
        file (recently_deleted, fs/ext4/ialloc.c). That would slow down a restore after another, and only in a benchmark.
        """
        if not path.exists():
            return
        for file in path.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.truncate(file, 0)
        aside = self.folder / "discarded"
        aside.mkdir(exist_ok=True)
        path.rename(aside / str(time.monotonic_ns()))

    def remove_discarded(self):
        shutil.rmtree(self.folder / "discarded", ignore_errors=True)

    def as_user(self) -> dict:
        """Arguments for subprocess.Popen: the unprivileged user and an environment without settings of the caller."""
        clean = {"HOME": str(self.folder / "home"), "LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin",
                 "TZ": "UTC", "TMPDIR": str(self.folder / "tmp"), **self.environment}
        who = {"user": self.user, "group": self.user_group(), "extra_groups": []} if self.user else {}
        return {"env": clean, "cwd": str(self.folder), "stdin": subprocess.DEVNULL, **who}

    def run(self, *command, text_in: str | None = None) -> str:
        """Runs a command to its end, as the unprivileged user; what it printed."""
        options = self.as_user()
        if text_in is not None:
            del options["stdin"]
        try:
            done = subprocess.run([str(part) for part in command], input=text_in, capture_output=True, text=True,
                                  timeout=LIMIT_SECONDS, **options)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(str(error)) from None
        if done.returncode:
            raise BenchError(f"{' '.join(str(part) for part in command)}: exit code {done.returncode}\n"
                             + (done.stderr or done.stdout).strip()[-2000:])
        return done.stdout.strip()


def choose_user() -> str | None:
    """PostgreSQL refuses to run as root; without root, whoever runs this will do."""
    if os.geteuid():
        return None
    wanted = os.environ.get("WALFLEET_BENCH_USER")
    for name in [wanted] if wanted else ["postgres", "walfleet-test"]:
        try:
            pwd.getpwnam(name)
            return name
        except KeyError:
            pass
    raise BenchError("there is no unprivileged user to run PostgreSQL\nHINT: scripts/prepare.sh makes walfleet-test.")


def choose_postgres() -> Path:
    """The folder of PostgreSQL's programs: the one asked for, else version 17 as scripts/get_postgres.sh lays it down."""
    wanted = os.environ.get("WALFLEET_BENCH_POSTGRES")
    cache = os.environ.get("WALFLEET_CACHE")
    if not cache:
        home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        cache = f"{home}/walfleet-test" if os.geteuid() else "/var/cache/walfleet-test"
    folder = Path(wanted) if wanted else Path(cache) / "pg" / "17" / "bin"
    if not (folder / "postgres").exists():
        raise BenchError(f"there is no PostgreSQL in {folder}\nHINT: run scripts/prepare.sh, or set WALFLEET_BENCH_POSTGRES.")
    return folder


BEGAN = time.monotonic()


def say(text: str):
    minutes, seconds = divmod(int(time.monotonic() - BEGAN), 60)
    print(f"{minutes:3}:{seconds:02} {text}", file=sys.stderr, flush=True)
