"""The programs that are measured beside ours: paths as scripts/bench.sh got them. Only pgBackRest must be there."""

from dataclasses import dataclass
from pathlib import Path

from object_store import ObjectStore
from place import Place


@dataclass(frozen=True)
class Programs:
    pgbackrest: Path
    restic: Path | None
    rustic: Path | None
    minio: Path | None

    def store(self, place: Place) -> ObjectStore | None:
        return ObjectStore(place, self.minio) if self.minio else None
