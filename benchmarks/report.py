"""The report: tables in Markdown, the figures in JSON, and a picture for each workload."""

from __future__ import annotations

import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

import libraries
import measures

MAIN = ["taskpool", "multiprocessing.Pool", "ProcessPoolExecutor", "loky", "pebble"]
OURS = ("taskpool", "taskpool futures", "taskpool pool")
Row = tuple[
    str, str, bool, dict[str, Any]
]  # title, unit, whether more is better, {library: [values] or what went wrong}


def rows(results: dict[str, Any]) -> list[Row]:
    """Return a row for each figure."""
    found = []
    for key, by_library in results.items():
        measure = measures.BY_KEY[key]
        for figure, (unit, more_is_better) in measure.figures.items():
            title = measure.title if len(measure.figures) == 1 else f"{measure.title}: {figure}"
            values = {
                name: figures if isinstance(figures, str) else figures.get(figure, [])
                for name, figures in by_library.items()
            }
            found.append((title, unit, more_is_better, values))
    return found


def best_peer(values: dict[str, Any], *, more_is_better: bool) -> tuple[str, float] | None:
    """Return the peer with the best median."""
    medians = {
        name: statistics.median(measured)
        for name, measured in values.items()
        if name not in OURS and libraries.ALL[name].peer and isinstance(measured, list) and measured
    }
    if not medians:
        return None
    name = (max if more_is_better else min)(medians, key=medians.__getitem__)
    return name, medians[name]


def number(value: float, unit: str = "") -> str:
    """Return a figure as people write it, with three significant digits."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def summary(found: dict[str, Any]) -> str:
    """Return what was measured on, a line for each workload, and the limits of the machine, as Markdown."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items())
    lines = [
        f"Python {machine['python']} on {machine['system']}, {machine['cpus']} CPUs ({machine['cpu']}); {versions}.",
        "Medians of interleaved rounds; the ratio is taskpool's figure to that of the best peer.",
        "",
        "| workload | taskpool | best peer | ratio |",
        "|---|--:|--:|--:|",
    ]
    lines += [_line(*row) for row in rows(found["results"])]
    lines += ["", "| limit of the machine | |", "|---|--:|"]
    for title, figures in found["limits"].items():
        unit = {"p50": "µs", "rate": "GB/s" if "copy" in title else "/s", "ms": "ms"}
        lines.append(f"| {title} | {', '.join(number(value, unit[key]) for key, value in figures.items())} |")
    return "\n".join(lines) + "\n"


def _line(title: str, unit: str, more_is_better: bool, values: dict[str, Any]) -> str:
    ours = values.get("taskpool")
    if not isinstance(ours, list) or not ours:
        return f"| {title} | {ours or ''} | | |"
    median = statistics.median(ours)
    peer = best_peer(values, more_is_better=more_is_better)
    if peer is None:
        return f"| {title} | {number(median, unit)} | | |"
    ratio = f"{median / peer[1]:.2f}" if peer[1] else ""
    return f"| {title} | {number(median, unit)} | {number(peer[1], unit)} ({peer[0]}) | {ratio} |"


def details(found: dict[str, Any]) -> str:
    """Return every figure as Markdown."""
    lines = ["# All figures", "", "| workload | library | median | least | most |", "|---|---|--:|--:|--:|"]
    for title, unit, _more, values in rows(found["results"]):
        for name, measured in values.items():
            if isinstance(measured, str):
                lines.append(f"| {title} | {name} | {measured} | | |")
            elif measured:
                figures = (statistics.median(measured), min(measured), max(measured))
                lines.append(f"| {title} | {name} | {' | '.join(number(value, unit) for value in figures)} |")
    return "\n".join(lines) + "\n"


def picture(row: Row) -> str:
    """Return a bar chart of one row as SVG: median, and a line from the least to the most."""
    title, unit, more_is_better, values = row
    bars = {name: measured for name, measured in values.items() if isinstance(measured, list) and measured}
    longest = max(max(measured) for measured in bars.values()) or 1.0
    height = 46 + 26 * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" role="img" aria-label="{escape(title)}">',
        "<style>text{font:13px sans-serif;fill:#888}.t{font-weight:bold}.o{fill:#2a7ab0}.p{fill:#b9c3cb}</style>",
        f'<text class="t" x="8" y="18">{escape(title.replace("`", ""))}</text>',
        f'<text x="632" y="18" text-anchor="end">{"more" if more_is_better else "less"} is better</text>',
    ]
    for place, (name, measured) in enumerate(bars.items()):
        top = 32 + 26 * place
        median, least, most = (
            340 * value / longest for value in (statistics.median(measured), min(measured), max(measured))
        )
        middle = top + 9
        parts += [
            f'<text x="170" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{"o" if name in OURS else "p"}" x="178" y="{top}" width="{max(median, 1):.1f}" height="18"/>',
            f'<path d="M{178 + least:.1f} {middle}H{178 + most:.1f}" stroke="#888"/>',
            f'<text x="{186 + most:.1f}" y="{top + 14}">{number(statistics.median(measured), unit)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(found: dict[str, Any], folder: Path) -> None:
    """Write results.json, the tables (summary.inc for a page, details.md as a page) and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "summary.inc").write_text(summary(found))
    (folder / "details.md").write_text(details(found))
    for row in rows(found["results"]):
        if any(isinstance(measured, list) and measured for measured in row[3].values()):
            name = "".join(letter if letter.isalnum() else "-" for letter in row[0].lower()).strip("-")
            (folder / f"{name}.svg").write_text(picture(row))
