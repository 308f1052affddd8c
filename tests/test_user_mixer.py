"""A memory of the user's own: one file outside the package, and everything includes it."""

import textwrap

import pytest

MIXER = '''
"""A running mean of the segment so far."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import engrax
from engrax.layers.common.modules import projection


@engrax.register("running_mean")
@dataclasses.dataclass(frozen=True)
class RunningMeanConfig(engrax.MixerConfig):
    """y_t = mean(x_1 W, ..., x_t W) V."""

    width: int = 4  # channels of the mean

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return RunningMean(self, dim, rngs=rngs)

    @classmethod
    def examples(cls):
        return (cls(width=3),)

    def flops_per_token(self, dim, seq_len):
        return 4 * dim * self.width


class RunningMean(nnx.Module):
    def __init__(self, config, dim, *, rngs):
        self.width = config.width
        self.write = projection(dim, config.width, ("embed", "heads"), rngs=rngs)
        self.read = projection(config.width, dim, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch_size):
        dtype = jnp.promote_types(self.write.kernel.dtype, jnp.float32)
        total = jnp.zeros((batch_size, self.width), dtype)
        return {"total": total, "count": jnp.zeros(batch_size, dtype), "last": jnp.full(batch_size, -1, jnp.int32)}

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(len(x)) if state is None else state
        same_segment = jnp.broadcast_to(jnp.maximum(state["last"], 0)[:, None], x.shape[:2])
        ids = same_segment if segment_ids is None else segment_ids

        def token(carry, inputs):
            x_t, id_t = inputs
            real = id_t >= 0
            keep = ~(real & (carry["last"] >= 0) & (id_t != carry["last"]))
            total = carry["total"] * keep[:, None] + jnp.where(real[:, None], x_t, 0)
            count = carry["count"] * keep + real
            y = jnp.where(real[:, None], total / jnp.maximum(count, 1)[:, None], 0)
            return {"total": total, "count": count, "last": jnp.where(real, id_t, carry["last"])}, y

        state, y = jax.lax.scan(token, state, (jnp.moveaxis(self.write(x), 1, 0), ids.T))
        return self.read(jnp.moveaxis(y, 0, 1).astype(x.dtype)), state
'''

CONFIG = '''
"""The running mean on MQAR."""

from my_mixer import RunningMeanConfig

from engrax.data import MQAR
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CosineConfig, EvalConfig, Experiment


def config():
    return Experiment(
        model=LanguageModelConfig(vocab_size=32, dim=8, mixers=(RunningMeanConfig(),), repeat=1, mlp_hidden=16),
        data=MQAR(seq_len=16, num_pairs=2, vocab_size=32, train_examples=64, validation_examples=16),
        steps=9,
        batch_size=4,
        optimizer=AdamWConfig(schedule=CosineConfig(warmup_steps=1)),
        eval=EvalConfig(every=0),
    )
'''

EVALUATE = """
import sys
from engrax import cli
run, plugin = sys.argv[1:]
print("exit code", cli.main(["evaluate", run, "--batches", "1"]))
print("exit code", cli.main(["evaluate", run, "--batches", "1", "--plugin", plugin]))
"""


@pytest.mark.deep
def test_a_mixer_in_a_file_of_the_users_own(tmp_path, run_python):
    folder, run = tmp_path / "mine", tmp_path / "runs" / "mean"
    folder.mkdir()
    (folder / "my_mixer.py").write_text(textwrap.dedent(MIXER))
    (folder / "my_config.py").write_text(textwrap.dedent(CONFIG))

    # Given a config file that uses the mixer, training finds it by the path and keeps its source.
    command = "import sys; from engrax import cli; sys.exit(cli.main(sys.argv[1:]))"
    out = run_python(command, devices=1, args=["train", folder / "my_config.py", "--run-dir", run, "--steps", "2"])
    assert "finished step 2" in out
    assert (run / "source" / "my_mixer.py").read_text() == (folder / "my_mixer.py").read_text()
    assert (run / "source" / "my_config.py").read_text() == (folder / "my_config.py").read_text()

    # When the run is evaluated, foreign code runs only where it is named.
    out = run_python(EVALUATE, devices=1, args=[run, run / "source" / "my_mixer.py"])
    codes = [line.split()[-1] for line in out.splitlines() if line.startswith("exit code")]
    assert codes == ["2", "0"], run_python.last.stderr
    complaints = [line for line in run_python.last.stderr.splitlines() if line.startswith("engrax:")]
    assert len(complaints) == 1 and "running_mean" in complaints[0] and "--plugin" in complaints[0], complaints
    assert "Traceback" not in run_python.last.stderr
    assert list(run.glob("evals/**/report.html"))

    # And the run folder alone is enough to continue: its source, named, is the mixer.
    out = run_python(command, devices=1, args=["train", run, "--plugin", run / "source" / "my_mixer.py"])
    assert "finished step 2" in out


COMPARISON = """

def comparison():
    from engrax.evals import Comparison

    wide = dataclasses.replace(config().model, mixers=(RunningMeanConfig(width=8),))
    experiments = {"narrow": config(), "wide": dataclasses.replace(config(), model=wide)}
    return Comparison(experiments, (1e-3, 1e-2, 3e-2), seeds=1)
"""


@pytest.mark.deep
def test_processes_find_a_mixer_in_a_file_of_the_users_own(tmp_path, run_python):
    """When trials run in two processes, then these load the file of the mixer, imported, in the config or a plugin."""
    (tmp_path / "my_mixer.py").write_text(MIXER)
    (tmp_path / "my_config.py").write_text(CONFIG)
    one_file = MIXER + CONFIG.replace("from my_mixer import RunningMeanConfig", "")
    (tmp_path / "my_pair.py").write_text(one_file.replace("running_mean", "running_pair") + COMPARISON)
    command = "import sys; from engrax import cli; sys.exit(cli.main(sys.argv[1:]))"
    two = ["--processes", "2", "--steps", "2"]
    grid = ["--grid", "optimizer.learning-rate=0.001,0.01", *two]

    out = run_python(command, devices=1, args=["sweep", tmp_path / "my_config.py", *grid, "--folder", tmp_path / "s"])
    assert out.count("1 of 1") == 2
    out = run_python(command, devices=1, args=["compare", tmp_path / "my_pair.py", *two, "--folder", tmp_path / "c"])
    assert "| narrow |" in out and "| wide |" in out

    # A run that brought its mixer is swept and compared with that file named, as the error says.
    run = tmp_path / "s" / "learning_rate=0.01" / "seed_0"
    plugin = ["--plugin", run / "source" / "my_mixer.py"]
    out = run_python(command, devices=1, args=["sweep", run, *grid, *plugin, "--folder", tmp_path / "again"])
    assert out.count("1 of 1") == 2 and "--plugin" in out.split("Train it again:")[1].splitlines()[0]
    out = run_python(
        command, devices=1, args=["compare", run, tmp_path / "s" / "learning_rate=0.001" / "seed_0", *plugin]
    )
    assert "2 finished runs" in out


@pytest.mark.deep
def test_a_users_mixer_is_checked(tmp_path, run_python):
    (tmp_path / "my_mixer.py").write_text(textwrap.dedent(MIXER))
    command = "import sys; from engrax import cli; sys.exit(cli.main(sys.argv[1:]))"
    out = run_python(command, devices=1, args=["check", tmp_path / "my_mixer.py"])
    assert out.strip() == f"{tmp_path / 'my_mixer.py'}: all laws hold"
    assert "running_mean: packing.slow_decay" in run_python.last.stderr
