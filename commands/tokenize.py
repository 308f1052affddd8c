"""`engrax tokenize`: writes the tokens of a text once."""

from engrax.commands.common import find_config, parser_of, split_help
from engrax.errors import UserError
from engrax.flags import filled, override

EXAMPLE = "engrax tokenize my_config.py --data.path corpus"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "tokenize",
        EXAMPLE,
        "Writes the tokens of a config's text once, as shards in the cache ($ENGRAX_CACHE or ~/.cache/engrax). "
        "Trainings on the same text read them. More than 64 MiB of text are tokenised at their first use.",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, or the path of a .py file with config()"
    )
    known, rest = split_help(parser, args, EXAMPLE)
    from engrax.data.config import SPLITS

    data = override(find_config(known.config).experiment, rest, f"engrax tokenize {known.config}").data
    if not hasattr(data, "tokenize"):
        raise UserError(f"{data.registered_name} has nothing to tokenise: only a corpus of text is written as tokens.")
    for shards in data.tokenize():
        tokens = ", ".join(f"{split} {shards.tokens(split):,} tokens" for split in SPLITS)
        print(f"{shards.folder}\n{tokens}")
        print("\n".join(f"{name:<17} {value}" for name, value in shards.sizes.rows()))
    return 0
