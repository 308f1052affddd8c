"""The answers that a model gives to a task in words, and what the task's own rule says of them.

By default a model writes: the prompts of a batch are read through a session, in pieces and with the model's own state,
and the most likely tokens follow. Where a question has choices, the most likely of them is the answer.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from engrax.data.text_task import Example, TextTask
from engrax.evals import scoring
from engrax.models.session import Session

ROWS = 16  # examples that are read side by side


def judged(context, scorer: scoring.Scorer, task: TextTask, usable: Bool[np.ndarray, " N"], tick) -> tuple:
    """(hits, trials), each [N, 1], of the first N validation examples. Of rows that are not `usable`, because the
    model's outputs are no numbers there, nothing is asked, and their answers are wrong.

    `tick(1)` is called `calls(task, N)` times.
    """
    examples = [task.example("validation", i) for i in range(len(usable))]
    hits, trials = np.zeros((2, len(examples)), int)
    for first in range(0, len(examples), ROWS):
        batch = range(first, min(first + ROWS, len(examples)))
        asked = [i for i in batch if usable[i]]
        answers = _answers(context, scorer, task, [examples[i] for i in asked]) if asked else []
        found = dict(zip(asked, answers))
        for i in batch:
            hits[i], trials[i] = score(task, examples[i], found.get(i, [""] * len(examples[i].turns)))
        tick(1)
    return hits[:, None], trials[:, None]


def score(task: TextTask, example: Example, answers: list[str]) -> tuple[int, int]:
    """(hits, trials) of the answers to an example's questions."""
    return tuple(map(sum, zip(*(task.score(a, example, turn) for a, turn in zip(answers, example.turns)))))


def calls(task: TextTask, examples: int) -> int:
    """Batches of `judged`."""
    return -(-examples // ROWS)


def of_oracle(task: TextTask, examples: int) -> Int[np.ndarray, "N 1"]:
    """Hits of the oracle on the first validation examples."""
    found = []
    for i in range(examples):
        example = task.example("validation", i)
        texts, before = [], example.context
        for turn in example.turns:
            texts.append(task.oracle(before + turn.question))
            before += turn.question + turn.answer if task.shared == "turns" else ""
        found.append(score(task, example, texts)[0])
    return np.array(found)[:, None]


def _answers(context, scorer: scoring.Scorer, task: TextTask, examples: list[Example]) -> list[list[str]]:
    """The answers to all questions of examples with equally many."""
    if examples[0].turns[0].choices:
        return _most_likely(scorer, task, examples)
    session = Session(
        context.model, tokenizer=task.tokenizer, rows=ROWS, dtype=scorer.dtype, name=f"step {context.step}"
    )
    filled = examples + examples[-1:] * (ROWS - len(examples))  # one shape for all batches
    if len(examples[0].turns) == 1:
        session.feed([example.pieces[0] for example in filled])
        written = [_write(session, task, filled)]
    else:
        written = _write_turns(session, task, filled)
    return [list(texts) for texts in zip(*written)][: len(examples)]


def _write_turns(session: Session, task: TextTask, examples: list[Example]) -> list[list[str]]:
    """What is written for every question; the context is read once. Where a question stands behind those before it,
    these have their right answers."""
    session.feed([example.context for example in examples])
    written = []
    for number in range(len(examples[0].turns)):
        turns = [example.turns[number] for example in examples]
        asked = session.branch(1).feed([turn.question for turn in turns])
        written.append(_write(asked, task, examples))
        if task.shared == "turns" and number + 1 < len(examples[0].turns):
            session.feed([turn.question for turn in turns]).feed([turn.answer for turn in turns])
    return written


def _write(session: Session, task: TextTask, examples: list[Example]) -> list[str]:
    return session.generate(max(map(task.writes, examples)), temperature=0)


def _most_likely(scorer: scoring.Scorer, task: TextTask, examples: list[Example]) -> list[list[str]]:
    """Every example's choice with the highest likelihood after the prompt."""
    encode, choices = task.tokenizer.encode, examples[0].turns[0].choices
    tokens = np.zeros((len(examples) * len(choices), task.seq_len), np.int32)
    targets = np.full(tokens.shape, -1, np.int32)
    asked = [(example.pieces[0], choice) for example in examples for choice in example.turns[0].choices]
    for row, labels, (prompt, choice) in zip(tokens, targets, asked):
        before, answer = encode(prompt), encode(choice)
        row[: len(before)], row[len(before) : len(before) + len(answer)] = before, answer
        labels[len(before) - 1 : len(before) - 1 + len(answer)] = answer
    best = np.argmin(_nats(scorer, tokens, targets).reshape(len(examples), -1), axis=1)
    return [[example.turns[0].choices[i]] for example, i in zip(examples, best)]


def _nats(
    scorer: scoring.Scorer, tokens: Int[np.ndarray, "N T"], targets: Int[np.ndarray, "N T"]
) -> Float[np.ndarray, " N"]:
    """Every row's negative log-likelihood of its labels."""
    missing = -len(tokens) % scorer.rows  # batches of one shape
    fill = ((0, missing), (0, 0))
    ids = np.pad(np.zeros_like(tokens), fill, constant_values=-1)
    padded = np.pad(tokens, fill), np.pad(targets, fill, constant_values=-1), ids
    rows = scoring.Rows(*padded, target_bytes=None, complete=False)
    return scorer.score(rows).nats[: len(tokens)].sum(axis=1)
