"""`engrax describe`: prints what a config costs."""

import sys
from typing import Any

from engrax.commands.common import find_config, parser_of, split_help
from engrax.errors import UserError
from engrax.flags import filled, override

EXAMPLE = "engrax describe quickstart --model.dim 512 --device h200"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "describe",
        EXAMPLE,
        "Prints what a config costs before any step: parameters, FLOPs, state bytes, optimizer bytes. Then the formats "
        "of its mixers for `engrax export --to`, and what would have to differ for them to fit. With --device "
        "also which implementation of every operation serves its training there, and why the others do not.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, or the path of a .py file with config()"
    )
    parser.add_argument("--device", help="h100, h200, b200, v5e, v6e or cpu; it need not be here")
    known, rest = split_help(parser, args, EXAMPLE)
    import jax

    from engrax.evals import published
    from engrax.train import compile_report, cost, kernel_report

    device = None if known.device is None else kernel_report.find_device(known.device)
    experiment = override(find_config(known.config).experiment, rest, f"engrax describe {known.config}")
    print(cost.format_costs(cost.costs(experiment, jax.device_count())))
    if about := experiment.data.about():
        print("\n" + "\n".join(f"{name:<17} {value}" for name, value in about))
    _print_splits(experiment.data)
    print("\n" + published.format_fits(published.fits(experiment.model)))
    try:
        warnings = experiment.data.warnings()
    except UserError as error:  # the costs do not need the data
        warnings = [f"the tokenizer was not tried on the data: {error}"]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if device is not None:
        print("\n" + compile_report.format_estimate(cost.step_memory(experiment, device, jax.device_count())))
        print("\n" + kernel_report.format_report(experiment, device))
    print(compile_report.saved_or_command([known.config, *rest], experiment, known.device), end="")
    return 0


def _print_splits(data: Any) -> None:
    """Prints the sizes of both splits of a text, or why they are unknown."""
    try:
        splits = data.splits()
    except UserError as error:  # a config can be described before its text exists
        print(f"\nsplits unknown: {error}")
        return
    if splits is not None:
        print("\n" + "\n".join(f"{name:<17} {value}" for name, value in splits.rows()))
