"""Whether a restore is right, without keeping what it was made from; and damage for a restore to find."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from place import BenchError

# A cache that is left out of backups (src/backend/utils/cache/relcache.c), and what every checkpoint writes.
NOT_COMPARED = {"pg_internal.init", "pg_control"}


def fingerprint(data: Path) -> dict[str, str]:
    """The hash of every file of relations, by its path below the data directory."""
    paths = [Path(parent, name) for folder in ("base", "global") for parent, _, files in os.walk(data / folder)
             for name in files if name not in NOT_COMPARED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
        return dict(zip((str(path.relative_to(data)) for path in paths), pool.map(digest, paths)))


def digest(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(wanted: dict[str, str], restored: Path, title: str):
    """A restore counts only if every relation's bytes are back."""
    found = fingerprint(restored)
    for path, content in wanted.items():
        if found.get(path) != content:
            raise BenchError(f"{title} restored {restored / path} otherwise than it was")


def damage(folder: Path):
    """Overwrites a part of 1 % of the pages, the same ones every time, and leaves size and time of change as they were."""
    chance = random.Random(7)
    for parent, _, files in sorted(os.walk(folder / "base")):
        for name in sorted(files):
            path = Path(parent, name)
            before = path.stat()
            with open(path, "r+b") as file:
                for page in range(before.st_size // 8192):
                    if chance.random() < 0.01:
                        file.seek(page * 8192 + 4096)
                        file.write(b"damaged " * 16)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
