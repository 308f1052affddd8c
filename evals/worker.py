"""A process of a sweep, which trains and scores trials one after the other. `engrax.evals.processes` starts it.

stdin: a line of JSON per trial; its end says that the sweep has ended, and the process stops after a training's step.
stdout: a line of JSON per trial, {"error": null} or the sentence of a user's mistake; the score is in the run folder.
What libraries print goes to stderr.
"""

import importlib
import importlib.util
import json
import os
import queue
import signal
import sys
import threading

from etils import epath

from engrax import plugins
from engrax.errors import UserError
from engrax.evals import trials
from engrax.train import experiment as experiments


def main() -> None:
    """Runs trials until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the sweep says what follows
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    while line := tasks.get():
        error = _run(json.loads(line))
        print(json.dumps({"error": error}), file=answers, flush=True)


def _listen(tasks: "queue.SimpleQueue[bytes]") -> None:
    for line in sys.stdin.buffer:
        tasks.put(line)
    tasks.put(b"")
    os.kill(os.getpid(), signal.SIGTERM)  # a training stops after its step and saves; else the process ends here


def _run(task: dict) -> str | None:
    """Trains and scores one trial; returns the sentence of a user's mistake."""
    try:
        for name, file in task["modules"].items():
            _load(name, file)
        trials.score(experiments.from_dict(task["experiment"]), epath.Path(task["directory"]))
    except (UserError, OSError) as error:
        return " ".join(str(error).split())
    except KeyboardInterrupt as stop:
        return str(stop) or "stopped by Ctrl-C."
    return None


def _load(name: str, file: str) -> None:
    """Runs a module of the user's, which registers configs: by its name if that finds this file, else as a plugin."""
    if getattr(sys.modules.get(name), "__file__", None) == file:
        return
    spec = importlib.util.find_spec(name.partition(".")[0]) and importlib.util.find_spec(name)
    if spec is not None and spec.origin == file:
        importlib.import_module(name)
    else:
        plugins.load(file)


if __name__ == "__main__":
    main()
