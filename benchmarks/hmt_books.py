"""What is HMT's memory worth on long books? Against RMT, and against the backbone with a window as long as a segment.

    python benchmarks/hmt_books.py --books BOOKS --folder runs/books --output benchmarks/results/hmt_books.json \
        --plot docs/hmt_books.png --recall docs/hmt_books_recall.png

BOOKS is a folder of long texts (.txt). They are cut at ends of lines into documents of about 32 KiB, a Project
Gutenberg header and licence left out; a tenth of the bytes is held out, passages of the books that are trained on. The
models are `configs/hmt_books.py`, `hmt_books_rmt.py` and `hmt_books_window.py`: the same backbone, rows and steps,
three learning rates each, the best with three seeds. Every judged run then reads the first 16,384 bytes of every
held-out document.

The rules, written beforehand. A claim is reproduced where the 95 % interval of the difference in bits per byte leaves
out 0 on the right side (`engrax.evals.verdicts`: bootstrap over seeds and documents), asked of all the bytes read and
of those past the first row's length. Memory is recalled periodically where two documents that take turns by segments
give, in all judged seeds, memories of even ages (of the same document) more weight than those of odd ones.
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
    written = 0
    for book in sorted(books.glob("*.txt")):
        text = book.read_bytes().replace(b"\r\n", b"\n")
        start, end = text.find(b"*** START OF"), text.find(b"*** END OF")
        text = text[text.find(b"\n", start) + 1 if start >= 0 else 0 : end if end >= 0 else len(text)]
        while len(text) > DOCUMENT:
            at = text.rfind(b"\n", 0, DOCUMENT) + 1 or DOCUMENT
            (folder / f"{book.stem}_{written:04d}.txt").write_bytes(text[:at])
            text, written = text[at:], written + 1
    if not written:
        raise SystemExit(f"--books {books}: no .txt file of more than {DOCUMENT} bytes.")
    return written


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
    documents = long_documents(opened.experiment, length)
    reader = Stream(opened.experiment, opened.load()[0])
    memory, nats = reader.start(reader.params, len(documents)), []
    for at in range(0, length, PIECE):
        found, memory = reader(documents[:, at : at + PIECE], documents[:, at + 1 : at + PIECE + 1], memory)
        nats.append(np.asarray(found))
    return np.concatenate(nats, axis=1) / np.log(2)


def recall(run: Path, segments: int = 40) -> np.ndarray:
    """The weight of each past segment [segments, segments] where two held-out documents take turns; the pairs' mean."""
    import jax
    from flax import nnx

    from engrax.evals.streaming import long_documents
    from engrax.train import runs

    opened = runs.open_run(run)
    size = opened.experiment.model.segment_length
    texts = long_documents(opened.experiment, LENGTH)
    texts = texts[: len(texts) // 2 * 2, : segments // 2 * size].reshape(-1, 2, segments // 2, size)
    turns = texts.swapaxes(1, 2).reshape(len(texts), segments * size)
    graphdef, params = nnx.split(opened.load()[0], nnx.Param)
    found = jax.jit(lambda p: nnx.merge(graphdef, p).report(turns)["hmt.recall"])(params)
    return np.asarray(found)[0]


def judge(comparison, rows, bits: dict[str, np.ndarray], beyond: int) -> list[dict]:
    """The verdicts on the claims for the bytes from `beyond` on; bits: name -> [seeds, N, length]."""
    from engrax.evals import verdicts
    from engrax.evals.comparison import Score

    read_rows = []
    for row in rows:
        part = bits[row.name][..., beyond:]
        counts = np.full(part.shape[1], part.shape[2], float)
        scores = tuple(Score(sums=x, counts=counts) for x in part.sum(axis=2))
        read_rows.append(dataclasses.replace(row, scores=scores))
    return verdicts.to_dict(*verdicts.judge(comparison, read_rows))


def curves(bits: dict[str, np.ndarray]) -> dict[str, list]:
    """The loss by position, the mean of the seeds; a row is a document."""
    from engrax.evals import statistics as stats

    found = {}
    for name, values in bits.items():
        mean = values.mean(axis=0)
        positions = np.broadcast_to(np.arange(mean.shape[1]), mean.shape)
        found[name] = stats.by_position(mean, np.ones(mean.shape), positions, stats.log_bins(mean.shape[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, type=Path, help="a folder of long texts (.txt)")
    parser.add_argument("--folder", default="runs/books", type=Path, help="where the runs go (default: runs/books)")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--plot", help="write the loss by position as PNG to this file")
    parser.add_argument("--recall", help="write the weight of the recall as PNG to this file")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None, seed=0, runs=3))

    from engrax.evals import comparison as comparisons
    from engrax.evals import plots

    documents = args.folder / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    comparison = make_comparison(documents)
    count = cut(args.books, documents)
    rows = comparisons.run(comparison, args.folder)
    runs = {
        row.name: [args.folder / row.name / f"lr_{row.learning_rate:g}_seed_{seed}" for seed in (1, 2, 3)]
        for row in rows
    }
    bits = {name: np.stack([read(run, LENGTH) for run in found]) for name, found in runs.items()}
    row_length = comparison.experiments["HMT"].data.seq_len
    recalls = [recall(run) for run in runs["HMT"]]
    ages = [by_age(weights) for weights in recalls]
    report = report_head("hmt_books.py", args) | {
        "books": [book.name for book in sorted(args.books.glob("*.txt"))],
        "documents": {"all": count, "held_out_and_read": bits["HMT"].shape[1]},
        "read": judge(comparison, rows, bits, 0),
        "past_the_first_row": judge(comparison, rows, bits, row_length),
        "grid": {row.name: row.grid for row in rows},
        "seconds": {row.name: [score.seconds for score in row.scores] for row in rows},
        "curves": curves(bits),
        "recall_by_age": ages,
    }
    report["command"] = report["command"].replace(str(args.books), "BOOKS")
    report["periodic"] = all(np.mean(a[1::2]) > np.mean(a[0::2]) for a in ages)
    for part in ("read", "past_the_first_row"):
        for line in report[part]["lines"]:
            print(f"{part}: {line['name']} {line['score']} (learning rate {line['learning_rate']:g})")
        for claim in report[part]["claims"]:
            pair = f"{claim['claim']['better']} - {claim['claim']['worse']}"
            print(f"{part}: {pair} {claim['difference']}: {claim['verdict']}")
    print("even, odd ages:", [(round(np.mean(a[1::2]), 5), round(np.mean(a[0::2]), 5)) for a in ages])
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        lines = [
            {"name": name, "kind": "muted" if i else "model", "bins": [b for b in bins if b["to"] > 64]}
            for i, (name, bins) in enumerate(report["curves"].items())
        ]
        axes = ("position in the document, bytes", "bits per byte")
        marks = [("a segment", 128), ("a row", row_length)]
        Path(args.plot).write_bytes(plots.curves("Books, read past a row", axes, lines, log_x=True, marks=marks))
    if args.recall:
        panels = {f"seed {n}": weights for n, weights in enumerate(recalls, 1)}
        labels = ("recalled segment", "segment that begins")
        Path(args.recall).write_bytes(plots.heat_maps("Two documents in turns: the recall", *labels, panels))


if __name__ == "__main__":
    main()
