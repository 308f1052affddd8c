"""docs/architecture.md names the folders that exist, only paths that exist, and the import rules that are tested."""

import ast
import re
from pathlib import Path

import pytest

from engrax.tests import test_imports

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def code(text: str) -> set[str]:
    """The words in code style."""
    return set(re.findall(r"`([^`\n]+)`", text))


def folders() -> set[str]:
    """The packages of setup.py's PARTS and their first subfolders that hold Python files, from the root."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PARTS"]
    parts = ast.literal_eval(values[0])
    inner = {f"{part}/{file.parent.name}" for part in parts for file in (ROOT / part).glob("*/*.py")}
    return {*parts, *inner}


def unnamed(text: str) -> set[str]:
    """The folders that the page does not name; a subfolder is named in the list item of its part."""
    items = dict(re.findall(r"^- `(\w+)/`:(.*(?:\n  .*)*)", text, re.MULTILINE))
    named = {word.strip("/") for word in code(text)}
    named |= {f"{part}/{word.strip('/')}" for part, item in items.items() for word in code(item)}
    return folders() - named


def missing(text: str) -> set[str]:
    """The paths in code style that the tree lacks."""
    items = dict(re.findall(r"^- `(\w+)/`:(.*(?:\n  .*)*)", text, re.MULTILINE))
    paths = {(word, Path(word)) for word in code(text) if re.fullmatch(r"[\w./-]+(/|\.py|\.md)", word)}
    inside = {word: part for part, item in items.items() for word in code(item)}
    found = {word for word, path in paths if (ROOT / path).exists() or word == "__init__.py"}
    found |= {word for word, part in inside.items() if (ROOT / part / word).exists()}
    return {word for word, _ in paths} - found


def imports(text: str) -> dict[str, set[str]]:
    """The page's table of imports: {part: what it may import beside itself}."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\w, ]+) \|$", text, re.MULTILINE)
    return {part: set() if names == "nothing" else set(names.split(", ")) for part, names in rows}


def rules() -> dict[str, set[str]]:
    """MAY_IMPORT without each part itself, which may always import itself."""
    return {part: names - {part} for part, names in test_imports.MAY_IMPORT.items()}


@pytest.mark.smoke
def test_every_folder_is_named():
    assert not unnamed(PAGE.read_text(encoding="utf-8"))


@pytest.mark.smoke
def test_every_path_exists():
    assert not missing(PAGE.read_text(encoding="utf-8"))


@pytest.mark.smoke
def test_the_table_of_imports_is_the_rule():
    assert imports(PAGE.read_text(encoding="utf-8")) == rules()


@pytest.mark.smoke
def test_a_wrong_page_is_found():
    text = PAGE.read_text(encoding="utf-8")
    assert unnamed(text.replace("`test_time/`, ", "")) == {"layers/test_time"}
    assert missing(text.replace("`train/loop.py`", "`train/loops.py`")) == {"train/loops.py"}
    assert imports(text.replace("| errors, files, lazy, registry |", "| errors |")) != rules()
