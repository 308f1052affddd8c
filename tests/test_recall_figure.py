"""A diagnostic that is a table becomes a heat map in the report."""

from engrax.evals.evaluators.diagnostics import _recall


def test_a_table_becomes_a_heat_map():
    values = {"hmt.recall": {"block 0": {"values": [[0.0, 0.0], [1.0, 0.0]]}}}
    figure = _recall("{} of a run".format, values)
    assert figure.name == "memory_recall" and figure.png.startswith(b"\x89PNG")
    scalars = {"hmt.entropy": {"block 0": {"median": 1.0}}, "gate": {"block 0": {"values": [0.1, 0.2]}}}
    assert _recall(str, scalars) is None
