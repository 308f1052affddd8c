"""The projections by own kernels of a mixture of memories, as the scripts compile them for absent devices, and how many
FLOPs the compiled program takes."""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.configs import mom_340m
from engrax.layers.routed.mom import _linears
from engrax.layers.routed.routing import lay_out
from engrax.pallas_kernels.grouped_matmul import cost

BATCH = 8  # rows of one of the 32 devices that the config is sized for
SHAPE = re.compile(r"(%[\w.-]+) = \(?(\w+)\[([\d,]*)\]")


def projections():
    """Returns keys, values and gates of mom_340m's mixture, forward and backward in bfloat16, as a function of
    (parameters, x, the memories of every token); the shapes of these; and the FLOPs that are needed."""
    experiment = mom_340m.config()
    config, dim, length = experiment.model.mixers[0], experiment.model.dim, experiment.data.seq_len
    copies = config.top_k + config.shared
    module = nnx.eval_shape(lambda: config.build(dim, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)

    def run(params, x, memory):
        first = jnp.zeros(len(x), jnp.int32)
        runs = lay_out(memory, jnp.zeros(x.shape[:2], jnp.int32), first, memories=config.states, lead=3)

        def project(params, x):
            module = nnx.merge(graphdef, params, rest)
            return module._written(module.key_value, x, runs), module._gate_logits(x, runs)

        outputs, pull = jax.vjp(project, params, x)
        return outputs, pull(outputs)

    linears = [module.key_value, *(p for gate in module.base.gate_projections().values() for p in _linears(gate))]
    needed = 0.0
    for linear in linears:
        owners, features, outputs = linear.kernel.shape
        sizes = dict(batch=BATCH, seq=length * copies, owners=owners, features=features, outputs=outputs)
        needed += sum(cost.flops(**sizes))
    x = jax.ShapeDtypeStruct((BATCH, length, dim), jnp.bfloat16)
    return run, (params, x, jax.ShapeDtypeStruct((BATCH, length, copies), jnp.int32)), needed


def gpu_flops(program: str) -> float:
    """Returns the FLOPs of all matrix products in an optimised HLO module for a GPU, jax's grouped kernel included.

    Raises ValueError for a loop or a call whose FLOPs are not known.
    """
    from engrax.pallas_kernels.grouped_matmul.gpu import ROWS

    shapes = {name: [int(n) for n in dims.split(",") if n] for name, _, dims in SHAPE.findall(program)}
    total = 0.0
    for line in program.splitlines():
        made = SHAPE.search(line)
        if made is None:
            continue
        size = math.prod(shapes[made[1]])
        operands = re.findall(r"%[\w.-]+", line.split(" = ", 1)[1])
        if re.search(r"\bdot\(", line):
            summed = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", line)[1]
            total += 2 * size * math.prod(shapes[operands[0]][int(axis)] for axis in summed.split(","))
        elif "mosaic_gpu" in line:  # group sizes, rows and kernels
            (owners,), (rows, summed), _ = (shapes[name] for name in operands[:3])
            visited = rows + (owners - 1) * ROWS  # a tile for the end of every group, whether it is needed or not
            total += 2 * visited * summed * size / rows
        elif re.search(r"\b(while|convolution|custom-call)\(", line):
            raise ValueError(f"FLOPs that are not known: {line[:300]}")
    return total
