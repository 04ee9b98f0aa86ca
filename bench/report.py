"""From samples to rows, a verdict, `report.json` and a table.

A row's figures are medians over the undisturbed samples if there are at least two of them, else over all.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Measured:
    """One quantity of one tool: a value for each sample, and whether the sample was undisturbed."""

    values: list[float]
    clean: list[bool]

    def median(self) -> float:
        undisturbed = [value for value, clean in zip(self.values, self.clean) if clean]
        return statistics.median(undisturbed if len(undisturbed) >= 2 else self.values)

    def disturbed(self) -> bool:
        return sum(self.clean) < 2


@dataclass
class Report:
    """Written anew with each row, so that a run that is stopped has told what it saw."""

    machine: dict
    folder: Path
    settings: dict
    versions: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    runs: dict = field(default_factory=dict)

    def add(self, name: str, ours: Measured, peer: Measured, peer_name: str, unit: str, bar: float | None):
        """A row; `bar` is what the ratio of ours to the peer's may be at most, `None` if it is only told."""
        ratio = ours.median() / peer.median() if peer.median() else None
        met = None if bar is None else ratio is not None and ratio <= bar
        self.rows.append({
            "name": name, "ours": round(ours.median(), 3), "peer": round(peer.median(), 3), "peer_name": peer_name,
            "unit": unit, "ratio": None if ratio is None else round(ratio, 3), "bar": bar, "met": met,
            "samples": {"ours": [round(value, 3) for value in ours.values],
                        "peer": [round(value, 3) for value in peer.values]},
            "disturbed": ours.disturbed() or peer.disturbed()})
        self.write()

    def missed(self) -> list[str]:
        return [row["name"] for row in self.rows if row["met"] is False]

    def write(self) -> Path:
        path = self.folder / "report.json"
        document = {"rows": self.rows, "machine": self.machine, "versions": self.versions, "settings": self.settings,
                    "runs": self.runs, "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path

    def table(self) -> str:
        """Markdown, so that it can be pasted into docs/performance.md as it is."""
        lines = ["| row | walfleet | peer | unit | beside | ratio | bar | |", "|---|--:|--:|---|---|--:|--:|---|"]
        for row in self.rows:
            verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
            if row["disturbed"]:
                verdict = f"{verdict} (disturbed)".strip()
            bar = "" if row["bar"] is None else f"≤ {row['bar']:.2f}"
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(f"| {row['name']} | {number(row['ours'])} | {number(row['peer'])} | {row['unit']} "
                         f"| {row['peer_name']} | {ratio} "
                         f"| {bar} | {verdict} |")
        return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
