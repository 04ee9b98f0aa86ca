"""Our side: walfleet-agent without a controller, its daemon shipping WAL as it would in production."""

import hashlib
import json
import subprocess
from pathlib import Path

import timed
from daemon import Daemon
from object_store import ObjectStore
from place import Place

CLUSTER = "bench"

CONFIGURATION = """
name: bench
state_dir: {state}
socket: {socket}
instances:
  - {{cluster: {cluster}, data_dir: {data}, connection: "{connection}"}}
repository: {{url: "{url}", options: {options}, key_file: {key}}}
backup: {{processes: {processes}, compression_level: {level}}}
wal: {wal}
telemetry: {{log: warn}}
"""


class Walfleet:
    title = "walfleet"

    def __init__(self, place: Place, processes: int, level: int, store: ObjectStore | None = None, wal: dict | None = None):
        self.place, self.processes, self.level, self.store = place, processes, level, store
        self.wal = wal or {}  # settings of the agent's section of that name
        self.name = "walfleet-s3" if store else "walfleet"
        self.agent = place.agent
        self.repository = store.folder if store else place.folder / "repositories" / self.name
        self.restored = place.folder / "restored" / self.name
        self.state = place.folder / "state"
        self.socket = place.sockets / "agent.sock"
        self.key = place.folder / "etc" / "recovery.key"
        self.configuration = place.folder / "etc" / "agent.yaml"
        self.daemon = Daemon(place, "walfleet-agent", self.agent)
        self.cluster = CLUSTER

    def version(self) -> str:
        return self.place.run(self.agent, "--version").split()[-1]

    def settings(self) -> dict:
        return {"processes": self.processes, "compression": f"zstd level {self.level}", "encryption": "AES-256-GCM",
                "checkpoint": "--fast"}

    def begin(self, data: Path, connection: str):
        """A new repository, and the daemon that WAL is handed to. The server need not run yet."""
        if self.store:
            self.store.renew()
        else:
            self.place.fresh(self.repository)
        self.key.unlink(missing_ok=True)
        options = [part for name, value in self.options().items() for part in ("--option", f"{name}={value}")]
        self.place.run(self.agent, "init", "--repository", self.url(), *options, "--key-file", self.key)
        self.serve(data, connection, CLUSTER)

    def url(self) -> str:
        return self.store.url if self.store else f"file://{self.repository}"

    def options(self) -> dict[str, str]:
        return self.store.options() if self.store else {}

    def serve(self, data: Path, connection: str, cluster: str):
        """The daemon of a host that has seen nothing yet, for an instance that is a member of this cluster."""
        self.cluster = cluster
        self.place.fresh(self.state)
        self.configure(data, connection, self.wal)
        self.start()

    def start(self):
        self.daemon.start(["run", "--config", self.configuration], self.socket.exists)

    def configure(self, data: Path, connection: str, wal: dict):
        self.configuration.write_text(CONFIGURATION.format(
            state=self.state, socket=self.socket, cluster=self.cluster, data=data, connection=connection, url=self.url(),
            options=json.dumps(self.options()), key=self.key, processes=self.processes, level=self.level,
            wal=json.dumps(wal)))

    def knows(self, wal: dict) -> bool:
        """Whether this agent takes such settings. There need not be a repository."""
        self.configure(self.place.folder / "data", "", wal)
        told = subprocess.run([self.agent, "list", "--config", self.configuration], capture_output=True, text=True,
                              **self.place.as_user())
        return "read configuration" not in told.stderr

    def pid(self) -> int | None:
        return self.daemon.pid()

    def end(self):
        """Stops the daemon; the repository stays."""
        self.daemon.end()
        self.socket.unlink(missing_ok=True)

    def archive_command(self) -> str:
        return f"{self.agent} wal push --socket {self.socket} %p"

    def full_backup(self) -> list:
        return [self.agent, "backup", "--config", self.configuration, "--cluster", self.cluster, "--fast", "-o", "json"]

    def next_backup(self) -> list:
        return self.full_backup()  # there is but one kind

    def prepare_restore(self):
        self.place.discard(self.restored)

    def restore(self) -> list:
        return self.restore_of(self.cluster, self.restored)

    def restore_of(self, cluster: str, folder: Path) -> list:
        return [self.agent, "restore", "--config", self.configuration, "--cluster", cluster, "--data-dir", folder, "-o", "json"]

    def delta_restore(self) -> list:
        return [*self.restore(), "--delta"]

    def stored(self) -> int:
        """Bytes of backups, WAL not counted."""
        return timed.size(self.repository) - self.wal_stored()

    def wal_stored(self) -> int:
        return sum(timed.size(cluster / "wal") for cluster in (self.repository / "clusters").glob("*"))


def revision(project: Path) -> str:
    """The commit that is measured; if the tree differs from it, with a hash of how."""
    git = ["git", "-C", str(project)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "HEAD"], capture_output=True)
    if commit.returncode:
        return "unknown"
    suffix = f"-modified-{hashlib.sha256(changed.stdout).hexdigest()[:8]}" if changed.stdout else ""
    return commit.stdout.strip() + suffix
