"""`engrax list`: lists what is registered."""

from engrax.commands.common import parser_of
from engrax.registry import KINDS, find_registry

EXAMPLE = "engrax list"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser_of(
        "list", EXAMPLE, "Lists configs, cards and all that is registered: mixers, models, data sets, ..."
    ).parse_args(args)
    from engrax import configs

    print("configs:")
    for name in configs.names():
        print(f"  {name:24} {configs.summary(name)}")
    print("cards, claims of papers, for `engrax reproduce`:")
    for name in configs.card_names():
        print(f"  {name:24} {configs.summary(name)}")
    for kind in KINDS:
        registry = find_registry(kind)
        print(f"{registry.word}s:")
        for name, cls in registry.items():
            print(f"  {name:24} {(cls.__doc__ or '').strip().splitlines()[0]}")
    print("generated tasks, among the data sets, for any run: engrax evaluate RUN --tasks mqar --lengths 64,128,256")
    return 0
