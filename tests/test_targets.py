"""What README says the shipped configs reach, run as a user runs them: minutes each, so `make test-all` only."""

import pytest

import engrax


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mqar_titans", "mqar_attention"])
def test_mqar_is_learned(config, tmp_path):
    """64 tokens, 4 pairs, vocabulary 128: at least 95 % recalled."""
    engrax.train(config, tmp_path / "run", progress=False)
    results = engrax.evaluate(tmp_path / "run", progress=False)
    assert results.data["validation"]["accuracy"]["value"] >= 0.95


@pytest.mark.slow
def test_quickstart_learns_with_its_memory(tmp_path):
    """Fewer bits per byte than the order-3 n-gram counted on the same bytes; at least 0.05 more without the memory."""
    engrax.train("quickstart", tmp_path / "run", progress=False)
    data = engrax.evaluate(tmp_path / "run", progress=False).data
    order_3 = next(found["value"] for found in data["baselines"]["orders"] if found["order"] == 3)
    assert data["validation"]["bits_per_byte"]["value"] < order_3
    assert all(found["difference"]["value"] >= 0.05 for found in data["ablation"].values()), data["ablation"]
    assert data["ablation"]
