"""An S3 server on this machine, MinIO, for our rows on object stores. It shares the cores with what is measured.
"""

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import timed
from place import BenchError, Place

BUCKET = "bench"
USER, PASSWORD = "walfleet-bench", "not-a-secret"
REGION = "us-east-1"


class ObjectStore:
    name = "minio"

    def __init__(self, place: Place, program: Path):
        self.place, self.program = place, program
        self.root = place.folder / "repositories" / "objects"
        self.folder = self.root / BUCKET / "walfleet"
        self.url = f"s3://{BUCKET}/walfleet"
        self.pid_file = place.folder / "minio.pid"
        self.port = 0

    def version(self) -> str:
        """Of one that Go built, the folder's name: it does not know itself."""
        told = self.place.run(self.program, "--version").split()[2]
        return self.program.parent.name if told.startswith("DEVELOPMENT") else told

    def options(self) -> dict[str, str]:
        return {"endpoint": f"http://127.0.0.1:{self.port}", "region": REGION, "allow_http": "true"}

    def renew(self):
        """Started with one empty bucket."""
        self.end()
        self.place.fresh(self.root)
        self.place.fresh(self.root / BUCKET)
        self.port, console = free_port(), free_port()
        self.place.environment |= {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": PASSWORD}
        # Started over a shell that ends at once, so that it is no child of the timing process.
        log = self.place.logs / "minio.log"
        script = (f"MINIO_ROOT_USER={USER} MINIO_ROOT_PASSWORD={PASSWORD} MINIO_BROWSER=off MINIO_UPDATE=off MINIO_CI_CD=1 "
                  f'"$0" server --quiet --address 127.0.0.1:{self.port} --console-address 127.0.0.1:{console} "$1" '
                  f">>{log} 2>&1 </dev/null & echo $!")
        self.pid_file.write_text(self.place.run("sh", "-c", script, self.program, self.root))
        deadline = time.monotonic() + 30
        while not self.ready():
            if time.monotonic() > deadline or not self.pid():
                raise BenchError(f"the object store did not start\n{timed.tail(log)}")
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/minio/health/ready", timeout=2) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def pid(self) -> int | None:
        """Also of one that an earlier run left behind; never of a stranger with the same number."""
        try:
            pid = int(self.pid_file.read_text())
            program = os.readlink(f"/proc/{pid}/exe")
        except (OSError, ValueError):
            return None
        return pid if program == str(self.program.resolve()) else None

    def end(self):
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
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            self.place.environment.pop(name, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
