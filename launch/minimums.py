"""Prints the lowest versions that setup.py allows, `name==version` a line, for `make test-lowest`."""

import ast
import re
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+(\[[\w,]+\])?)>=(?P<version>[\w.]+)(?P<marker>\s*;.*)?$")


def minimums(source: str) -> list[str]:
    """Returns the pinned requirements of the `setup(...)` call in `source`: its install_requires and extra "test"."""
    call = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    requirements = ast.literal_eval(arguments["install_requires"])
    requirements += ast.literal_eval(arguments["extras_require"])["test"]
    pinned = []
    for requirement in requirements:
        match = REQUIREMENT.match(requirement)
        if match is None:
            raise SystemExit(f"setup.py: {requirement!r} has no lowest version of the form name>=version.")
        pinned.append(f"{match['name']}=={match['version']}{match['marker'] or ''}")
    return pinned


if __name__ == "__main__":
    print("\n".join(minimums(SETUP.read_text(encoding="utf-8"))))
