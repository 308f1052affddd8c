"""What splitting rows over devices saves: the compiler's memory per device and what devices exchange, nothing is run.

    python benchmarks/sequence_parallel.py --output benchmarks/results/sequence_parallel.json

One training step of a Gated DeltaNet model (4 layers of width 256, 4 heads, a row of T bytes) is compiled for 1 to 8
virtual CPU devices along the mesh axis `sequence`, at several T. `received_bytes` are those of the results of all
collectives in the program, each counted once (layers are a loop).
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

LENGTHS, DEVICES = (2048, 16384, 131072), (1, 2, 4, 8)  # tokens of a row
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "f64": 8, "s64": 8}  # bytes


def received(text: str) -> int:
    """Bytes of the results of the collectives in a compiled program."""
    kinds, total = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all", 0
    for result in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?[(]", re.sub(r"/[*].*?[*]/", "", text)):
        for dtype, shape in re.findall(r"(\w+)\[([0-9,]*)\]", result):
            size = WIDTHS[dtype]
            for n in filter(None, shape.split(",")):
                size *= int(n)
            total += size
    return total


def compiled(length: int, devices: int) -> dict:
    """Bytes of one training step per device."""
    import jax

    from engrax.data import MQAR
    from engrax.layers import GatedDeltaNetConfig
    from engrax.models import LanguageModelConfig
    from engrax.train import Experiment, ParallelConfig, sharding
    from engrax.train.trainer import Trainer

    mixer = GatedDeltaNetConfig(heads=4, head_dim=64, chunk_size=64)
    experiment = Experiment(
        model=LanguageModelConfig(vocab_size=256, dim=256, mixers=(mixer,), repeat=4, remat="full"),
        data=MQAR(seq_len=length, num_pairs=8, vocab_size=256),
        batch_size=1,
        compute_dtype="float32",
        parallel=ParallelConfig(data=1, sequence=devices),
    )
    trainer = Trainer(experiment, devices=tuple(jax.devices()[:devices]))
    rows = jax.sharding.NamedSharding(trainer.mesh, sharding.batch_spec(trainer.mesh))
    batch = {
        name: jax.ShapeDtypeStruct((1, length), "int32", sharding=rows) for name in ("tokens", "targets", "segment_ids")
    }
    program = trainer.train_step.lower(trainer.abstract_state(), batch).compile()
    memory = program.memory_analysis()
    return {
        "tokens": length,
        "devices": devices,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "received_bytes": received(program.as_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        for devices in DEVICES:
            rows.append(compiled(length, devices))
            print(json.dumps(rows[-1]), flush=True)
    import jax

    command = shlex.join(["python", "benchmarks/sequence_parallel.py", *sys.argv[1:]])
    head = {"command": command, "jax": jax.__version__, "compiled_for": jax.devices()[0].platform}
    args.output.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
