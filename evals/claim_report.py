"""A card's run and its page: NAME.md, NAME.json and its plots, in the preset's folder and where the docs are."""

import dataclasses
import datetime
import json
import math
import os
import platform
import time

import jax
from etils import epath

from engrax.errors import UserError
from engrax.evals.claims import Card, Found, Options
from engrax.files import read_json, write_atomically
from engrax.train import runs

PRESETS = ("quick", "full")


@dataclasses.dataclass(frozen=True, repr=False)
class Reproduced:
    """A card's results."""

    directory: epath.Path
    found: Found
    markdown: str  # the page

    def __repr__(self) -> str:
        return self.markdown


def reproduce(
    card: Card,
    name: str,
    title: str,
    folder: epath.PathLike,
    *,
    preset: str = "quick",
    options: Options | None = None,
    docs: epath.PathLike | None = None,
) -> Reproduced:
    """Runs what is missing of a card's preset in FOLDER/NAME_PRESET, and writes its page there and into `docs`.

    Raises UserError for an unknown preset, or as the preset does.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r} (known: {', '.join(PRESETS)}).")
    options, directory = options or Options(), folder_of(folder, name, preset)
    runs.refuse_file(directory)
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    found = getattr(card, preset)(directory, options)
    old = directory / f"{name}.json"
    before = read_json(old).get("minutes", 0.0) if old.exists() else 0.0
    head = {
        "card": name,
        "preset": preset,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": options.command,
        "hardware": _hardware(),
        "jax": jax.__version__,
        "commit": runs.commit(),
        "minutes": before + (time.monotonic() - begun) / 60,  # of all calls that ended
    }
    for where in (directory, *([] if docs is None else [runs.folder(docs)])):
        page = _write(where, card, title, head, found)
    return Reproduced(directory, found, page)


def folder_of(folder: epath.PathLike, name: str, preset: str) -> epath.Path:
    """The folder of a card's preset."""
    return runs.folder(folder) / f"{name}_{preset}"


def state(folder: epath.PathLike, name: str, preset: str) -> str:
    """How far a preset has come: its verdicts, or "not run"."""
    directory = folder_of(folder, name, preset)
    written = directory / f"{name}.json"
    if not written.exists():
        return "begun" if directory.exists() and any(directory.iterdir()) else "not run"
    data = read_json(written)
    said = [finding["verdict"] for finding in data["findings"]]
    counts = [f"{said.count(word)} {word}" for word in dict.fromkeys(said)]
    return ", ".join([*counts, *([f"{len(data['missing'])} missing"] if data["missing"] else [])])


def _hardware() -> str:
    """The processor, its cores, and the device that JAX uses."""
    try:
        lines = epath.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(names, "") or platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"


def _write(where: epath.Path, card: Card, title: str, head: dict, found: Found) -> str:
    """Writes the page with its plots and numbers into a folder; returns the page."""
    where.mkdir(parents=True, exist_ok=True)
    name, images = head["card"], {}
    for i, (caption, png) in enumerate(found.plots.items()):
        images[caption] = f"{name}{f'_{i + 1}' if i else ''}.png"
        (where / images[caption]).write_bytes(png)
    findings = [dataclasses.asdict(finding) for finding in found.findings]
    data = head | {"findings": findings, "missing": dict(found.missing), "data": dict(found.data)}
    write_atomically(where / f"{name}.json", json.dumps(_plain(data), indent=1) + "\n")
    page = _page(card, title, head, found, images)
    write_atomically(where / f"{name}.md", page)
    return page


def _plain(value):
    """The value with None for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(card: Card, title: str, head: dict, found: Found, images: dict[str, str]) -> str:
    lines = [["claim", "found", "verdict"], ["---"] * 3]
    for finding in found.findings:
        value = finding.found
        ends = "" if math.isnan(value.low) else f" [{value.low:+.3f}, {value.high:+.3f}]"
        lines.append([finding.claim, f"{value.value:+.3f}{ends}", finding.verdict])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    parts = [f"# {title}", f"**The paper.** {card.paper}", f"**Here.** {card.here}", f"**The rule.** {card.rule}"]
    if head["preset"] == "quick":
        parts.append("This is the quick preset. The full run is not done.")
    parts += [table, *(f"![{caption}]({image})" for caption, image in images.items()), found.text.strip()]
    parts += [f"Missing: {name}, {why}." for name, why in found.missing.items()]
    commit = head["commit"] or "unknown"
    commit = commit[:12] + "+" * commit.endswith("+")  # files differed from it
    parts.append(
        f"Measured {head['date']}, {head['hardware']}, jax {head['jax']}, commit {commit}, in "
        f"{head['minutes']:.1f} minutes (interrupted calls not counted): `{head['command']}`. All numbers: "
        f"[{head['card']}.json]({head['card']}.json)."
    )
    return "\n\n".join(parts) + "\n"
