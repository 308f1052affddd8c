"""`engrax bench`: every operation can be timed, and what a row says of it is true of that row."""

import json

import pytest

from engrax import cli
from engrax.pallas_kernels import bench

LOG_DECAY = dict(batch=1, seq=24, heads=2, key=8, value=8, chunk_size=16)
TINY = {
    "linear_attention": dict(LOG_DECAY, gate="channel"),
    "gated_delta_rule": dict(LOG_DECAY, gate="scalar"),
    "neural_memory": dict(LOG_DECAY, hidden=8, depth=2),
    "linear_cross_entropy": dict(batch=1, seq=24, features=8, vocabulary=50),
    "hopfield_retrieval": dict(batch=1, seq=24, patterns=30, heads=2, key=8, value=8, steps=3),
}


@pytest.mark.parametrize("op", bench.OPERATIONS)
def test_a_row_of_every_operation(op):
    case = bench.Case(op, TINY[op])
    (row,) = bench.bench([op], cases=[case], runs=2, implementations=["xla"])
    assert row["sizes"] == TINY[op] and row["implementation"] == "xla"
    for part in ("forward", "forward_backward"):
        assert row[part]["speedup_over_xla"] == 1.0
        assert 0 < row[part]["ms"]["min"] <= row[part]["ms"]["median"] <= row[part]["ms"]["max"]
        assert row[part]["roofline"]["fraction"] > 0 and row[part]["roofline"]["binds"] in ("compute", "memory")
    assert row["forward_backward"]["roofline"]["flops"] > row["forward"]["roofline"]["flops"]
    assert max(row["error"].values()) < 1e-5
    described = bench.describe(json.loads(json.dumps(row)))
    assert op in described and "of the roofline" in described


def test_a_kernel_that_cannot_run_is_a_row_that_says_so():
    case = bench.Case("linear_attention", TINY["linear_attention"])
    (row,) = bench.bench(["linear_attention"], cases=[case], runs=1, implementations=["pallas_tpu"])
    assert "pallas_tpu" in row["unsupported"] and row["unsupported"] in bench.describe(row)


def test_defaults_cover_every_operation():
    for backend in ("cpu", "gpu"):
        for op in bench.OPERATIONS:
            assert bench.default_cases(op, backend), (op, backend)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "default_cases", lambda op, backend: [bench.Case(op, TINY[op])])
    output = tmp_path / "deep" / "bench.json"
    args = ["bench", "linear_attention", "--runs", "1", "--quick", "--output", str(output)]
    assert cli.main(args) == 0
    assert "linear_attention" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["device"]["platform"] == "cpu" and len(written["rows"]) == 1
    assert written["limits"]["source"] == "measured" and written["versions"]["jax"]


def test_mistakes_take_one_line(capsys):
    for args in (["linear_attn"], ["linear_attention", "--implementations", "xlo", "--quick"]):
        assert cli.main(["bench", *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "did you mean" in error, error
