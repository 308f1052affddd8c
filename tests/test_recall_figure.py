"""A diagnostic that is a table becomes a heat map in the report."""

from engrax.evals.figures import _recall


def test_a_table_becomes_a_heat_map():
    table = [[0.0, 0.0], [1.0, 0.0]]
    data = {"run": "r", "step": 1, "memory": {"hmt.recall": {"block 0": {"values": table}}}}
    figure = _recall(data)
    assert figure.name == "memory_recall" and figure.png.startswith(b"\x89PNG")
    scalars = {"hmt.entropy": {"block 0": {"median": 1.0}}, "gate": {"block 0": {"values": [0.1, 0.2]}}}
    assert _recall(data | {"memory": scalars}) is None
