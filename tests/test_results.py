"""Benchmark records: fixed names, figures at the top level, facts under ``meta``, valid JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "results.py"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_results", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_record(results, tmp_path):
    figures = {"rows": [{"method": "a", "fd": np.float64(1.5), "n": torch.tensor(3)}], "nfe": 4}
    dated = results.write_result("compare_digits", figures, results=tmp_path, seeds=[0, 1], machine="My box", note="x")
    record = json.loads(dated.read_text())
    assert record == json.loads((tmp_path / "latest" / "compare_digits.json").read_text())
    assert record["rows"] == [{"method": "a", "fd": 1.5, "n": 3}]
    assert record["nfe"] == 4
    meta = record["meta"]
    assert meta["seeds"] == [0, 1]
    assert meta["note"] == "x"
    assert meta["machine"]["name"] == "my-box"
    assert meta["machine"]["cores"] >= 1
    assert meta["machine"]["cpu"]
    assert meta["versions"]["torch"] == torch.__version__.split("+")[0]
    assert meta["versions"]["numpy"] == np.__version__
    assert meta["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert dated.name == f"{meta['date'][:10]}_my-box_compare_digits.json"
    assert str(tmp_path) not in dated.read_text()
    assert sorted(p.name for p in tmp_path.rglob("*.json")) == sorted([dated.name, "compare_digits.json"])


def test_latest_is_replaced_and_failures_write_nothing(results, tmp_path):
    results.write_result("q", {"a": 1}, results=tmp_path, machine="one")
    results.write_result("q", {"a": 2}, results=tmp_path, machine="two")
    assert json.loads((tmp_path / "latest" / "q.json").read_text())["a"] == 2
    assert len(list(tmp_path.glob("*_q.json"))) == 2
    with pytest.raises(ValueError, match=r"figures\.a\[1\] is nan"):
        results.write_result("q", {"a": [1.0, float("nan")]}, results=tmp_path)
    with pytest.raises(ValueError, match="absolute path"):
        results.write_result("q", {"a": str(tmp_path)}, results=tmp_path)
    with pytest.raises(TypeError, match=r"figures\.a is a set"):
        results.write_result("q", {"a": {1}}, results=tmp_path)
    with pytest.raises(ValueError, match="names a file"):
        results.write_result("../q", {}, results=tmp_path)
    with pytest.raises(ValueError, match="'meta'"):
        results.write_result("q", {"meta": {}}, results=tmp_path)
    assert json.loads((tmp_path / "latest" / "q.json").read_text())["a"] == 2


def test_command_line(results, tmp_path, capsys):
    source = tmp_path / "figures.json"
    source.write_text('{"rows": []}')
    out = tmp_path / "out"
    results.main(["faults", str(source), "--seeds", "3", "--meta", "note=n", "--results", str(out)])
    record = json.loads((out / "latest" / "faults.json").read_text())
    assert record["rows"] == []
    assert (record["meta"]["seeds"], record["meta"]["note"]) == ([3], "n")
    assert "wrote" in capsys.readouterr().out
    source.write_text("[1]")
    with pytest.raises(SystemExit):
        results.main(["faults", str(source), "--results", str(out)])
    assert "must be a JSON object" in capsys.readouterr().err


def test_the_table_of_samplers_has_what_each_class_takes(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    from methods_table import capabilities

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capabilities().splitlines()[2:]]
    samplers = {name: row[2] for row in rows for name in row[1].split(", ")}
    assert len(samplers) == sum(row[1].count(",") + 1 for row in rows), "a method is in one row"
    assert samplers["TiUE"] == "`renoise`, `ode`"
    assert samplers["BOOT"] == samplers["PiFlow"] == "`flow_map`"
    assert samplers["CTM"] == "`flow_map`, `gamma`, `renoise`, `ode`"
    assert samplers["SCM"] == "`renoise`"  # takes `ode` as well, for one step only
