"""What is HMT's memory worth on long books? Against RMT, and against the backbone with a window as long as a segment.

    python benchmarks/hmt_books.py --books BOOKS --folder runs/books --output benchmarks/results/hmt_books.json \
        --plot docs/hmt_books.png --recall docs/hmt_books_recall.png

BOOKS is a folder of long texts (.txt). They are cut at ends of lines into documents of about 32 KiB, a Project
Gutenberg header and licence and the tail left out; a tenth of the bytes is held out, passages of the books that are
trained on. The models are `configs/hmt_books.py`, `hmt_books_rmt.py` and `hmt_books_window.py`: the same backbone, rows
and steps, three learning rates each, the best with three seeds. Every judged run then reads the first 16,384 bytes of
up to 16 held-out documents.

The rules, written beforehand. A claim is reproduced where the 95 % interval of the difference in bits per byte leaves
out 0 on the right side (`engrax.evals.verdicts`: bootstrap over seeds and documents), asked of all the bytes read and
of those past the first row's length. Where two documents take turns by segments, the question to the memory is asked
with the end of the segment before, which is the other document's: a recall by content gives the memories of that
document, of odd ages, more weight than their neighbours, of even ones. It is periodic where the mean excess over the
two neighbours, ages 3, 5, ..., has an interval (Student's t over the seeds) above 0.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
from hmt_interleaved import by_age  # noqa: E402
from neural_memory import report_head  # noqa: E402

DOCUMENT, LENGTH = 32_768, 16_384  # bytes of a document, and those of it that are read
CONFIGS = {"window": "hmt_books_window", "RMT": "hmt_books_rmt", "HMT": "hmt_books"}
PAPER = "arXiv 2405.06067, from secondary sources"
CLAIMS = {  # (better, worse) -> what is published
    ("HMT", "window"): f"{PAPER}: 25.5 % and 17.6 % lower perplexity on Wikitext-103 (OPT, OpenLlamaV2)",
    ("HMT", "RMT"): f"{PAPER}: 13.0 % and 10.8 % lower perplexity than RMT (OPT, OpenLlamaV2)",
}


def cut(books: Path, folder: Path) -> int:
    """Writes the books' documents into `folder`; returns how many."""
    found: dict[str, bytes] = {}
    for book in sorted(books.glob("*.txt")):
        text = book.read_bytes().replace(b"\r\n", b"\n")
        start, end = text.find(b"*** START OF"), text.find(b"*** END OF")
        text = text[text.find(b"\n", start) + 1 if start >= 0 else 0 : end if end >= 0 else len(text)]
        while len(text) > DOCUMENT:
            at = text.rfind(b"\n", 0, DOCUMENT) + 1 or DOCUMENT
            found[f"{book.stem}_{len(found):04d}.txt"], text = text[:at], text[at:]
    if not found:
        raise SystemExit(f"--books {books}: no .txt file of more than {DOCUMENT} bytes.")
    folder.mkdir(parents=True, exist_ok=True)
    others = {file.name for file in folder.iterdir()} - set(found)
    if others:
        raise SystemExit(f"{folder} holds documents of other books ({min(others)}, ...); choose another --folder.")
    for name, text in found.items():
        (folder / name).write_bytes(text)
    return len(found)


def make_comparison(documents: Path):
    """The three experiments on these documents."""
    from engrax.evals import Claim, Comparison
    from engrax.train import CheckpointConfig

    experiments = {}
    for name, config in CONFIGS.items():
        experiment = importlib.import_module(f"engrax.configs.{config}").config()
        data = dataclasses.replace(experiment.data, path=str(documents), validation_fraction=0.1)
        last = CheckpointConfig(every=0, keep_last=1, keep_best=0)
        experiments[name] = dataclasses.replace(experiment, data=data, checkpoint=last)
    claims = tuple(Claim(*names, source) for names, source in CLAIMS.items())
    return Comparison(experiments, learning_rates=(1e-3, 2e-3, 4e-3), claims=claims)


def read(run: Path, length: int) -> np.ndarray:
    """Bits of every byte of the held-out documents [N, length], read in pieces through the memory of one run."""
    from engrax.evals.streaming import PIECE, Stream, long_documents
    from engrax.train import runs

    opened = runs.open_run(run)
    documents = long_documents(opened.experiment, length).tokens
    reader = Stream(opened.experiment, opened.load()[0])
    memory, nats = reader.start(reader.params, len(documents)), []
    for at in range(0, length, PIECE):
        found, memory = reader(documents[:, at : at + PIECE], documents[:, at + 1 : at + PIECE + 1], memory)
        nats.append(np.asarray(found))
    bits = np.concatenate(nats, axis=1) / np.log(2)
    if not np.isfinite(bits).all():
        raise SystemExit(f"{run}: a loss is not a number.")
    return bits


def recall(run: Path, segments: int = 40) -> np.ndarray:
    """The weight of each past segment [segments, segments] where two held-out documents take turns; the pairs' mean."""
    import jax
    from flax import nnx

    from engrax.evals.streaming import long_documents
    from engrax.train import runs

    opened = runs.open_run(run)
    size = opened.experiment.model.segment_length
    texts = long_documents(opened.experiment, LENGTH).tokens
    if len(texts) < 2:
        raise SystemExit("the probe needs two held-out documents; give longer books.")
    texts = texts[: len(texts) // 2 * 2, : segments // 2 * size].reshape(-1, 2, segments // 2, size)
    turns = texts.swapaxes(1, 2).reshape(len(texts), segments * size)
    graphdef, params = nnx.split(opened.load()[0], nnx.Param)
    found = jax.jit(lambda p: nnx.merge(graphdef, p)(turns, collect=("hmt",)).collected)(params)
    return np.asarray(found["hmt.recall"])[0]


def judge(comparison, rows, bits: dict[str, np.ndarray], beyond: int) -> dict[str, list]:
    """The verdicts on the claims for the bytes from `beyond` on; bits: name -> [seeds, N, length]."""
    from engrax.evals import verdicts
    from engrax.evals.trials import Score

    read_rows = []
    for row in rows:
        part = bits[row.name][..., beyond:]
        counts = np.full(part.shape[1], part.shape[2], float)
        scores = tuple(Score(sums=x, counts=counts) for x in part.sum(axis=2))
        read_rows.append(dataclasses.replace(row, scores=scores))
    return verdicts.to_dict(*verdicts.judge(comparison, read_rows))


def excess_at_odd_ages(weights: list[float]) -> float:
    """How much more weight ages 3, 5, ... have than the mean of the ages before and after; weights: of age 1, 2, ..."""
    return float(np.mean([weights[i] - (weights[i - 1] + weights[i + 1]) / 2 for i in range(2, len(weights) - 1, 2)]))


def curves(bits: dict[str, np.ndarray]) -> dict[str, list]:
    """The loss by position, the mean of the seeds; a row is a document."""
    from engrax.evals import statistics as stats

    found = {}
    for name, values in bits.items():
        mean = values.mean(axis=0)
        positions = np.broadcast_to(np.arange(mean.shape[1]), mean.shape)
        found[name] = stats.by_position(mean, np.ones(mean.shape), positions, stats.log_bins(mean.shape[1]))
    return found


def measure(args) -> tuple[dict, list[np.ndarray]]:
    """Trains and reads; returns what goes into the JSON file, and the weights of the recall, one table a seed."""
    from engrax.evals import comparison as comparisons
    from engrax.evals import statistics as stats

    documents = args.folder / "documents"
    count = cut(args.books, documents)
    comparison = make_comparison(documents)
    rows = comparisons.run(comparison, args.folder)
    for row in rows:
        if any(score.sums is None for score in row.scores):
            raise SystemExit(f"{row.name} diverged with a judged seed; give lower learning rates.")
    runs = {
        row.name: [args.folder / row.name / f"lr_{row.learning_rate:g}_seed_{seed}" for seed in (1, 2, 3)]
        for row in rows
    }
    bits = {name: np.stack([read(run, LENGTH) for run in found]) for name, found in runs.items()}
    recalls = [recall(run) for run in runs["HMT"]]
    ages = [by_age(weights) for weights in recalls]
    excess = stats.mean_of_few(np.array([excess_at_odd_ages(a) for a in ages])).to_dict()
    row_length = comparison.experiments["HMT"].data.seq_len
    report = {
        "books": [book.name for book in sorted(args.books.glob("*.txt"))],
        "documents": {"all": count, "held_out_and_read": bits["HMT"].shape[1]},
        "row_length": row_length,
        "read": judge(comparison, rows, bits, 0),
        "past_the_first_row": judge(comparison, rows, bits, row_length),
        "grid": {row.name: row.grid for row in rows},
        "seconds": {row.name: [score.seconds for score in row.scores] for row in rows},
        "curves": curves(bits),
        "recall_by_age": ages,
        "excess_at_odd_ages": excess,
        "periodic": excess["low"] > 0,
    }
    return report, recalls


def show(report: dict) -> None:
    """Prints the scores and the verdicts."""
    for part in ("read", "past_the_first_row"):
        for line in report[part]["lines"]:
            print(f"{part}: {line['name']} {line['score']} (learning rate {line['learning_rate']:g})")
        for claim in report[part]["claims"]:
            pair = f"{claim['claim']['better']} - {claim['claim']['worse']}"
            print(f"{part}: {pair} {claim['difference']}: {claim['verdict']}")
    print("excess of the weight at odd ages", report["excess_at_odd_ages"])


def plot_losses(report: dict) -> bytes:
    """Loss by position, HMT's with its band."""
    from engrax.configs.hmt_books import SEGMENT
    from engrax.evals import plots

    lines = [
        {"name": name, "kind": "muted" if i else "model", "bins": [b for b in bins if b["to"] > 64]}
        for i, (name, bins) in enumerate(reversed(report["curves"].items()))
    ]
    axes = ("position in the document, bytes", "bits per byte")
    marks = [("a segment", SEGMENT), ("a row", report["row_length"])]
    return plots.curves("Books, read past a row", axes, lines, log_x=True, marks=marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, type=Path, help="a folder of long texts (.txt)")
    parser.add_argument("--folder", default="runs/books", type=Path, help="where the runs go (default: runs/books)")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--plot", help="write the loss by position as PNG to this file")
    parser.add_argument("--recall", help="write the weight of the recall as PNG to this file")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None, seed=[0, 1, 2, 3], runs=3))

    from engrax.evals import plots

    report, recalls = measure(args)
    report = report_head("hmt_books.py", args) | report
    report["command"] = " ".join("BOOKS" if w == str(args.books) else w for w in report["command"].split())
    show(report)
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        Path(args.plot).write_bytes(plot_losses(report))
    if args.recall:
        panels = {f"seed {n}": weights for n, weights in enumerate(recalls, 1)}
        labels = ("recalled segment", "segment that begins")
        Path(args.recall).write_bytes(plots.heat_maps("Two documents in turns: the recall", *labels, panels))


if __name__ == "__main__":
    main()
