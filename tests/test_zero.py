"""What the compiled training step of a sharded model moves between devices, and what it holds."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = r"""
    import dataclasses, json, re, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from engrax.layers import AttentionConfig
    from engrax.models import LanguageModelConfig
    from engrax.tests.experiments import tiny
    from engrax.train import ParallelConfig
    from engrax.train.trainer import Trainer

    KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    n, rows, found = jax.device_count(), 8, []
    for strategy, repeat in json.loads(sys.argv[1]):
        mixer = AttentionConfig(heads=2, head_dim=32, window=32)
        model = LanguageModelConfig(vocab_size=96, dim=64, mixers=(mixer,), repeat=repeat, remat="dots")
        parallel = ParallelConfig(data=1, fsdp=n, zero=3, strategy=strategy)
        e = tiny(model=model, batch_size=rows * n, parallel=parallel)
        e = dataclasses.replace(e, data=dataclasses.replace(e.data, seq_len=64))
        trainer = Trainer(e)
        split = NamedSharding(trainer.mesh, PartitionSpec(("data", "fsdp")))
        batch = {k: jax.ShapeDtypeStruct((rows * n, 64), np.int32, sharding=split)
                 for k in ("tokens", "targets", "segment_ids")}
        program = trainer.train_step.lower(trainer.abstract_state(), batch).compile()
        moved, place = [], "body"
        for line in program.as_text().splitlines():
            head = re.match(r"^(ENTRY )?%?[\w.\-]+ .*\{$", line)
            if head:
                place = "entry" if head.group(1) else "body"
            call = re.search(rf"= (\(?[^=]*?) ({KINDS})(-start)?\(", line)
            if call:
                for shape in re.findall(r"\w+\[([\d,]*)\]", call.group(1)):
                    moved.append((place, call.group(2), [int(d) for d in shape.split(",") if d]))
        temporary = program.memory_analysis().temp_size_in_bytes
        found.append(dict(strategy=strategy, repeat=repeat, moved=moved, temporary=temporary))
    print(json.dumps(found))
"""
CASES = [("pjit", 7), ("pjit", 8), ("pjit", 9), ("pmap", 8)]


@pytest.fixture(scope="module")
def programs(once):
    """{(devices, strategy, layers): what the program moves and holds}."""

    def make():
        found = {}
        for devices, cases in ((8, CASES), (2, [("pjit", 8)])):
            flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
            run = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(cases)],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert run.returncode == 0, run.stderr[-3000:]
            for case in json.loads(run.stdout.splitlines()[-1]):
                found[f"{devices} {case['strategy']} {case['repeat']}"] = case
        return found

    return once("zero programs", make)


@pytest.mark.parametrize("strategy", ["pjit", "pmap"])
def test_layers_are_gathered_one_at_a_time(programs, strategy):
    """Stacked parameters are gathered inside the scan; embedding and final norm once, before it."""
    moved = programs[f"8 {strategy} 8"]["moved"]
    gathered = [(place, shape) for place, kind, shape in moved if kind == "all-gather"]
    entry = sorted(shape for place, shape in gathered if place == "entry")
    assert entry == [[64], [96, 64]]  # the final norm and the embedding
    inside = [shape for place, shape in gathered if place == "body"]
    assert inside and all(shape[0] in (1, 64, 176) and len(shape) <= 3 for shape in inside)
    assert not any(shape[:1] == [8] and len(shape) == 3 for shape in inside)


@pytest.mark.parametrize("strategy", ["pjit", pytest.param("pmap", marks=pytest.mark.deep)])
def test_rows_stay_on_their_devices(programs, strategy):
    """No collective moves an array whose leading size is the global batch (8 rows on each of 8 devices)."""
    moved = programs[f"8 {strategy} 8"]["moved"]
    assert moved and not [m for m in moved if m[2][:1] == [64] and len(m[2]) >= 3]
    assert not [m for m in moved if m[1] in ("all-to-all", "collective-permute")]


def test_temporaries_grow_with_layers_and_not_with_devices(programs):
    """8 layers on 8 devices: on the line through 7 and 9; from 2 to 8 devices at most 1.3 times as much."""
    seven, eight, nine = (programs[f"8 pjit {n}"]["temporary"] for n in (7, 8, 9))
    assert eight == pytest.approx((seven + nine) / 2, rel=0.1)
    assert eight <= 1.3 * programs["2 pjit 8"]["temporary"]


ACCUMULATED = """
import dataclasses, json
import jax, numpy as np
from engrax.tests.layouts import collectives, compiled, experiment
found = {}
for strategy in ("pjit", "pmap"):
    for zero in (1, 2):
        e = experiment("attention", parallel=dict(data=4, zero=zero, strategy=strategy), accumulate=2, batch_size=8)
        e = dataclasses.replace(e, model=dataclasses.replace(e.model, mlp_hidden=4096))
        program = compiled(e)
        scattered = sum(kind == "reduce-scatter" for kind, _ in collectives(program))
        found[f"{strategy} {zero}"] = program.memory_analysis().temp_size_in_bytes, scattered
print(json.dumps(found))
"""


@pytest.mark.long
def test_accumulated_gradients_are_sharded_by_zero_2(run_python):
    """The MLPs' three matrices of two layers are nearly all parameters; each device holds a quarter of their sum."""
    found = json.loads(run_python(ACCUMULATED, devices=4).splitlines()[-1])
    matrices = 4 * 2 * 3 * 16 * 4096
    for strategy in ("pjit", "pmap"):
        one, two = found[f"{strategy} 1"][0], found[f"{strategy} 2"][0]
        assert one - two > 0.5 * matrices, (strategy, one, two)
    assert found["pmap 2"][1] >= found["pmap 1"][1] > 0
