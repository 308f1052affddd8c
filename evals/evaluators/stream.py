"""Documents far longer than a training row, read through the carried memory."""

import dataclasses
from typing import Any, ClassVar

from engrax.errors import UserError
from engrax.evals import plots, streaming
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.evaluators.by_position import table
from engrax.evals.words import interval, signed
from engrax.registry import register

LONGEST = 16_384  # tokens, where no length is given


@register("stream")
@dataclasses.dataclass(frozen=True)
class StreamConfig(EvaluatorConfig):
    """Long validation documents, read with the carried and with a reset memory; runs only if it is named."""

    length: int | None = None  # tokens of each document; None: the longest that one has, up to 16,384

    order: ClassVar[int] = 40
    optional: ClassVar[bool] = True

    def unavailable(self, experiment: Any) -> str | None:
        """The data must be text with long documents."""
        try:
            self._documents(experiment)
        except UserError as error:
            return str(error)
        return None

    def _documents(self, experiment: Any):
        length = streaming.longest(experiment, LONGEST) if self.length is None else self.length
        return streaming.long_documents(experiment, length)

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        documents = self._documents(context.experiment)
        tick = context.expect(streaming.calls(documents))
        values = streaming.stream(context.experiment, context.model, documents, mesh=context.mesh, tick=tick)
        name = f"fourth - second quarter of {values['length']:,} tokens, {values['unit']}"
        summary = [
            (name, signed(values["drift"])),
            ("  drift of the gain over a reset memory", signed(values["gain_over_reset"]["drift"])),
        ]
        return Evaluation(values, [_figure(context, values), _by_length(context, values)], summary)


def _figure(context: Context, values: dict[str, Any]) -> Figure:
    curve, state, time = values["curve"], values["state_bytes"], values["time"]
    marks = [(f"trained on {values['trained_length']:,}", values["trained_length"])]
    labels = (curve["axis"], values["unit"])
    png = plots.curves(context.title("Long documents"), labels, curve["curves"], log_x=True, marks=marks)
    caption = (
        f"{values['documents']} validation documents, {values['length']:,} tokens each, read through the carried "
        f"memory. Loss of the fourth quarter minus that of the second, paired by document: {interval(values['drift'])} "
        f"{values['unit']}. Some quarters are easier than others; this cancels in the gain over a memory that is reset "
        f"before every piece of {streaming.PIECE} tokens. From the second quarter to the fourth that gain changes by "
        f"{interval(values['gain_over_reset']['drift'])}. "
        f"The state has {state['first']:,} bytes after the first piece and {state['last']:,} after the last. At the "
        f"end a piece takes {time['piece']['ratio']:.2f} times as long as at the beginning, a single token "
        f"{time['token']['ratio']:.2f} times (medians of alternating calls)."
    )
    return Figure("stream", "Long documents", caption, png, table(curve))


def _by_length(context: Context, values: dict[str, Any]) -> Figure:
    """The loss of the documents' first tokens, by their number."""
    names = {"model": "model", "reset": f"memory reset every {streaming.PIECE} tokens"}
    kinds = {"model": "model", "reset": "baseline"}
    lines = [
        {
            "name": names[key],
            "kind": kinds[key],
            "bins": [{"from": p["tokens"] - 1, "to": p["tokens"]} | p for p in points],
        }
        for key, points in values["by_length"].items()
    ]
    heading, trained = "Perplexity by length", values["trained_length"]
    marks = [(f"trained on {trained:,}", trained)]
    labels = ("tokens read of every document", values["unit"])
    png = plots.curves(context.title(heading), labels, lines, log_x=True, marks=marks)
    rows = [
        (
            f"{a['tokens']:,}",
            f"{a['multiple']:g}",
            *(f"{p['value']:.4f}" for p in (a, b)),
            *(f"{p['perplexity']:.3f}" for p in (a, b)),
        )
        for a, b in zip(*values["by_length"].values())
    ]
    head = (
        "tokens",
        "of the training's",
        values["unit"],
        "the same, memory reset",
        "perplexity per token",
        "memory reset",
    )
    caption = (
        "The loss of all tokens up to a length. A model whose memory holds out past its training length keeps falling."
    )
    return Figure("perplexity_by_length", heading, caption, png, Table(head, rows))
