"""The PostgreSQL cluster that is backed up: made once and kept as a template, copied for every use.

pgbench tables with room in each page for an update, and a table of text and JSON; page checksums on.
"""

import random
import hashlib
import json
import shutil
import struct
import subprocess
import time
from pathlib import Path

import timed
from place import LIMIT_SECONDS, BenchError, Place, Sizes, say

PAGE = 8192

SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{sockets}'
wal_level = replica
max_wal_senders = 10
shared_buffers = 512MB
maintenance_work_mem = 256MB
checkpoint_timeout = 30min
autovacuum = off
jit = off
archive_mode = on
archive_command = 'true'
include_if_exists = 'bench.conf'
"""

# One row in each of some percent of the pages, spread at random by the hash of the page's number.
CHANGE = """
UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid IN (
  SELECT min(aid) FROM (SELECT aid, (ctid::text::point)[0]::bigint AS page FROM pgbench_accounts) AS at
   WHERE abs(hashint8(page + {salt})) % 100 < {percent} GROUP BY page);
UPDATE documents SET title = reverse(title) WHERE id IN (
  SELECT min(id) FROM (SELECT id, (ctid::text::point)[0]::bigint AS page FROM documents) AS at
   WHERE abs(hashint8(page + {salt})) % 100 < {percent} GROUP BY page);
CHECKPOINT;
"""


class Cluster:
    """Made at the place's sockets; where it serves later is a matter of `start`."""

    def __init__(self, place: Place, sizes: Sizes, data: Path | None = None):
        self.place, self.sizes = place, sizes
        # Another scale or another version is another template.
        version = place.run(place.postgres / "postgres", "--version").split()[2]
        self.template = place.folder / f"template-{version}-{sizes.scale}-{sizes.documents}"
        self.version = version
        self.data = data or place.folder / "data"
        self.sockets, self.port = place.sockets, 5432
        self.log = place.logs / "postgres.log"

    @property
    def connection(self) -> str:
        return f"host={self.sockets} port={self.port} user=postgres"

    def make(self):
        """Makes the template unless it is there."""
        self.stop()
        if (self.template / "complete").exists():
            return
        say(f"making a cluster of pgbench scale {self.sizes.scale} and {self.sizes.documents} documents")
        for old in self.place.folder.glob("template-*"):
            if not (old / "complete").exists() or not old.name.startswith(f"template-{self.version}-"):
                shutil.rmtree(old)
        programs, place = self.place.postgres, self.place
        place.fresh(self.data)
        place.run(programs / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--data-checksums",
                  "-E", "UTF8", "--locale=C")
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(SETTINGS.format(sockets=place.sockets))
        self.start(settings="max_wal_size = 8GB\n")
        place.run(programs / "pgbench", "-h", place.sockets, "-U", "postgres", "-i", "-q", "-I", "dtGvp", "-F", "90",
                  "-s", str(self.sizes.scale), "postgres")
        self.query("CREATE TABLE documents (id bigint, title text, body text, meta jsonb)")
        self.load_documents()
        self.query("ALTER TABLE documents ADD PRIMARY KEY (id)")
        self.query("VACUUM (FREEZE, ANALYZE)")
        self.query("CHECKPOINT")
        self.stop()
        self.drop_spare_wal()
        self.data.rename(self.template)
        (self.template / "complete").touch()

    def load_documents(self):
        options = {**self.place.as_user(), "stdin": subprocess.PIPE}
        command = [*self.psql(), "-c", "COPY documents FROM STDIN"]
        with subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, **options) as copy:
            for row in documents(self.sizes.documents):
                copy.stdin.write(row)
            copy.stdin.close()
            if copy.wait(LIMIT_SECONDS):
                raise BenchError("COPY documents failed")

    def drop_spare_wal(self):
        """Segments kept for reuse are no data: only the one with the last checkpoint stays."""
        control = self.place.run(self.place.postgres / "pg_controldata", "-D", self.data)
        needed = next(line.split()[-1] for line in control.splitlines() if "REDO WAL file" in line)
        for path in (self.data / "pg_wal").iterdir():
            if path.is_file() and path.name != needed:
                path.unlink()
        for path in (self.data / "pg_wal" / "archive_status").iterdir():
            path.unlink()

    def renew(self):
        """The data directory as the template has it."""
        self.remove()
        subprocess.run(["cp", "-a", "--reflink=auto", self.template, self.data], check=True)
        (self.data / "complete").unlink()

    def remove(self):
        self.stop()
        self.place.discard(self.data)

    def start(self, archive_command: str = "true", settings: str = ""):
        conf = self.data / "bench.conf"
        conf.write_text(f"{settings}unix_socket_directories = '{self.sockets}'\nport = {self.port}\n"
                        f"archive_command = '{archive_command}'\n", encoding="utf-8")
        self.place.give(conf)
        # A slot of what received WAL before would keep all WAL from then on.
        for slot in (self.data / "pg_replslot").iterdir():
            shutil.rmtree(slot)
        self.place.run(self.place.postgres / "pg_ctl", "-D", self.data, "-l", self.log, "-w", "-t", "600", "start")

    def stop(self, mode: str = "fast"):
        if self.pid():
            self.place.run(self.place.postgres / "pg_ctl", "-D", self.data, "-w", "-t", "600", "-m", mode, "stop")

    def pid(self) -> int | None:
        """Of the running server; a file that a killed one left behind counts as none."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split()[0])
            running = Path(f"/proc/{pid}/cwd").resolve() == self.data.resolve()
        except (OSError, ValueError, IndexError):
            return None
        return pid if running else None

    def await_promotion(self):
        deadline = time.monotonic() + 120
        while self.query("SELECT pg_is_in_recovery()") != "f":
            if time.monotonic() > deadline:
                raise BenchError(f"{self.data} is still in recovery\n{timed.tail(self.log)}")
            time.sleep(0.1)

    def psql(self) -> list:
        return [str(self.place.postgres / "psql"), "-h", str(self.sockets), "-p", str(self.port), "-U", "postgres",
                "-d", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1"]

    def query(self, sql: str) -> str:
        return self.place.run(*self.psql(), text_in=sql)

    def await_archiving(self):
        """Lets one segment be archived, so that no sample waits for an archiver that was told to try later."""
        segment = self.query("SELECT pg_create_restore_point('bench') \\g /dev/null\nSELECT pg_walfile_name(pg_switch_wal())")
        archived = f"SELECT coalesce(last_archived_wal, '') >= '{segment}' FROM pg_stat_archiver"
        wait = f"""DO $$ BEGIN
          FOR i IN 1 .. 900 LOOP
            PERFORM pg_stat_clear_snapshot();
            IF ({archived}) THEN RETURN; END IF;
            PERFORM pg_sleep(0.1);
          END LOOP;
          RAISE 'segment {segment} was not archived within 90 seconds';
        END $$"""
        try:
            self.query(wait)
        except BenchError as error:
            raise BenchError(f"{error}\n{timed.tail(self.log)}") from None

    def change(self, salt: int, percent: int = 1):
        """Changes so many of the tables' pages."""
        self.query(CHANGE.format(salt=salt, percent=percent))

    def measured_change(self, salt: int) -> float:
        """Changes 1 % of the tables' pages; the share of all pages that really changed, indexes included."""
        before = self.query("CHECKPOINT;\nSELECT pg_current_wal_lsn()")
        self.change(salt)
        high, low = (int(part, 16) for part in before.split("/"))
        return changed_pages(self.data / "base", high << 32 | low)

    def bytes(self) -> int:
        return timed.size(self.template) - timed.size(self.template / "pg_wal")


def changed_pages(folder: Path, since: int) -> float:
    """The share of pages whose LSN (the first eight bytes, bufpage.h) is at or behind a position."""
    pages = changed = 0
    for path in folder.glob("*/[0-9]*"):
        content = path.read_bytes()
        for offset in range(0, len(content) - PAGE + 1, PAGE):
            high, low = struct.unpack_from("<II", content, offset)
            changed += (high << 32 | low) >= since
            pages += 1
    return changed / max(pages, 1)


def documents(count: int):
    """Rows for COPY, the same in every run: words of Zipf's frequencies and JSON that does not compress well."""
    source = random.Random(42)
    words = [hashlib.md5(b"%d" % i).hexdigest()[: 3 + i % 7] for i in range(4000)]
    weights, total = [], 0.0
    for rank in range(len(words)):
        total += 1.0 / (rank + 8)
        weights.append(total)
    for number in range(1, count + 1):
        text = source.choices(words, cum_weights=weights, k=130)
        meta = {"user": source.randrange(1 << 20), "tags": text[3:8], "at": 1_700_000_000 + number * 7,
                "address": ".".join(str(source.randrange(256)) for _ in range(4)),
                "hash": f"{source.getrandbits(256):064x}", "score": round(source.random() * 1000, 4),
                "state": ("new", "open", "done")[number % 3]}
        yield f"{number}\t{' '.join(text[:6])}\t{' '.join(text[6:])}\t{json.dumps(meta)}\n"
