"""Compiles the whole training steps of the 340M and 1.3B configs for an H200, a TPU v5e and a v6e, without one.

    make test-compile
    python tests/compile_configs.py --devices v5e v6e      in an environment with jax[tpu]; h200 with jax[cuda13]

Each case is `engrax compile` in a process of its own. The results are written after every case; a result whose config
and source are unchanged is not compiled again, so an interrupted run continues. Fails where a case does not compile in
its time, does not fit the device, holds none of the kernels that its operations' table promises, or an array of rows x
tokens x vocabulary or rows x tokens x tokens, and where `engrax describe` estimates its memory with an error of more
than 15 %.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from flax import nnx

from engrax import configs
from engrax.errors import UserError
from engrax.pallas_kernels import topologies
from engrax.train import compile as compiling
from engrax.train import cost
from engrax.train.experiment import replace

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "compile_configs.json"
SMALL = ("based_360m", "gated_deltanet_340m", "gated_deltanet_hybrid_340m", "mom_340m", "mom_hybrid_340m")
LARGE = ("gated_deltanet_1b3", "gated_deltanet_hybrid_1b3", "mom_1b3", "titans_1b3")
ROWS = {"h200": 8, "v6e": 8, "v5e": 4}  # of the small configs on one device, so that all fit
SECONDS = 180  # that one case may take
ERROR = 0.15  # that the estimates of `engrax describe` may have


def cases() -> dict[str, tuple[str, str, str, int]]:
    """Returns {name: (config, device, mesh, rows)}."""
    found = [(config, device, "data=1,fsdp=1", rows) for config in SMALL for device, rows in ROWS.items()]
    found += [(config, "h200", "data=1,fsdp=8", configs.find(config).experiment.batch_size) for config in LARGE]
    return {
        f"{config} {device} {mesh} {rows} rows": (config, device, mesh, rows) for config, device, mesh, rows in found
    }


def experiment_of(config: str, mesh: str, rows: int):
    """Returns the experiment of a case."""
    experiment = replace(configs.find(config).experiment, {"batch_size": rows})
    return replace(experiment, {"parallel": compiling.parse_mesh(mesh, experiment.parallel)})


def compiled(config: str, device: str, mesh: str, rows: int, *, seconds: int) -> dict:
    """Returns the result of `engrax compile`, or {"error": why there is none}."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "engrax.cli", "compile", config, "--device", device, "--mesh", mesh]
        command += ["--batch-size", str(rows), "--output", str(output)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled within {seconds} s"}
        if done.returncode:
            return {"error": done.stdout.decode(errors="replace").strip().splitlines()[-1]}
        estimate = cost.step_memory(experiment_of(config, mesh, rows), topologies.TARGETS[device].device)
        return json.loads(output.read_text()) | {"estimate": estimate}


def complaints(result: dict) -> list[str]:
    """Returns what is wrong with a result."""
    if "error" in result:
        return [result["error"]]
    if not result["memory"]["fits"]:
        return ["it does not fit the device"]
    names = {kernel["name"] for kernel in result["kernels"]}
    promised = {row["op"] for row in result["operations"] if row["served_by"].startswith("pallas")}
    lost = [op for op in sorted(promised) if not any(name.startswith(op) for name in names)]
    wrong = [f"no kernel of {op} is in the program" for op in lost]
    wrong += [f"it holds an array of {name}" for name in forbidden(result)]
    for kind in ("argument", "temporary"):
        told = result["estimate"][f"{kind}_bytes"]
        found = result["memory"][{"argument": "arguments", "temporary": "temporaries"}[kind]]
        if told is not None and abs(told / found - 1) > ERROR:
            wrong.append(f"the estimate of {kind} bytes is {told / found:.2f} times the compiler's")
    return wrong


def forbidden(result: dict) -> list[str]:
    """Returns the names of arrays in the program that no step should hold.

    Where a width of the model equals the row's length, an array of rows x tokens x that width looks like rows x tokens
    x tokens, so only one of scores for every head of attention counts there.
    """
    length, model = result["seq_len"], configs.find(result["config"]).experiment.model
    tokens = result["rows"] * length // (result["mesh"]["data"] * result["mesh"]["fsdp"])
    params = nnx.state(nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))), nnx.Param)
    scores = tokens * length
    if any(length in param.shape for param in jax.tree.leaves(params)):
        attention = [row["sizes"] for row in result["operations"] if row["op"] == "softmax_attention"]
        scores *= min((int(re.search(r"heads=(\d+)", sizes)[1]) for sizes in attention), default=math.inf)
    found = set()
    for dims in (array["dims"] for array in result["largest"]):
        if model.vocab_size in dims and math.prod(dims) >= tokens * model.vocab_size:
            found.add("rows x tokens x vocabulary")
        if dims.count(length) > 1 and math.prod(dims) >= scores:
            found.add("rows x tokens x tokens")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that one case may take")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    topologies.prepare()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    results = {name: result for name, result in results.items() if name in cases()}
    wrong = []
    for name, (config, device, mesh, rows) in cases().items():
        if device not in options.devices or options.only not in name:
            continue
        if not compiling.is_current(results.get(name, {}), experiment_of(config, mesh, rows), device):
            results[name] = compiled(config, device, mesh, rows, seconds=options.seconds)
            options.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        found = complaints(results[name])
        wrong += [f"{name}: {complaint}" for complaint in found]
        print(f"{name}: {'; '.join(found) or 'compiled, fits'}", flush=True)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
