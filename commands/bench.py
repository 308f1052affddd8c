"""`engrax bench`: times the operations."""

import json
from pathlib import Path

from engrax.commands.common import parser_of
from engrax.errors import UserError
from engrax.flags import check_output, filled, positive

EXAMPLE = "engrax bench linear_attention --quick --output bench.json"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "bench", EXAMPLE, "Times every implementation of the operations against xla and the device's limits."
    )
    parser.add_argument("ops", nargs="*", help="operations; default: all")
    parser.add_argument("--implementations", nargs="+", help="default: all that can run here, the reference apart")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of q, k, v; default by device")
    parser.add_argument("--runs", type=positive, default=11, help="timed runs of each program (default 11)")
    parser.add_argument("--quick", action="store_true", help="the first shape of each operation only")
    parser.add_argument("--output", type=filled, help="write the rows as JSON to this file")
    known = parser.parse_args(args)
    check_output(known.output)
    import jax

    from engrax.pallas_kernels.bench import bench

    ops = known.ops or bench.OPERATIONS
    try:
        count = 1 if known.quick else None
        cases = [case for op in ops for case in bench.default_cases(op, jax.default_backend())[:count]]
        options = dict(dtype=known.dtype, implementations=known.implementations, runs=known.runs)
        rows = []
        for row in bench.bench(ops, cases=cases, **options):
            print(bench.describe(row), flush=True)
            rows.append(row)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    if known.output:
        Path(known.output).parent.mkdir(parents=True, exist_ok=True)
        Path(known.output).write_text(json.dumps(bench.report(rows, known.dtype), indent=1) + "\n")
    return 0
