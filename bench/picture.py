"""The report as a picture: a bar for each row that has a bar to meet, as SVG, in plain Python.

Colours follow the reader's light or dark theme, over a ground of its own, so that it can be read on any page.
"""

from html import escape
from pathlib import Path

# Rows and what they are called, in groups beside one thing each. Only those that were measured are drawn.
GROUPS = [
    ("beside pgBackRest", [
        ("backup.full", "full backup"), ("backup.full_cpu", "full backup, CPU"),
        ("backup.unchanged", "backup, nothing changed"), ("backup.changed", "backup, 1 % changed"),
        ("backup.changed_stored", "backup, 1 % changed: stored"), ("backup.fortnight_stored", "14 daily backups: stored"),
        ("backup.restore", "full restore"), ("backup.restore_chain", "restore after 20 backups"),
        ("backup.delta", "restore over 1 % damage")]),
    ("WAL, beside pgBackRest", [
        ("wal.backlog", "backlog shipped"), ("wal.backlog_adaptive", "backlog shipped, adaptive"),
        ("wal.push", "one archive_command"), ("wal.push_p99", "one archive_command, p99"),
        ("wal.fetch", "WAL fetched for recovery"), ("wal.first_query", "nothing to first query")]),
    ("beside others", [
        ("backup.full_basebackup", "full backup / pg_basebackup"), ("backup.full_zstd", "full backup / zstd alone"),
        ("backup.changed_pg17", "1 % changed / PostgreSQL 17's"), ("backup.clones_stored", "ten clones / one: stored"),
        ("backup.memory", "peak memory / 256 MiB"), ("wal.push_empty", "archive_command / an empty one"),
        ("wal.pgbench", "transaction / pg_receivewal's"), ("wal.pgbench_p99", "commit p99 / pg_receivewal's"),
        ("wal.agent_memory", "memory, 50 MB/s / 100 MiB"), ("wal.agent_cpu", "CPU, 50 MB/s / half a core"),
        ("wal.lost_seconds", "lost with the host / 1.5 s")])]

LEFT, PLOT, FIGURES, OTHER = 226, 330, 176, 74  # widths: labels, bars, our and the peer's figure, each further peer
ROW, HEAD, MARGIN = 27, 74, 18
END = 1.25  # of the axis; longer bars are cut off there

STYLE = """
.ground { fill: #ffffff; stroke: #d5dae1 }  text { fill: #1f2933; font: 13px system-ui, sans-serif }
.title { font-size: 17px; font-weight: 600 }  .soft { fill: #5b6673 }  .head { font-weight: 600 }
.grid { stroke: #e4e8ed }  .equal { stroke: #5b6673 }  .met { fill: #2f74d0 }  .missed { fill: #d9691a }
.told { fill: #9aa5b1 }  .within { fill: #ffffff }  .mark { stroke: #1f2933; stroke-width: 2.5 }  .end { text-anchor: end }  .middle { text-anchor: middle }
@media (prefers-color-scheme: dark) {
.ground { fill: #161b22; stroke: #30363d }  text { fill: #e2e8ef }  .soft { fill: #9aa6b3 }  .grid { stroke: #2a313a }
.equal { stroke: #9aa6b3 }  .met { fill: #5b9bf0 }  .missed { fill: #f08c3c }  .told { fill: #5b6673 }  .within { fill: #0d1117 }  .mark { stroke: #f4f7fa } }
"""


def draw(document: dict, path: Path):
    """Writes the picture of a report's document."""
    rows = {row["name"]: row for row in document["rows"]}
    groups = [(title, [(rows[name], label) for name, label in members if rows.get(name, {}).get("ratio") is not None])
              for title, members in GROUPS]
    groups = [group for group in groups if group[1]]
    others = sorted({tool for _, members in groups for row, _ in members for tool in row.get("others", {})})
    width = 2 * MARGIN + LEFT + PLOT + FIGURES + OTHER * len(others)
    parts, y = heading(document, others), HEAD
    for title, members in groups:
        parts += group_head(title, y, others if title == "beside pgBackRest" else [], len(members))
        y += ROW
        for row, label in members:
            parts += bar(row, label, y, others)
            y += ROW
        y += 12
    height = y + 30
    parts += legend(y + 10)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                    f'role="img" aria-label="walfleet beside its peers, as ratios">\n<style>{STYLE}</style>\n'
                    f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
                    + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def heading(document: dict, others: list[str]) -> list[str]:
    machine, settings, versions = document["machine"], document["settings"], document["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ["pgbackrest", *others, "postgres"] if name in versions)
    told = (f"{settings['cluster_bytes'] / 1e9:.1f} GB, {machine['cores']} cores, {document['finished_at'][:10]} · "
            f"revision {versions.get('revision', 'unknown')[:12]} · {names}")
    return [text(MARGIN, 30, "walfleet as a share of its peers: shorter is better", "title"), text(MARGIN, 51, told, "soft")]


def group_head(title: str, y: int, others: list[str], count: int) -> list[str]:
    parts = [text(MARGIN, y + 18, title, "head")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        kind = "equal" if share == 1 else "grid"
        parts += [f'<line class="{kind}" x1="{at(share)}" y1="{y + 24}" x2="{at(share)}" y2="{y + ROW * (count + 1)}"/>',
                  text(at(share), y + 18, f"{share:g}", "soft middle")]
    parts.append(text(at(END) + FIGURES - 12, y + 18, "walfleet / peer", "soft end"))
    for place, other in enumerate(others):
        parts.append(text(column(place), y + 18, other, "soft end"))
    return parts


def bar(row: dict, label: str, y: int, others: list[str]) -> list[str]:
    middle, length = y + ROW / 2, at(min(row["ratio"], END)) - at(0)
    kind = {None: "told", True: "met", False: "missed"}[row["met"]]
    parts = [text(MARGIN, middle + 4.5, label),
             f'<rect class="{kind}" x="{at(0)}" y="{middle - 8}" width="{max(length, 1):.1f}" height="16" rx="2"/>']
    ratio = f"{row['ratio']:.2f}"
    mark = row["bar"] if row["bar"] is not None and row["bar"] <= END else None
    if row["bar"] is not None and mark is None:
        ratio += f" (≤ {row['bar']:g})"
    if mark is not None:
        parts.append(f'<line class="mark" x1="{at(mark):.1f}" y1="{middle - 11}" x2="{at(mark):.1f}" y2="{middle + 11}"/>')
    # Behind the bar, and behind its mark if that stands in the way; a bar that nearly fills the plot has it within.
    after = at(0) + length
    if mark is not None and after - 4 < at(mark) < after + 42:
        after = at(mark)
    if row["ratio"] > END:
        parts.append(text(at(1) - 10, middle + 4.5, f"{ratio} →", "head within end"))
    else:
        parts.append(text(after + 6, middle + 4.5, ratio, "head"))
    figures = f"{quantity(row['ours'], row['unit'])} / {quantity(row['peer'], row['unit'])}"
    if row["disturbed"]:
        figures += " *"
    parts.append(text(at(END) + FIGURES - 12, middle + 4.5, figures, "soft end"))
    for place, other in enumerate(others):
        figure = row.get("others", {}).get(other)
        if figure:
            parts.append(text(column(place), middle + 4.5, quantity(figure["value"], row["unit"]), "soft end"))
    return parts


def legend(y: int) -> list[str]:
    x = MARGIN
    return [f'<line class="mark" x1="{x + 2}" y1="{y - 9}" x2="{x + 2}" y2="{y + 5}"/>',
            text(x + 12, y + 2, "what it may be at most", "soft"),
            f'<rect class="met" x="{x + 190}" y="{y - 8}" width="14" height="11" rx="2"/>', text(x + 210, y + 2, "met", "soft"),
            f'<rect class="missed" x="{x + 262}" y="{y - 8}" width="14" height="11" rx="2"/>',
            text(x + 282, y + 2, "missed", "soft"), text(x + 356, y + 2, "* while others used the machine", "soft")]


def at(share: float) -> float:
    return MARGIN + LEFT + share / END * PLOT


def column(place: int) -> float:
    return at(END) + FIGURES + OTHER * (place + 1) - 12


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def quantity(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
