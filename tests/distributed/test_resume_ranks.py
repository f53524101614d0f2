"""Runs on two processes go on after an interruption as if nothing had been, in every form of checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_resume import CASES, STOP, run
from rank_runs import start

from lightning_distill.cli import main
from lightning_distill.commands.convert import convert

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


PARTS = ("whole", "resumed")


@pytest.fixture(scope="module", params=[CASES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])])
def name(request):
    """Of the case."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, name):
    """What one process wrote, then what two did."""
    root = tmp_path_factory.mktemp("resume")
    torch.save(run(name, root / f"{name}-one", "auto", 0, 1), root / f"{name}-one.pt")
    convert(root / f"{name}-one" / f"step={STOP}.ckpt", root / f"{name}-one" / "sharded.ckpt")
    start(root, name, script=Path(__file__).parent / "rank_resume.py")
    return root


def state(folder, name):
    return torch.load(folder / f"{name}.pt")


def check_close(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("kind", ["ddp", "sharded", "single"])
def test_resumed_equals_uninterrupted_bit_for_bit(folder, name, kind):
    whole, resumed = state(folder, f"{name}-{kind}-whole"), state(folder, f"{name}-{kind}-resumed")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    check_close(whole, state(folder, f"{name}-one"))
    whole, resumed = ([state(folder, f"{name}-{kind}-{part}-generator{r}") for r in (0, 1)] for part in PARTS)
    assert all(map(torch.equal, whole, resumed))
    assert not torch.equal(*whole)


@pytest.mark.parametrize("origin", ["one", "converted", "other"])
def test_two_processes_resume_what_others_wrote(folder, name, origin):
    check_close(state(folder, f"{name}-from-{origin}"), state(folder, f"{name}-one"))


@pytest.mark.parametrize("kind", ["ddp", "single", "sharded"])
def test_one_process_resumes_what_two_wrote(folder, name, kind, tmp_path, capsys):
    path = folder / f"{name}-{kind}" / f"step={STOP}.ckpt"
    if kind == "sharded":
        assert main(["convert", str(path), str(tmp_path / "one.ckpt")]) == 0
        path = tmp_path / "one.ckpt"
        assert capsys.readouterr().out.strip() == str(path)
    check_close(run(name, tmp_path, "auto", 0, 1, path, save=False), state(folder, f"{name}-one"))


def test_conversion_there_and_back_changes_nothing(folder, name, tmp_path):
    path = folder / f"{name}-one" / f"step={STOP}.ckpt"
    again = convert(folder / f"{name}-one" / "sharded.ckpt", tmp_path / "again.ckpt")
    want, got = torch.load(path, weights_only=True), torch.load(again, weights_only=True)
    assert want.keys() == got.keys()
    assert str(want["optimizer_states"]) == str(got["optimizer_states"])
    assert all(torch.equal(want["state_dict"][key], got["state_dict"][key]) for key in want["state_dict"])
    assert want["lightning_distill"]["teacher"] == got["lightning_distill"]["teacher"]


def test_conversion_says_what_is_wrong(folder, name, tmp_path, capsys):
    source = str(folder / f"{name}-one" / f"step={STOP}.ckpt")
    assert main(["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path)]) == 2
    assert "exists; give another name" in capsys.readouterr().err
    (tmp_path / "half.ckpt").mkdir()
    assert main(["convert", str(tmp_path / "half.ckpt"), str(tmp_path / "out")]) == 2
    assert "meta.pt is missing" in capsys.readouterr().err
    old = torch.load(source, weights_only=True)
    del old["lightning_distill"]["parameters"]
    torch.save(old, tmp_path / "old.ckpt")
    assert main(["convert", str(tmp_path / "old.ckpt"), str(tmp_path / "out")]) == 2
    assert "does not name the parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
