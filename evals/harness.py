"""engrax models in lm-evaluation-harness (the package lm_eval, an optional extra): runs, checkpoints, sessions.

    from engrax.evals.harness import EngraxLM
    lm_eval.simple_evaluate(model=EngraxLM("runs/a", batch_size=8), tasks=[...])

Importing this module registers the model's name, `engrax`. docs/evaluation.md has the protocol and the harness's traps.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from engrax import plugins as plugin_files
from engrax.data.tokenizers import load_tokenizer
from engrax.errors import UserError
from engrax.evals.likelihood import continuations
from engrax.evals.task_grid import most_tokens
from engrax.models import imported
from engrax.models.sampling import Sampling
from engrax.models.session import Session
from engrax.train import runs, train_step

MOST_WRITTEN = 256  # tokens of an answer, if the task gives no number; the harness's own default
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")  # of sampling, as tasks name them
SILENT = ("do_sample", "until", "max_gen_toks")  # read apart

log = logging.getLogger(__name__)


@register_model("engrax")
class EngraxLM(TemplateLM):
    """A run folder, a published checkpoint's folder, or a session, as the harness's model.

    run: the folder, or a `Session` of one row with a tokenizer. A session that has read a text continues it in every
      request. step, plugins, dtype: as for `engrax.session`. batch_size: rows read at once, which changes no number.
    prefix: a text of one token that stands before a request without context; None = the tokenizer's end of text, or a
      newline. max_length: tokens that a row may have; None = what the model can read, which is any number unless it
      keeps all tokens in a cache or has learned positions. max_batch_size, device: of the harness's other models; they
      have no effect (JAX_PLATFORMS chooses the device).

    Raises UserError for a model that cannot be opened, or settings that do not fit.
    """

    def __init__(
        self,
        run: Any,
        *,
        step: int | str | None = None,
        plugins: str | Sequence[str] = (),
        dtype: str | None = None,
        batch_size: int | str = 1,
        prefix: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UserError(f"batch_size={batch_size} must be a whole number of at least 1.")
        for path in [plugins] if isinstance(plugins, str) else plugins:
            plugin_files.load(path)
        self.session = run if isinstance(run, Session) else _opened(run, step, dtype)
        if self.session.tokenizer is None or self.session.rows != 1:
            raise UserError("the harness needs a session of one row, with a tokenizer.")
        self.rows, self.tokenizer = int(batch_size), self.session.tokenizer
        self._prefix = _prefix(self.tokenizer, prefix)
        self._read = int(self.session.tokens_read[0])
        most, _ = most_tokens(getattr(self.session.model, "config", None))
        limits = [int(max_length)] if max_length is not None else []
        limits += [most - self._read] if most is not None else []
        self.max_length = min(limits, default=None)
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length={self.max_length} after {self._read} tokens: the model can read no more.")

    @property
    def eot_token_id(self) -> int:
        """The token before a request without context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's cache of requests."""
        return self.tokenizer.manifest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; no special tokens are added, as in training."""
        return self.tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of every (context, continuation)."""
        encoded = []
        for context, continuation in (request.args for request in requests):
            pair = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            encoded.append(((context, continuation), pair[0] or self._begin, pair[1]))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(self._newest(context, len(scored) - 1), scored) for _, context, scored in requests]
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found = continuations(self.session, pairs, rows=self.rows, tick=bar.update)
        return [(each.total, bool(each.greedy.all())) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of every whole document, its first token included; read in one piece if the memory can."""
        windows = [list(self._windows(self.tok_encode(*request.args))) for request in requests]
        flat = [("", *window) for document in windows for window in document]
        totals = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        return [sum(next(totals)[0] for _ in document) for document in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text written after every context, up to the first of its stop texts, which is left out."""
        groups: dict[tuple[str, bool], list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) or list(self._begin) for request in requests]
        for i, request in enumerate(requests):
            groups.setdefault((json.dumps(request.args[1], sort_keys=True), bool(prompts[i])), []).append(i)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for (settings, has_prompt), members in groups.items():
                sampling, most = _sampling(json.loads(settings))
                members.sort(key=lambda i: -len(prompts[i]))
                for at in range(0, len(members), self.rows):
                    part = members[at : at + self.rows]
                    ids = [self._newest(prompts[i], most) for i in part] if has_prompt else None
                    found |= zip(part, self._answers(ids, len(part), sampling, most))
                    bar.update(len(part))
        return [found[i] for i in range(len(requests))]

    def _answers(self, prompts: list[list[int]] | None, count: int, sampling: Sampling, most: int) -> list[str]:
        """The answers of a batch, which is filled with copies of its first row: one number of rows compiles once."""
        session = self.session.branch(self.rows)
        if prompts is not None:
            session.feed(prompts + [prompts[0]] * (self.rows - count))
        written = session.generate(most, sampling)
        return [_before(text, sampling.stop_texts) for text in ([written] if self.rows == 1 else written)[:count]]

    @property
    def _begin(self) -> tuple[int, ...]:
        """The context of a request without one: nothing, if the session has read a text."""
        return () if self._read else (self._prefix,)

    def _windows(self, ids: list[int]) -> Iterator[tuple[Sequence[int], list[int]]]:
        """(context, tokens to score), each token once."""
        if self.max_length is None or len(ids) <= self.max_length:
            yield from [(self._begin, ids)] if ids else []
        else:
            yield from map(make_disjoint_window, get_rolling_token_windows(ids, self._prefix, self.max_length, 1))

    def _newest(self, context: Sequence[int], after: int) -> Sequence[int]:
        """The last tokens of a context that fit before `after` tokens, as the harness's other models do."""
        if self.max_length is None or len(context) + after <= self.max_length:
            return context
        if after >= self.max_length:
            raise UserError(f"{after + 1} tokens after a context exceed the {self.max_length} that can be read.")
        log.warning("a context of %d tokens is cut: the model reads %d.", len(context), self.max_length)
        return context[len(context) + after - self.max_length :]


def _opened(run: Any, step: int | str | None, dtype: str | None) -> Session:
    """The session of a run folder, or of a published checkpoint's folder, which has its tokenizer.json."""
    directory = runs.folder(run)
    if not (directory / "model.safetensors").exists() and not (directory / "model.safetensors.index.json").exists():
        return runs.open_run(directory).session(step, dtype=dtype)
    if step is not None:
        raise UserError(f"{run} is a published checkpoint, which has no steps; leave out step={step}.")
    chosen = None if dtype is None else train_step.resolve_dtype(dtype)
    tokenizer = load_tokenizer(str(directory / "tokenizer.json"))
    return Session(imported.load(Path(directory)), tokenizer=tokenizer, dtype=chosen, name=str(run))


def _prefix(tokenizer: Any, text: str | None) -> int:
    """The id of the token before a request without context."""
    if text is None and tokenizer.end_of_text:
        return tokenizer.end_of_text[0]
    ids = tokenizer.encode("\n" if text is None else text)
    if len(ids) != 1:
        raise UserError(f"prefix={'a newline' if text is None else text!r} has {len(ids)} tokens; give a text of one.")
    return int(ids[0])


def _sampling(given: dict[str, Any]) -> tuple[Sampling, int]:
    """(the settings, the most tokens) of a task's generation_kwargs. Raises UserError for one that has no effect."""
    found = dict(normalize_gen_kwargs(given, MOST_WRITTEN))
    unknown = [name for name in found if name not in (*SETTINGS, *SILENT)]
    if unknown:
        raise UserError(f"generation_kwargs {', '.join(unknown)} have no effect here; remove them from the task.")
    settings = {name: found[name] for name in SETTINGS if name in found}
    if not found["do_sample"]:
        settings = {"temperature": 0}
    return Sampling(**settings, stop=tuple(text for text in found["until"] if text)), found["max_gen_toks"]


def _before(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
