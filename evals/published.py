"""A run as a folder that others load: the model in a published format, its tokenizer, and a model card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from engrax.data.published_tokenizer import describe
from engrax.errors import UserError
from engrax.files import expect, read_json
from engrax.models import imported
from engrax.models.imported import publish
from engrax.models.imported.publish import NO_EXTRAS, Extras
from engrax.models.model import ModelConfig
from engrax.models.published import Format
from engrax.train import experiment as experiments
from engrax.train.runs import Run

LOAD = {
    "transformers": 'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    "fla": 'import fla  # registers the class\n\nmodel = AutoModelForCausalLM.from_pretrained("FOLDER")',
}


def publish_run(run: Run, folder: Any, to: str, *, step: int | str | None = None, dtype: str = "float32") -> list[str]:
    """Writes a checkpoint of a run in a format (`engrax.export`); returns what is left out or written in another way.

    Raises UserError, before any parameter is read, for an unknown format, and for a model that it cannot express.
    """
    if dtype not in publish.DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(publish.DTYPES)}.")
    form, notes, path = publish.find(to), [], ()
    if form is not None:
        config, path = imported.find_backbone(run.experiment.model)
        notes = publish.check_fit(config, form)
        if path:
            notes.append(f"{run.experiment.model.registered_name}'s own parts are left out: its backbone is written")
    (files, ids), tokenizer = NO_EXTRAS, run.experiment.data.tokenizer
    if tokenizer is None:
        notes.append("the data is made of ids, so there is no tokenizer")
    else:
        files, ids = describe(tokenizer, None)
    model, number = run.load(step)
    for part in path:
        model = getattr(model, part)
    extras = Extras(files | {"README.md": card(run, number, form, model, notes)}, ids)
    if form is None:
        publish.write_own(model, folder, experiments.to_dict(run.experiment.model), extras, dtype)
    else:
        publish.publish(model, folder, form, extras, dtype)
    return notes


def load(folder: Any, dtype: Any = None) -> nnx.Module:
    """The model of a folder in a published format, engrax's own included. Raises UserError if the folder is damaged."""
    dtype = jnp.float32 if dtype is None else jnp.dtype(dtype)
    path = Path(folder) / "config.json"
    fields = read_json(path, "give the folder of a checkpoint")
    if fields.get("model_type") != publish.OWN_TYPE:
        return imported.load(folder, dtype=dtype)
    settings = expect(fields.get("model"), dict, f"{path}: model")
    return publish.read_own(folder, experiments.from_dict(settings, ModelConfig, f"{path}: model"), dtype)


def card(run: Run, step: int, form: Format | None, model: nnx.Module, notes: list[str]) -> str:
    """The model card, README.md: what the model is, its numbers, how to load it."""
    import jax

    experiment = run.experiment
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    name, trained = run.directory.name, step * experiment.batch_size * experiment.data.seq_len
    lines = ["---", "tags:", "- engrax", *(["library_name: transformers"] if form else []), "---", "", f"# {name}", ""]
    mixers = ", ".join(dict.fromkeys(_mixers(experiment.model)))
    lines += [f"A language model with {count:,} parameters ({mixers}), trained with engrax.", ""]
    rows = [
        ("format", form.name if form else "engrax's own names of tensors"),
        ("step", f"{step:,}"),
        ("tokens of training rows", f"{trained:,}"),
        ("data", experiment.data.registered_name),
        ("data digest", run.environment.get("data_digest")),
        ("commit", run.environment.get("commit")),
        ("engrax", (run.environment.get("versions") or {}).get("engrax")),
        *_numbers(run, step),
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value), ""]
    lines += [f"- Note: {note}." for note in notes] + ([""] if notes else [])
    lines += ["```python", *_code(form), "```", ""]
    return "\n".join(lines)


def _mixers(config: Any) -> list[str]:
    """The names of a model's mixers, also inside a wrapping model."""
    while not hasattr(config, "mixers"):
        if not hasattr(config, "backbone"):
            return [config.registered_name]
        config = config.backbone
    return [mixer.registered_name for mixer in config.mixers]


def _code(form: Format | None) -> list[str]:
    """The lines that load the model."""
    if form is None:
        return ["import engrax", "", 'model = engrax.load_published("FOLDER")']
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    return [*lines, "", *LOAD[form.library].split("\n"), 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")']


def _numbers(run: Run, step: int) -> Iterator[tuple[str, str]]:
    """The estimates of the newest evaluation of a step, with their intervals."""
    found = [read_json(file) for file in (run.directory / "evals").glob(f"step_{step}*/results.json")]
    found = [results for results in found if results.get("step") == step]
    if not found:
        return
    results = max(found, key=lambda results: str(results.get("date")))
    for evaluator, values in results.get("evaluations", {}).items():
        for name, value in values.items():
            if (
                name != "score"
                and isinstance(value, dict)
                and {"value", "low", "high"} <= set(value)
                and value["value"] is not None
            ):
                interval = "" if value["low"] is None else f" (95 % interval {value['low']:.4f} to {value['high']:.4f})"
                yield f"{evaluator}: {name.replace('_', ' ')}", f"{value['value']:.4f}{interval}"


def fits(config: Any) -> list[tuple[str, str]]:
    """(format, "fits" or what would have to differ) of the formats that have the config's mixers, and engrax's own."""
    from engrax.models.published import FORMATS, fit

    rows = []
    try:
        config, path = imported.find_backbone(config)
    except UserError:
        return [(publish.OWN, "fits")]
    kinds = {type(mixer) for mixer in config.mixers}
    for form in FORMATS.values():
        if kinds <= set(form.mixers) and not (form.library == "fla" and form.mixers[0] not in kinds):
            found = fit(config, form)
            rows.append((form.name, "; ".join(found.misfits) or "fits" + (", backbone only" if path else "")))
    return [*sorted(rows, key=lambda row: not row[1].startswith("fits")), (publish.OWN, "fits")]


def format_fits(rows: list[tuple[str, str]]) -> str:
    """The rows as lines for a terminal."""
    return "\n".join(f"{'export --to ' + name:<29} {text}" for name, text in rows)
