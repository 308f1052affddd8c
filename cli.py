"""The command line: thin parsing over the functions of `engrax`.

A user's mistake ends with exit code 2 and one line on stderr; a traceback is a bug.
"""

import os
import signal
import sys

if (
    __name__ == "__main__" or os.path.basename((sys.argv or [""])[0]) == "engrax"
):  # until `main` runs, Ctrl-C ends the process

    def _leave(number, frame):
        os.write(2, b"engrax: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _leave)

# ruff: noqa: E402
import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engrax import interrupts
from engrax.errors import UserError
from engrax.flags import Parser, check_output, filled, override, positive, split_data
from engrax.registry import KINDS, did_you_mean, find_registry

EXAMPLES = {
    "train": "engrax train quickstart --run-dir runs/quickstart --steps 500 --model.mixers.0.heads 8",
    "evaluate": "engrax evaluate runs/quickstart --step best --only validation,stream",
    "generate": 'engrax generate runs/quickstart --prompt "def " --tokens 200',
    "export": "engrax export runs/tuned exported --step best",
    "describe": "engrax describe quickstart --model.dim 512 --device h200",
    "compile": "engrax compile gated_deltanet_340m --device h200 --mesh fsdp=8 --parallel.zero 3 --batch-size 64",
    "tokenize": "engrax tokenize my_config.py --data.path corpus",
    "compare": "engrax compare titans_ablation --folder runs/titans_ablation --steps 300",
    "check": "engrax check my_mixer.py --law causality",
    "list": "engrax list",
    "bench": "engrax bench linear_attention --quick --output bench.json",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a broken law, 2 for a user's mistake, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    with interrupts.handled() as interrupted:
        try:
            return _run(args)
        except KeyboardInterrupt as error:
            return _fail(error, 130)
        except BrokenPipeError:  # the reader of the output, for example `head`, has stopped
            sys.stdout = None
            return 0
        except Exception as error:
            if interrupted:  # inside an import, a library may turn Ctrl-C into its own error
                return _fail(KeyboardInterrupt(), 130)
            # OSError: a full disk, a folder without write permission, a file in place of a folder
            if isinstance(error, (UserError, OSError)):
                return _fail(error, 2)
            raise


def _fail(error: BaseException, code: int) -> int:
    """Prints the error as one line without control characters: names from others' files may have some."""
    line = " ".join(str(error).split()) or ("interrupted" if code == 130 else type(error).__name__)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"engrax: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def _run(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="engrax", description="Train, evaluate and sample memory-augmented sequence models.", add_help=True
    )
    parser.add_argument("command", choices=None, help=f"one of: {', '.join(EXAMPLES)}; each has --help", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not args or args[0] in ("-h", "--help"):
        parser.print_help()
        print("\nexamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES.values()))
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)} (known: {', '.join(COMMANDS)}).")
    return COMMANDS[command](rest)


def _parser(command: str, description: str) -> Parser:
    return Parser(
        prog=f"engrax {command}",
        description=description,
        epilog=f"example:\n  {EXAMPLES[command]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _train(args: list[str]) -> int:
    parser = _parser(
        "train",
        "Trains a config, resuming the run that the folder holds. Any field is a flag: --optimizer.learning-rate 1e-3.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, a .py file with config(), or a run to resume"
    )
    parser.add_argument("--run-dir", type=filled, help="the run folder (default: runs/CONFIG)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers a run's own mixers")
    known, rest = _split_help(parser, args)
    from engrax.train import distributed

    distributed.start()
    from engrax import plugins, train

    for path in known.plugin:
        plugins.load(path)
    source = _find(known.config)
    experiment = override(source.experiment, rest, f"engrax train {known.config}")
    if source.run_dir and experiment.parallel == source.experiment.parallel:
        experiment = _on_these_devices(experiment)
    run_dir = known.run_dir or source.run_dir or f"runs/{source.name}"
    result = train(experiment, run_dir, source=source.path)
    if result.finished and _is_main():
        print(f"finished step {result.step}: {result.run_dir} (next: engrax evaluate {result.run_dir})")
    return 130 if result.interrupted else 0


def _on_these_devices(experiment: Any) -> Any:
    """The experiment, with a mesh of this machine's devices if its own mesh does not fit."""
    import jax

    from engrax.train import sharding

    parallel = sharding.fitting(experiment.parallel, jax.device_count())
    if parallel != experiment.parallel and _is_main():
        old = experiment.parallel
        print(
            f"trained with --parallel.data {old.data} --parallel.fsdp {old.fsdp}; on {jax.device_count()} device(s) it "
            f"goes on with --parallel.data {parallel.data} --parallel.fsdp {parallel.fsdp}",
            file=sys.stderr,
        )
    return dataclasses.replace(experiment, parallel=parallel)


def _evaluate(args: list[str]) -> int:
    parser = _parser(
        "evaluate",
        "Evaluates a checkpoint. Writes results.json, CSV, plots and report.html into a new folder: RUN/evals/step_N, "
        "then step_N-2, step_N-3, ...",
    )
    parser.add_argument("run", type=filled, help="the run folder")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--only", metavar="NAMES", help="evaluators to run, with commas between (default: all)")
    parser.add_argument("--batches", type=positive, default=None, help="validation batches (default: 131,072 tokens)")
    parser.add_argument("--stream", type=positive, metavar="TOKENS", help="also read long validation documents so far")
    parser.add_argument(
        "--plugin", action="append", default=[], help="a .py file that registers mixers or evaluators of your own"
    )
    known, data = split_data(parser, args)
    from engrax import evaluate

    only = None if known.only is None else [name.strip() for name in known.only.split(",") if name.strip()]
    settings = dict(step=known.step, only=only, batches=known.batches, stream=known.stream)
    print(evaluate(known.run, **settings, plugins=known.plugin, data=data).summary())
    return 0


def _generate(args: list[str]) -> int:
    parser = _parser("generate", "Samples a continuation of a prompt, and prints it as it is written.")
    parser.add_argument("run", type=filled, help="the run folder")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to sample (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="only the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, help="only the likeliest tokens that together reach this probability")
    parser.add_argument("--min-p", type=float, help="only tokens at least this fraction as likely as the likeliest")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the sample; several times")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers the run's own mixers")
    known, data = split_data(parser, args)
    from engrax import Sampling, generate

    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    sampling = Sampling(**{name: getattr(known, name) for name in names}, stop=tuple(known.stop))
    settings = dict(tokens=known.tokens, sampling=sampling, step=known.step, plugins=known.plugin, data=data)
    pieces = generate(known.run, known.prompt, **settings, stream=True)
    print(known.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _export(args: list[str]) -> int:
    parser = _parser("export", "Writes a run that began from a published checkpoint back as one (safetensors).")
    parser.add_argument("run", type=filled, help="the run folder, trained with --init-from")
    parser.add_argument("folder", type=filled, help="where the files go; must be empty or new")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers the run's own mixers")
    known = parser.parse_args(args)
    from engrax import export

    export(known.run, known.folder, step=known.step, plugins=known.plugin)
    print(f"exported to {known.folder}")
    return 0


def _describe(args: list[str]) -> int:
    parser = _parser(
        "describe",
        "Prints what a config costs before any step: parameters, FLOPs, state bytes, optimizer bytes. With --device "
        "also which implementation of every operation serves its training there, and why the others do not.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, or the path of a .py file with config()"
    )
    parser.add_argument("--device", help="h100, h200, b200, v5e, v6e or cpu; it need not be here")
    known, rest = _split_help(parser, args)
    import jax

    from engrax.train import compile_report, cost, kernel_report

    device = None if known.device is None else kernel_report.find_device(known.device)
    experiment = override(_find(known.config).experiment, rest, f"engrax describe {known.config}")
    print(cost.format_costs(cost.costs(experiment, jax.device_count())))
    _print_splits(experiment.data)
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


def _compile(args: list[str]) -> int:
    parser = _parser(
        "compile",
        "Compiles a config's whole training step for a device that need not be here, and prints what it takes: memory, "
        "kernels, collectives, FLOPs, bytes and the least time. The result is also kept in the cache ($ENGRAX_CACHE or "
        "~/.cache/engrax), where `engrax describe` finds it.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, or the path of a .py file with config()"
    )
    parser.add_argument("--device", required=True, help="h200, v5e, v6e or cpu")
    parser.add_argument("--mesh", help="axes and their devices, such as data=2,fsdp=4 (default: the config's, or one)")
    parser.add_argument("--output", type=filled, help="also write the result as JSON to this file")
    known, rest = _split_help(parser, args)
    check_output(known.output)
    from engrax.pallas_kernels import topologies

    topologies.prepare()
    topologies.find(known.device)  # says what is missing before anything is built
    from engrax.train import compile_report

    experiment = override(_find(known.config).experiment, rest, f"engrax compile {known.config}")
    print(compile_report.run(experiment, known.device, known.mesh, config=known.config, output=known.output))
    return 0


def _tokenize(args: list[str]) -> int:
    parser = _parser(
        "tokenize",
        "Writes the tokens of a config's text once, as shards in the cache ($ENGRAX_CACHE or ~/.cache/engrax). "
        "Trainings on the same text read them. More than 64 MiB of text are tokenised at their first use.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, or the path of a .py file with config()"
    )
    known, rest = _split_help(parser, args)
    from engrax.data.config import SPLITS

    data = override(_find(known.config).experiment, rest, f"engrax tokenize {known.config}").data
    if not hasattr(data, "tokenize"):
        raise UserError(f"{data.registered_name} has nothing to tokenise: only a corpus of text is written as tokens.")
    for shards in data.tokenize():
        tokens = ", ".join(f"{split} {shards.tokens(split):,} tokens" for split in SPLITS)
        print(f"{shards.folder}\n{tokens}")
        print("\n".join(f"{name:<17} {value}" for name, value in shards.sizes.rows()))
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


def _compare(args: list[str]) -> int:
    parser = _parser(
        "compare",
        "Trains and tabulates a comparison: every experiment at every learning rate of the grid, the best rate with "
        "several seeds. Continues after an interruption. Any field of all experiments is a flag: --steps 300.",
    )
    parser.add_argument(
        "config", type=filled, help="a comparison that `engrax list` shows, or a .py file with comparison()"
    )
    parser.add_argument("--folder", type=filled, help="where its runs and tables go (default: runs/COMPARISON)")
    parser.add_argument("--seeds", type=positive, help="at the best learning rate (default: the comparison's)")
    known, rest = _split_help(parser, args)
    from engrax import configs, evals

    comparison, name = configs.find_comparison(known.config)
    prog = f"engrax compare {known.config}"
    experiments = {label: override(e, rest, prog) for label, e in comparison.experiments.items()}
    seeds = comparison.seeds if known.seeds is None else known.seeds
    comparison = dataclasses.replace(comparison, experiments=experiments, seeds=seeds)
    found = evals.compare(comparison, known.folder or f"runs/{name}", command=shlex.join(["engrax", "compare", *args]))
    print(found.markdown)
    print(f"The table, its numbers and its plot are in {found.directory}")
    return 0


def _check(args: list[str]) -> int:
    parser = _parser(
        "check",
        "Runs the laws (causality, state carry, packing, ...) on mixers and models. Ends with 0 where all hold, with 1 "
        "and a line for each broken law otherwise.",
    )
    parser.add_argument(
        "target", type=filled, help="a .py file, all of whose mixers and models are checked, or a registered name"
    )
    parser.add_argument("--law", action="append", default=[], help="a law, or a part of one; several times for several")
    known = parser.parse_args(args)
    from engrax import check

    breaches = check(known.target, laws=known.law)
    for breach in breaches:
        print(f"{breach.subject}: {breach}")
    if not breaches:
        print(f"{known.target}: all laws hold")
    return 1 if breaches else 0


def _list(args: list[str]) -> int:
    _parser("list", "Lists configs, comparisons and all that is registered: mixers, models, data sets, ...").parse_args(
        args
    )
    from engrax import configs

    print("configs:")
    for name in configs.names():
        print(f"  {name:24} {configs.summary(name)}")
    print("comparisons:")
    for name in configs.comparison_names():
        print(f"  {name:24} {configs.summary(name)}")
    for kind in KINDS:
        registry = find_registry(kind)
        print(f"{registry.word}s:")
        for name, cls in registry.items():
            print(f"  {name:24} {(cls.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _bench(args: list[str]) -> int:
    parser = _parser("bench", "Times every implementation of the operations against xla and the device's limits.")
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


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "describe": _describe,
    "compile": _compile,
    "tokenize": _tokenize,
    "compare": _compare,
    "check": _check,
    "list": _list,
    "bench": _bench,
}


def _find(name: str) -> Any:
    """A config by name or file, or the config of a run folder."""
    from engrax import configs
    from engrax.train import runs

    if (runs.folder(name) / "config.json").exists():
        run = runs.open_run(name)
        return configs.Source(run.experiment, run.directory.name, run_dir=str(run.directory))
    return configs.find(name)


def _split_help(parser: Parser, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the parser's own arguments; the rest are a config's fields. --help after a config lists its fields."""
    wants_help = [a for a in args if a in ("-h", "--help")]
    plain = [a for a in args if a not in ("-h", "--help")]
    if wants_help and (not plain or plain[0].startswith("-")):
        parser.parse_args(["--help"])
    if not plain or plain[0].startswith("-"):
        raise UserError(f"{parser.prog} needs a CONFIG first; for example: {EXAMPLES[parser.prog.split()[-1]]}")
    known, rest = parser.parse_known_args(plain)
    return known, rest + wants_help


def _is_main() -> bool:
    import jax

    return jax.process_index() == 0


if __name__ == "__main__":
    sys.exit(main())
