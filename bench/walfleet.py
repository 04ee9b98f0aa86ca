"""Our side: walfleet-agent without a controller, its daemon shipping WAL as it would in production."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import timed
from place import BenchError, Place

CLUSTER = "bench"

CONFIGURATION = """
name: bench
state_dir: {state}
socket: {socket}
instances:
  - {{cluster: {cluster}, data_dir: {data}, connection: "{connection}"}}
repository: {{url: "file://{repository}", key_file: {key}}}
backup: {{processes: {processes}, compression_level: {level}}}
telemetry: {{log: warn}}
"""


class Walfleet:
    name = "walfleet"
    title = "walfleet"

    def __init__(self, place: Place, processes: int, level: int):
        self.place, self.processes, self.level = place, processes, level
        self.agent = place.agent
        self.repository = place.folder / "repositories" / self.name
        self.restored = place.folder / "restored" / self.name
        self.state = place.folder / "state"
        self.socket = place.sockets / "agent.sock"
        self.key = place.folder / "etc" / "recovery.key"
        self.configuration = place.folder / "etc" / "agent.yaml"
        self.pid_file = place.folder / "agent.pid"

    def version(self) -> str:
        return self.place.run(self.agent, "--version").split()[-1]

    def settings(self) -> dict:
        return {"processes": self.processes, "compression": f"zstd level {self.level}", "encryption": "AES-256-GCM",
                "checkpoint": "--fast"}

    def begin(self, data: Path, connection: str):
        """A new repository, and the daemon that WAL is handed to. The server need not run yet."""
        self.place.fresh(self.repository)
        self.place.fresh(self.state)
        self.key.unlink(missing_ok=True)
        self.place.run(self.agent, "init", "--repository", f"file://{self.repository}", "--key-file", self.key)
        self.configuration.write_text(CONFIGURATION.format(
            state=self.state, socket=self.socket, cluster=CLUSTER, data=data, connection=connection,
            repository=self.repository, key=self.key, processes=self.processes, level=self.level))
        # Started over a shell that ends at once, so that it is no child of the timing process.
        log = self.place.logs / "walfleet-agent.log"
        script = f'"$0" run --config "$1" >>{log} 2>&1 </dev/null & echo $!'
        self.pid_file.write_text(self.place.run("sh", "-c", script, self.agent, self.configuration))
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            if time.monotonic() > deadline or not self.pid():
                raise BenchError(f"the agent did not start\n{timed.tail(log)}")
            time.sleep(0.05)

    def pid(self) -> int | None:
        """Of the daemon, also of one that an earlier run left behind; never of a stranger with the same number."""
        try:
            pid = int(self.pid_file.read_text())
            program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        except (OSError, ValueError):
            return None
        return pid if program == str(self.agent) else None

    def end(self):
        """Stops the daemon; the repository stays."""
        pid = self.pid()
        if pid:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 30
            while self.pid():
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    deadline += 30
                time.sleep(0.05)
        self.pid_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def archive_command(self) -> str:
        return f"{self.agent} wal push --socket {self.socket} %p"

    def full_backup(self) -> list:
        return [self.agent, "backup", "--config", self.configuration, "--cluster", CLUSTER, "--fast"]

    def next_backup(self) -> list:
        return self.full_backup()  # there is but one kind

    def prepare_restore(self):
        shutil.rmtree(self.restored, ignore_errors=True)

    def restore(self) -> list:
        return [self.agent, "restore", "--config", self.configuration, "--cluster", CLUSTER, "--data-dir", self.restored]

    def delta_restore(self) -> list:
        return [*self.restore(), "--delta"]

    def stored(self) -> int:
        """Bytes of backups, WAL not counted."""
        return timed.size(self.repository) - timed.size(self.repository / "clusters" / CLUSTER / "wal")


def revision(project: Path) -> str:
    """The commit that is measured, marked if the tree differs from it."""
    git = ["git", "-C", str(project)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("-modified" if changed.stdout.strip() else "")
