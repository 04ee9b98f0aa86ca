"""Which rows there are, what each may be at most, and which of them a run measures: ROWS names them by the beginnings of
their names, all if it is empty.
"""

from place import BenchError

# Every row of each area, without the quantities of each (`_cpu`, `_memory`, `_stored`, `_requests`, `_latency`).
AREAS = {
    "backup": ["full", "restore", "delta", "full_basebackup", "full_zstd", "unchanged", "changed", "restore_chain",
               "changed_pg17", "fortnight_stored", "clones_stored", "full_s3", "restore_s3", "changed_s3",
               "busy", "memory"],
    "wal": ["backlog", "backlog_adaptive", "push", "push_p99", "push_empty", "fetch", "first_query", "pgbench",
            "pgbench_p99", "agent_memory", "agent_burst_memory", "agent_cpu", "lost_seconds", "lost_commits_repository"],
}

QUANTITIES = ["_cpu", "_memory", "_stored", "_requests", "_latency"]

# Ours is at most so much of the peer's, or of what else stands beside it, by row and quantity.
BARS = {"backup.full": 0.8, "backup.full_cpu": 0.9, "backup.restore": 0.6, "backup.unchanged": 0.5, "backup.changed": 0.15,
        "backup.changed_stored": 0.25, "backup.delta": 0.4, "backup.restore_chain": 0.6, "backup.fortnight_stored": 0.5,
        "backup.full_basebackup": 1.1, "backup.full_zstd": 1.1, "backup.changed_pg17": 2.0, "backup.clones_stored": 1.1,
        "backup.memory": 1.0,
        "wal.backlog": 0.85, "wal.backlog_adaptive": 0.5, "wal.backlog_adaptive_stored": 1.25, "wal.push": 0.4,
        "wal.push_p99": 0.4, "wal.push_empty": 3.0, "wal.fetch": 0.6, "wal.first_query": 0.75, "wal.pgbench": 1.02,
        "wal.pgbench_p99": 1.05, "wal.agent_memory": 1.0, "wal.agent_cpu": 1.0, "wal.lost_seconds": 1.0,
        "wal.lost_commits_repository": 1.0}


class Rows:
    """What is wanted of one area."""

    def __init__(self, area: str, prefixes: list[str]):
        self.area, self.prefixes = area, prefixes

    def all(self) -> bool:
        return not self.prefixes

    def wants(self, *rows: str) -> bool:
        """Whether one of the rows is to be measured, or one of its quantities."""
        return self.all() or any(name.startswith(prefix)
                                 for prefix in self.prefixes for row in rows for name in names(self.area, row))


def wanted(text: str, area: str) -> list[Rows]:
    """The areas that a run measures something of."""
    prefixes = [part.strip() for part in text.split(",") if part.strip()]
    areas = [Rows(name, prefixes) for name in ([area] if area else AREAS)]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for rows in areas for row in AREAS[rows.area] for name in names(rows.area, row)):
            known = ", ".join(f"{rows.area}.{row}" for rows in areas for row in AREAS[rows.area])
            raise BenchError(f"no row begins with {prefix!r}\nHINT: there is {known}.")
    return [rows for rows in areas if rows.wants(*AREAS[rows.area])]


def names(area: str, row: str) -> list[str]:
    return [f"{area}.{row}", *(f"{area}.{row}{quantity}" for quantity in QUANTITIES)]


def position(name: str) -> tuple[int, int, int]:
    """Where a row stands in the table: those of one kind together, as they are listed above."""
    area, _, rest = name.partition(".")
    rows = AREAS.get(area, [])
    kinds = [row for row in rows if f"{rest}_".startswith(f"{row}_")]
    at = list(AREAS).index(area) if area in AREAS else len(AREAS)
    if not kinds:
        return at, len(rows), 0
    kind = max(kinds, key=len)
    rest = rest.removeprefix(kind)
    return at, rows.index(kind), QUANTITIES.index(rest) + 1 if rest in QUANTITIES else len(rest) and len(QUANTITIES) + 1
