"""From samples to rows, a verdict, `report.json` and a table.

A row's figures are medians over the undisturbed samples if there are at least two of them, else over all.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from place import say
from rows import AREAS, BARS, Rows, position

# Settings that are results, not choices: two runs with other ones are comparable.
RESULTS = {"changed_pages_percent", "took_seconds", "busy_transactions_per_second", "replayed_bytes",
           "streaming_transactions_per_second", "streamed_bytes_per_second", "destructions"}


@dataclass
class Measured:
    """One quantity of one tool: a value for each sample, and whether the sample was undisturbed."""

    values: list[float]
    clean: list[bool]

    def median(self) -> float:
        undisturbed = [value for value, clean in zip(self.values, self.clean) if clean]
        return statistics.median(undisturbed if len(undisturbed) >= 2 else self.values)

    def disturbed(self) -> bool:
        return sum(self.clean) < min(2, len(self.clean))

    def rounded(self) -> list[float]:
        return [round(value, 3) for value in self.values]


def paired_ratio(part: Measured, whole: Measured | None) -> float | None:
    """The median of the ratios of what was measured one after the other, which a slow minute hits alike."""
    if not whole or not all(whole.values):
        return None
    shares = [mine / other for mine, other in zip(part.values, whole.values)]
    return round(Measured(shares, [a and b for a, b in zip(part.clean, whole.clean)]).median(), 3)


def ratio(part: Measured, whole: Measured | None) -> float | None:
    return round(part.median() / whole.median(), 3) if whole and whole.median() else None


@dataclass
class Report:
    """Written anew with each sample, so that a run that is stopped has told what it saw."""

    machine: dict
    folder: Path
    settings: dict
    versions: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    runs: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)  # of what this run should have told
    begun: set = field(default_factory=set)  # rows and tools that this run took samples of
    merged: bool = False  # with the report that was there

    def __post_init__(self):
        """Takes up the report that is there, before anything of this run is written over it."""
        try:
            self.earlier = json.loads((self.folder / "report.json").read_text())
            self.earlier = {key: self.earlier[key] for key in ("rows", "machine", "versions", "settings", "notes", "runs")}
        except (OSError, ValueError, KeyError, TypeError):
            self.earlier = {}

    def add(self, name: str, ours: Measured, peer: Measured | None, peer_name: str, unit: str,
            paired: bool = False):
        """A row. Its bar, if it has one, is what the ratio of ours to the peer's may be at most; beside a peer of nothing,
        ours must be nothing.

        Without a peer, because it has no such quantity or because it failed, a row tells ours."""
        share, bar = (paired_ratio if paired else ratio)(ours, peer), BARS.get(name)
        met = share <= bar if bar and share is not None else ours.median() == 0 if bar and peer else None
        row = {"name": name, "ours": round(ours.median(), 3), "peer": round(peer.median(), 3) if peer else None,
               "peer_name": peer_name, "unit": unit, "ratio": share, "bar": bar,
               "met": met,
               "samples": {"ours": ours.rounded(), "peer": peer.rounded() if peer else []},
               "disturbed": ours.disturbed() or bool(peer and peer.disturbed())}
        if bar is not None and met is None:
            self.unmeasured.append(name)
        old = self.row(name)
        if old:
            row["others"] = old.get("others", {})
            self.rows[self.rows.index(old)] = row
        else:
            self.rows.append(row)
            self.rows.sort(key=lambda row: position(row["name"]))
        self.write()

    def add_other(self, name: str, tool: str, measured: Measured):
        """The figure of a further peer beside those of a row, for information."""
        row = self.row(name)
        if row:
            row.setdefault("others", {})[tool] = {"value": round(measured.median(), 3), "samples": measured.rounded(),
                                                  "disturbed": measured.disturbed()}
            self.write()

    def row(self, name: str) -> dict | None:
        return next((row for row in self.rows if row["name"] == name), None)

    def record(self, row: str, tool: str, sample: dict):
        samples = self.runs.setdefault(row, {}).setdefault(tool, [])
        if (row, tool) not in self.begun:
            self.begun.add((row, tool))
            samples.clear()
        samples.append(sample)
        self.write()

    def fail(self, what: str, error: BaseException, needed: bool):
        """Something could not be measured; the rest goes on."""
        text = f"{what}: {str(error) or type(error).__name__}"
        say(f"bench: not measured: {text}")
        self.notes.append(f"not measured: {text.splitlines()[0]}")
        if needed:
            self.unmeasured.append(what)
        self.write()

    def note(self, text: str):
        say(f"bench: {text}")
        self.notes.append(text)

    def merge(self, rows: Rows):
        """Keeps what the report that was there told, if it is of the same program, settings and data, but of the area that is
        measured now only if that is not measured whole. To be called once the area's settings are known."""
        old = self.earlier
        if not old:
            return
        differing = [key for part, mine in (("versions", self.versions), ("settings", self.settings),
                                            ("machine", self.machine))
                     for key in old[part].keys() & mine.keys() - RESULTS if old[part][key] != mine[key]]
        if differing:
            say(f"bench: the report that is there differs in {', '.join(sorted(differing))}: begun anew")
        # What is there of this area comes from the report that was there, by another area's merging.
        of_area = f"{rows.area}."
        if differing or rows.all():
            self.rows = [row for row in self.rows if not row["name"].startswith(of_area)]
            self.runs = {name: runs for name, runs in self.runs.items() if not name.startswith(of_area)}
        if differing or self.merged:
            return
        self.merged = True
        dropped = of_area if rows.all() else "nothing"
        self.rows = [row for row in old["rows"] if not row["name"].startswith(dropped)]
        self.runs = {name: runs for name, runs in old["runs"].items() if not name.startswith(dropped)}
        self.versions, self.settings = old["versions"] | self.versions, old["settings"] | self.settings
        again = [f"{rows.area}.{row}" for row in AREAS[rows.area] if rows.wants(row)]
        notes = [note for note in old["notes"] if not any(name in note for name in again)]
        self.notes = list(dict.fromkeys(notes + self.notes))
        if self.rows:
            say(f"bench: added to the {len(self.rows)} rows that are there")

    def missed(self) -> list[str]:
        return [row["name"] for row in self.rows if row["met"] is False]

    def document(self) -> dict:
        return {"rows": self.rows, "machine": self.machine, "versions": self.versions, "settings": self.settings,
                "notes": self.notes, "runs": self.runs,
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}

    def write(self) -> Path:
        path = self.folder / "report.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.document(), indent=2) + "\n")
        new.rename(path)
        return path

    def table(self) -> str:
        """Markdown, so that it can be pasted into docs/performance.md as it is."""
        others = sorted({tool for row in self.rows for tool in row.get("others", {})})
        lines = ["| " + " | ".join(["row", "walfleet", "peer", "unit", "beside", "ratio", "bar", "", *others]) + " |",
                 "|---|--:|--:|---|---|--:|--:|---|" + "--:|" * len(others)]
        for row in self.rows:
            verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
            if row["disturbed"]:
                verdict = f"{verdict} (disturbed)".strip()
            figures = [row.get("others", {}).get(tool, {}) for tool in others]
            cells = [row["name"], number(row["ours"], row["unit"]), number(row["peer"]), row["unit"], row["peer_name"],
                     number(row["ratio"]), "" if row["bar"] is None else f"≤ {row['bar']:.2f}", verdict,
                     *(number(figure["value"]) + " (disturbed)" * figure["disturbed"] if figure else ""
                       for figure in figures)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 100 and unit != "requests" else f"{value:.0f}"
