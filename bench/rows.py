"""Which rows a run measures: ROWS names them by the beginnings of their names, all if it is empty."""

from place import BenchError

# Every row, without the quantities of each (`_cpu`, `_memory`, `_stored`, `_requests`, `_latency`).
BACKUP = ["full", "restore", "delta", "full_basebackup", "full_zstd", "unchanged", "changed", "restore_chain",
          "changed_pg17", "fortnight_stored", "clones_stored", "full_s3", "restore_s3", "changed_s3",
          "busy", "memory"]

QUANTITIES = ["_cpu", "_memory", "_stored", "_requests", "_latency"]


class Rows:
    def __init__(self, wanted: str):
        self.prefixes = [part.strip() for part in wanted.split(",") if part.strip()]
        for prefix in self.prefixes:
            if not any(name.startswith(prefix) for row in BACKUP for name in names(row)):
                known = ", ".join(f"backup.{row}" for row in BACKUP)
                raise BenchError(f"no row begins with {prefix!r}\nHINT: there is {known}.")

    def all(self) -> bool:
        return not self.prefixes

    def wants(self, *rows: str) -> bool:
        """Whether one of the rows is to be measured, or one of its quantities."""
        return self.all() or any(name.startswith(prefix)
                                 for prefix in self.prefixes for row in rows for name in names(row))


def names(row: str) -> list[str]:
    return [f"backup.{row}", *(f"backup.{row}{quantity}" for quantity in QUANTITIES)]


def position(name: str) -> tuple[int, int]:
    """Where a row stands in the table: those of one kind together, as they are listed above."""
    kinds = [row for row in BACKUP if f"{name}_".startswith(f"backup.{row}_")]
    if not kinds:
        return len(BACKUP), 0
    kind = max(kinds, key=len)
    rest = name.removeprefix(f"backup.{kind}")
    return BACKUP.index(kind), QUANTITIES.index(rest) + 1 if rest in QUANTITIES else len(rest) and len(QUANTITIES) + 1
