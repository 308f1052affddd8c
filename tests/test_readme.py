"""What the README shows works as it stands."""

import re

COMMAND = "import sys; from engrax import cli; sys.exit(cli.main(sys.argv[1:]))"


def blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


def test_the_memory_of_the_readme_obeys_the_laws_and_trains(root, tmp_path, run_python):
    (source,) = [block for block in blocks(root, "python") if "@engrax.register" in block]
    path = tmp_path / "leaky.py"
    path.write_text(source)
    laws = [word for law in ("state", "causality", "independence", "packing") for word in ("--law", law)]
    assert "all laws hold" in run_python(COMMAND, devices=1, args=["check", path, *laws])
    small = ["--steps", "2", "--data.seq-len", "32", "--batch-size", "4", "--eval.batches", "1"]
    out = run_python(COMMAND, devices=1, args=["train", path, "--run-dir", tmp_path / "run", *small])
    assert "finished step 2" in out


def test_the_commands_of_the_readme_exist(root):
    from engrax import cli, configs

    lines = [line for block in blocks(root, "") for line in block.splitlines() if line.startswith("engrax ")]
    assert len(lines) >= 5
    for line in lines:
        assert line.split()[1] in cli.COMMANDS
    assert all(name in configs.names() for name in re.findall(r"engrax train (\w+) ", "\n".join(lines)))
