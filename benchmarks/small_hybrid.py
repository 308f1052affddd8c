"""Makes the trained run that comes with engrax, in a checkout: `python benchmarks/small_hybrid.py`.

Trains `configs/small_hybrid.py`, five minutes of one core, and takes out the paths of the machine, which Orbax notes in
the checkpoint. tests/test_sample.py pins the loss of the run; write the new one there.
"""

from pathlib import Path

from etils import epath

import engrax
from engrax.configs import small_hybrid
from engrax.train import integrity

RUN = Path(small_hybrid.__file__).parent / "trained" / "small_hybrid"

if __name__ == "__main__":
    engrax.train("small_hybrid", RUN)
    for checkpoint in (RUN / "checkpoints").iterdir():
        for note in checkpoint.rglob("commit_success.txt"):
            note.write_text("Checkpoint commit was successful.")
        integrity.seal(epath.Path(checkpoint))
