"""Do Titans memories hold out past the length they were trained at? Streams 16,384 bytes through each.

    python benchmarks/titans_length.py --folder runs/length --output benchmarks/results/titans_length.json \
        --plot docs/titans_length.png

The memory alone (LMM) and memory as context (MAC), `configs/titans_lmm.py` and `titans_mac.py`, are trained on rows of
256 bytes: as documents cut into rows; as streams with a memory carried from row to row (`--carry-memory`; no gradient
passes from row to row); and on such streams after the rows, in a second stage. Half of the text is held out, for its
long documents: every validation document of more than 16,384 bytes is read from its beginning, in pieces of 256.

The rule, written beforehand: a memory holds out where the loss of the fourth quarter is at most 0.02 bits per byte
above that of the second, paired by document, at the upper end of its 95 % interval; it does not where the lower end is
above that; else it is inconclusive. Documents differ in how hard their quarters are, so the same is also asked of the
gain over a reset memory: the loss of the same model whose memory is reset before every piece, minus the loss; it may
fall by at most 0.02. Runs that are in the folder already go on, or are taken as they are.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import report_head  # noqa: E402

LENGTH, ALLOWED = 16_384, 0.02  # bytes; bits per byte
HELD_OUT = {"data__validation_fraction": 0.5}
CARRIED = {"carry_memory": True}
RUNS = {  # name -> config, fields, the run it starts from
    "LMM": ("titans_lmm", {}, None),
    "LMM, carried": ("titans_lmm", CARRIED, None),
    "LMM, then carried": ("titans_lmm", CARRIED, "LMM"),
    "MAC": ("titans_mac", {}, None),
    "MAC, carried": ("titans_mac", CARRIED, None),
    "MAC, then carried": ("titans_mac", CARRIED, "MAC"),
}


def train(name: str, folder: Path) -> Path:
    """Trains, or finds, one run, and first the one that it starts from."""
    import engrax

    config, fields, first = RUNS[name]
    run = folder / name.lower().replace(",", "").replace(" ", "_")
    start = {} if first is None else {"start_from": str(train(first, folder))}
    engrax.train(config, run, **HELD_OUT, **fields, **start)
    return run


def measure(name: str, folder: Path) -> dict:
    """Trains, or finds, one run and streams through it."""
    import engrax

    config, fields, first = RUNS[name]
    run = train(name, folder)
    found = engrax.evaluate(run, only=["validation"], stream=LENGTH)
    about = {
        "config": config,
        "fields": HELD_OUT | fields,
        "first": first,
        "step": found.step,
        "bits_per_byte": found.bits_per_byte,
    }
    return about | found.evaluations["stream"]


def rise(gain: dict) -> dict:
    """The drift of a gain as that of a loss."""
    negated = {"value": gain["value"], "low": gain["high"], "high": gain["low"]}
    return {name: None if end is None else -end for name, end in negated.items()}


def verdict(drift: dict) -> str:
    """The rule of this file."""
    if drift["high"] is not None and drift["high"] <= ALLOWED:
        return "holds out"
    return "does not" if drift["low"] is not None and drift["low"] > ALLOWED else "inconclusive"


def plot(rows: dict) -> bytes:
    """Loss by position, a line for each run."""
    from engrax.evals import plots

    lines = [
        {
            "name": name,
            "kind": "muted" if i else "model",
            "bins": [b for b in row["curve"]["curves"][0]["bins"] if b["to"] > 64],
        }
        for i, (name, row) in enumerate(rows.items())
    ]
    axis = next(iter(rows.values()))["curve"]["axis"]
    return plots.curves(
        "Past the training length", (axis, "bits per byte"), lines, log_x=True, marks=[("trained on 256", 256)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/length", help="where the runs go (default: runs/length)")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="which (default: all)")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--plot", help="write the loss by position as PNG to this file")
    args = parser.parse_args()
    rows = {}
    for name in args.runs:
        rows[name] = row = measure(name, Path(args.folder))
        gain = row["gain_over_reset"]
        row["verdict"], gain["verdict"] = verdict(row["drift"]), verdict(rise(gain["drift"]))
        drift, state, time = row["drift"], row["state_bytes"], row["time"]["piece"]
        interval, beside = (f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in (drift, gain["drift"]))
        print(
            f"{name}: {row['verdict']}; drift {interval} bits per byte in {row['documents']} documents, of the "
            f"gain over a reset memory {beside}: {gain['verdict']}; "
            f"state {state['first']:,} and {state['last']:,} bytes, time {time['ratio']:.2f}",
            flush=True,
        )
    args.peer_python, args.seed = None, 0
    if args.output:
        report = report_head("titans_length.py", args) | {"rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        Path(args.plot).write_bytes(plot(rows))


if __name__ == "__main__":
    main()
