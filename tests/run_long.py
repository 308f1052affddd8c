"""Runs the tests marked `long` section by section, and keeps what came of each section in a report.

    make test-long
    make test-long LONG_FLAGS="--only train_resume --minutes 30"

A section is a test file, or one mixer or model of tests/test_laws.py. The report is written after every section. Run
again, the command continues: a section that passed on the same source files is not run again, and the others run in the
order of their last run, those that never ran first. Every entry keeps the commit that it ran on, also after a change of
a source file.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".py", ".ipynb", ".toml")
NOT_RUN = {"result": "not run"}


def section_of(test: str) -> str:
    """The section of a test's id: the name of its file; for the laws that of the mixer or model too."""
    name = test.split("::")[0].rsplit("/", 1)[-1].removeprefix("test_").removesuffix(".py")
    subject = re.search(r"\[(mixer|model)-(\w+?)\d(-|\])", test) if name == "laws" else None
    return f"{name} {subject[1]} {subject[2]}" if subject else name


def collect() -> dict[str, list[str]]:
    """The ids of the tests marked `long`, by section."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "long"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sections: dict[str, list[str]] = {}
    for line in found.stdout.splitlines():
        if re.match(r"\S+\.py::", line):
            sections.setdefault(section_of(line), []).append(line)
    if found.returncode or not sections:
        sys.exit(f"{found.stdout}{found.stderr}\nNo long tests were found.")
    return sections


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def digest() -> str:
    """SHA-256 of the source files of the checkout, whether committed or not."""
    total = hashlib.sha256()
    for name in sorted(git("ls-files", "-co", "--exclude-standard").splitlines()):
        if name.endswith(SOURCES) and (ROOT / name).is_file():
            total.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return total.hexdigest()[:16]


def run(tests: list[str], sources: str, workers: int, flags: list[str]) -> dict:
    """Runs the tests; returns the section's entry in the report."""
    start = time.monotonic()
    commit = git("rev-parse", "HEAD").strip() + (" and changes" if git("status", "--porcelain", "*.py") else "")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(tests))
        file.flush()
        spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        command = [sys.executable, "-m", "pytest", "-q", *spread, *flags, f"@{file.name}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if line.strip() else last
        code = process.wait()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {
        "result": "passed" if code == 0 else "failed",
        "minutes": round((time.monotonic() - start) / 60, 1),
        "tests": counts,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "sources": sources,
    }


def write(path: Path, sections: dict[str, dict]) -> None:
    """The report: one line for each section."""
    head = {
        "command": "make test-long",
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"jax {importlib.metadata.version('jax')}",
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sections.items())
    fields = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    path.with_suffix(".part").write_text(f'{{\n{fields} "sections": {{\n{lines}\n }}\n}}\n', encoding="utf-8")
    path.with_suffix(".part").replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the report, which is also what is remembered")
    parser.add_argument("--only", action="append", default=[], help="the sections whose name holds this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no section after so many minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options, flags = parser.parse_known_args()
    found, sources, output = collect(), digest(), options.output.resolve()
    old = json.loads(output.read_text(encoding="utf-8"))["sections"] if output.exists() else {}
    sections = {name: old.get(name, NOT_RUN) for name in found}
    chosen = [name for name in found if not options.only or any(word in name for word in options.only)]
    chosen.sort(key=lambda name: sections[name].get("date", ""))
    if not chosen:
        sys.exit(f"--only {' '.join(options.only)} is in the name of no section (there are: {', '.join(found)}).")
    start = time.monotonic()
    for name in chosen:
        done = sections[name]["result"] == "passed" and sections[name]["sources"] == sources
        if done or time.monotonic() - start > 60 * options.minutes:
            continue
        print(f"\n{name}: {len(found[name])} tests", flush=True)
        sections[name] = run(found[name], sources, options.workers, flags)
        write(output, sections)
    for name, entry in sections.items():
        told = [entry["result"], *([f"{entry['minutes']} minutes"] if "minutes" in entry else [])]
        older = "sources" in entry and entry["sources"] != sources
        print(f"{name}: {', '.join(told + ['on older sources'] * older)}")
    return int(any(sections[name]["result"] == "failed" for name in chosen))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped. The section in progress is not in the report; run the command again to continue.")
