"""An S3 server on this machine, MinIO, for our rows on object stores. It shares the cores with what is measured.
"""

import socket
import urllib.error
import urllib.request
from pathlib import Path

from daemon import Daemon
from place import Place

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
        self.daemon = Daemon(place, "minio", program)
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
        settings = f"MINIO_ROOT_USER={USER} MINIO_ROOT_PASSWORD={PASSWORD} MINIO_BROWSER=off MINIO_UPDATE=off MINIO_CI_CD=1"
        addresses = ["--address", f"127.0.0.1:{self.port}", "--console-address", f"127.0.0.1:{console}"]
        self.daemon.start(["server", "--quiet", *addresses, self.root], self.ready, settings)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/minio/health/ready", timeout=2) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def pid(self) -> int | None:
        return self.daemon.pid()

    def end(self):
        self.daemon.end()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            self.place.environment.pop(name, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
