"""Documents far longer than a training row, read through the carried memory."""

import dataclasses
from typing import Any, ClassVar

from engrax.errors import UserError
from engrax.evals import plots, streaming
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure
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
        return Evaluation(values, [_figure(context, values)], summary)


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
