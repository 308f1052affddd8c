"""`engrax compile`: compiles a training step for a device."""

from engrax.commands.common import find_config, parser_of, split_help
from engrax.flags import check_output, filled, override

EXAMPLE = "engrax compile gated_deltanet_340m --device h200 --mesh fsdp=8 --parallel.zero 3 --batch-size 64"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "compile",
        EXAMPLE,
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
    known, rest = split_help(parser, args, EXAMPLE)
    check_output(known.output)
    from engrax.pallas_kernels import topologies

    topologies.prepare()
    topologies.find(known.device)  # says what is missing before anything is built
    from engrax.train import compile_report

    experiment = override(find_config(known.config).experiment, rest, f"engrax compile {known.config}")
    print(compile_report.run(experiment, known.device, known.mesh, config=known.config, output=known.output))
    return 0
