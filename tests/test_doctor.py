"""`engrax doctor` says what an issue report needs."""

import pytest

from engrax import cli
from engrax.commands import doctor
from engrax.pallas_kernels import dispatch


def lines(capsys):
    assert cli.main(["doctor"]) == 0
    return capsys.readouterr().out.splitlines()


def test_versions_devices_kernels_and_the_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_SECRET_KEY", "hidden")
    (tmp_path / "file").write_bytes(bytes(1 << 27))
    found = lines(capsys)
    told = {line[:22].strip(): line[23:] for line in found if line[:22].strip()}
    assert told["jax"][0].isdigit() and "x cpu" in told["devices"]
    assert all("xla" in told[op] for op in dispatch.OPERATIONS)
    assert any("no pallas_gpu: it needs a GPU" in line for line in found)
    assert told["cache"].startswith(f"{tmp_path} (0.1") and told["$ENGRAX_CACHE"] == str(tmp_path)
    assert "hidden" not in "".join(found)


def test_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert "not installed, but needed" in lines(capsys)[2]


def test_a_driver_that_does_not_answer_is_no_traceback(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no driver answers\nmore")

    monkeypatch.setattr("jax.devices", fail)
    assert any(line.startswith("devices") and line.endswith("none: no driver answers") for line in lines(capsys))


def test_an_argument_is_refused():
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert cli.main(["doctor", "more"]) == 2
