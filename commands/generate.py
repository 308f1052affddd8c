"""`engrax generate`: samples a continuation of a prompt."""

from engrax.commands.common import parser_of
from engrax.flags import filled, split_data

EXAMPLE = 'engrax generate runs/quickstart --prompt "def " --tokens 200'


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of("generate", EXAMPLE, "Samples a continuation of a prompt, and prints it as it is written.")
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
