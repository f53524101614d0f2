"""benchmarks/fastgen.py and benchmarks/counting.py: closed forms, errors, and every part on a small stand-in."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from textwrap import dedent

import fastgen_peer
import fastgen_quality
import fastgen_tangents
import make_tables
import pytest
import results
import torch
from counting import Counter, SavedBytes, floor_bytes
from fastgen_stand_in import FILES, write
from torch import nn

from lightning_distill.networks.specs import ZooDenoiser, as_denoiser

# under another name: the package that it measures has its name
source = Path(make_tables.__file__).with_name("fastgen.py")
spec = importlib.util.spec_from_file_location("fastgen_benchmark", source)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


# ------------------------------------------------------------------------------------------------ counting
def test_saved_bytes_are_those_alive_at_one_time():
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(3, 4)
    with SavedBytes([weight]) as saved:
        for _ in range(3):  # one graph after another
            y = (x @ weight).exp()
            assert saved.now == x.nbytes + y.nbytes
            del y
            assert saved.now == 0
        kept = [(x @ weight).exp() for _ in range(2)]
        assert saved.now == x.nbytes + sum(y.nbytes for y in kept)
        kept[0].sum().backward()
        assert saved.now == x.nbytes + kept[1].nbytes
    assert saved.peak == x.nbytes + 2 * kept[1].nbytes


def test_saved_bytes_do_not_change_gradients():
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(3, 4)
    want = torch.autograd.grad((x @ weight).tanh().square().sum(), weight)[0]
    with SavedBytes([weight]):
        got = torch.autograd.grad((x @ weight).tanh().square().sum(), weight)[0]
    assert torch.equal(got, want)


def test_a_step_is_counted():
    network, frozen = nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False).requires_grad_(False)
    module = nn.ModuleDict({"student": network, "teacher": frozen})
    x = torch.randn(3, 4)
    with Counter(module, dict(module), batch=3) as counted:
        y = network(x)
        frozen(y).square().sum().backward()
        with torch.no_grad():
            frozen(torch.cat([y, y]))
            float(network(x).mean())
    assert counted.calls == {"student": 2, "teacher": 3}
    assert counted.backwards == {"student": 1, "teacher": 1}
    assert counted.passes == 9
    student, teacher = 2 * 3 * 4 * 8, 2 * 3 * 8 * 8
    # backward: the student's weights, the teacher's input
    assert counted.gflop * 1e9 == pytest.approx((2 * student + 3 * teacher) + student + teacher)
    assert counted.synchronisations == 1
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


def test_forwards_that_stop_early_are_counted():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].register_forward_hook(stop)
    with Counter(network, {"student": network}) as counted, pytest.raises(Stop):
        network(torch.randn(1, 2))
    assert counted.calls == {"student": 1}
    assert counted.backwards == {}


def test_floor_is_weights_states_and_the_largest_gradients():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False)
    optimizers = [torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.Adam(b.parameters(), lr=1.0)]
    b(torch.randn(2, 4)).sum().backward()
    optimizers[1].step()
    weights = [*a.parameters(), *b.parameters()]
    assert floor_bytes([*weights, a.weight], optimizers) == 4 * (16 + 32) + (2 * 4 * 32 + 4) + 4 * 32


# ------------------------------------------------------------------------------------------------ FastGen's folder
def test_a_folder_without_fastgen_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"not a checkout of FastGen: fastgen/networks/network is missing; clone"):
        fastgen_peer.load(tmp_path)
    with pytest.raises(SystemExit, match="not a checkout of FastGen"):
        benchmark.main(["--fastgen", str(tmp_path / "nowhere")])


def test_a_missing_dependency_is_named(tmp_path):
    write(tmp_path, callbacks__ema="import surely_not_installed\n")
    with pytest.raises(SystemExit, match="imports surely_not_installed, which is missing; install it with: pip"):
        fastgen_peer.load(tmp_path)
    write(tmp_path, callbacks__ema="from fastgen.elsewhere import EMACallback\n")
    with pytest.raises(SystemExit, match=r"imports fastgen.elsewhere, which is missing; this script knows"):
        fastgen_peer.load(tmp_path)


def test_stand_ins_are_gone_after_loading(tmp_path):
    path, modules = list(sys.path), set(sys.modules)
    library = fastgen_peer.load(write(tmp_path))
    assert sys.path == path
    new = {name.split(".")[0] for name in set(sys.modules) - modules}
    assert new <= {"fastgen", *(name for name in fastgen_peer.PACKAGES if importlib.util.find_spec(name))}
    assert "fastgen.configs.net" not in sys.modules
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(NotImplementedError, match=r"FastGen called wandb.log, which is not installed"):
            library.clipping.wandb.log()


# ------------------------------------------------------------------------------------------------ both sides
@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fastgen_peer.load(write(tmp_path_factory.mktemp("checkout")))


def test_times_are_drawn_from_the_table_alike(library):
    levels = benchmark.peer_levels(fastgen_peer.network(library))
    u = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    drawn, counts = levels.quantile(u, None).unique(return_counts=True)
    assert torch.equal(drawn, torch.linspace(0.1, 80.0, 10, dtype=torch.float64)[1:9])
    assert counts.tolist() == [1000] * 8


@pytest.mark.filterwarnings("ignore:ConstantEMA")
def test_both_sides_are_equal_on_equal_draws(library):
    differences = benchmark.check(library)
    names = {"student": ("loss", "student"), "fake_score": ("loss", "fake_score", "discriminator")}
    assert set(differences) == {f"{phase}/{name}" for phase, of in names.items() for name in of}
    assert max(differences.values()) < 1e-5


def test_other_mathematics_is_noticed(tmp_path):
    path = "methods/distribution_matching/dmd2"
    other = FILES[f"{path}.py"].replace("SLOPE = 0.5", "SLOPE = 0.6")
    changed = fastgen_peer.load(write(tmp_path, **{path.replace("/", "__"): dedent(other)}))
    differences = benchmark.check(changed)
    assert differences["student/student"] > 0.05
    assert differences["fake_score/loss"] < 1e-5
    with pytest.raises(SystemExit, match=r"differ by .* on equal draws"):
        benchmark.main(["--fastgen", str(tmp_path)])


@pytest.mark.slow
def test_everything_is_measured_and_written(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "write_result", lambda *a, **k: results.write_result(*a, results=tmp_path, **k))
    checkout = write(tmp_path / "checkout")
    figures = benchmark.main(["--fastgen", str(checkout), "--repeats", "2", "--batch", "4"])
    rows = {(row["what"], row["implementation"], row.get("compared_with")): row for row in figures["rows"]}
    assert len(rows) == 12
    plain, gan = (rows[(what, benchmark.OURS, None)] for what in ("plain", "gan"))
    assert plain["calls"] == {"student": 4, "teacher": 1, "fake_score": 5}
    assert plain["passes"] == 20
    assert gan["calls"] == {"student": 4, "teacher": 1 + 8, "fake_score": 5}
    cheap = rows[("gan", benchmark.CHEAPER, None)]
    assert cheap["calls"] == {"student": 2, "teacher": 1, "fake_score": 5 + 1}  # one game, whose real side is a call
    assert rows[("plain", benchmark.PEER, benchmark.OURS)]["passes"] == 21
    guided = rows[("gan, guidance 2", benchmark.OURS, None)]
    assert guided["calls"]["teacher"] == gan["calls"]["teacher"] + 1
    assert plain["saved_activation_bytes"] < rows[("plain", benchmark.PEER, benchmark.OURS)]["saved_activation_bytes"]
    assert all(row["updates_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    written = json.loads((tmp_path / "latest/throughput_fastgen.json").read_text())
    monkeypatch.setattr(make_tables, "LATEST", tmp_path / "latest")
    table = make_tables.fastgen().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(written["rows"])
    assert {line.count("|") for line in table if line.startswith("|")} == {9}
    assert "GFLOP" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ exact derivatives
@pytest.fixture(scope="module")
def with_tangents(tmp_path_factory):
    return fastgen_peer.load(write(tmp_path_factory.mktemp("tangents")), fastgen_tangents.MODULES)


@pytest.mark.parametrize("variant", list(fastgen_tangents.VARIANTS))
@pytest.mark.parametrize("one_pass", [False, True])
def test_both_sides_have_one_loss_of_sharp_derivatives(with_tangents, variant, one_pass):
    differences = fastgen_tangents.check(with_tangents, variant, one_pass=one_pass)
    assert set(differences) == {f"{variant}/loss", f"{variant}/student"}
    assert max(differences.values()) < 1e-8


def test_other_tangents_are_noticed(tmp_path):
    path = "methods/consistency_model/sCM"
    other = dedent(FILES[f"{path}.py"].replace("CONSTANT = 0.1", "CONSTANT = 0.2"))
    checkout = write(tmp_path, **{path.replace("/", "__"): other})
    with pytest.raises(SystemExit, match=r"differ by .* on equal draws"):
        benchmark.main(["--fastgen", str(checkout), "--tangents", "--variants", "sCM"])


def test_updates_with_tangents_are_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fastgen_tangents, "write_result", lambda *a, **k: results.write_result(*a, results=tmp_path, **k)
    )
    arguments = ["--tangents", "--repeats", "2", "--batch", "4", "--variants", "sCM", "MeanFlow from data"]
    figures = benchmark.main(["--fastgen", str(write(tmp_path / "checkout")), *arguments])
    rows = {(row["what"], row["implementation"]): row for row in figures["rows"] if "gflop_ratio" in row}
    assert len(rows) == 6
    for (what, side), row in rows.items():
        teacher = {"teacher": 1} if what == "sCM" else {}
        assert row["calls"] == {"student": 1 if side == benchmark.OURS else 2, **teacher}
        assert row["updates_per_second"] > 0
    peers = [row for row in figures["rows"] if row["implementation"] == benchmark.PEER]
    assert [row["calls"]["student"] for row in peers] == [2] * 6
    for what in ("sCM", "MeanFlow from data"):
        work = [rows[(what, side)]["gflop"] for side in fastgen_tangents.SIDES]
        assert work[0] < work[1]
        assert work[2] < work[1] < peers[0]["gflop"]
    monkeypatch.setattr(make_tables, "LATEST", tmp_path / "latest")
    table = [line for line in make_tables.fastgen_tangents().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(figures["rows"])
    assert {line.count("|") for line in table} == {9}


# ------------------------------------------------------------------------------------------------ quality
def quality_arguments(folder, **changes):
    words = {
        "budget": 1.0,
        "first": 240.0,
        "every": 0.5,
        "samples": 80,
        "points": [(1e-3, 1)],
        "out": folder / "runs",
        "seeds": 1,
    }
    return Namespace(**{**words, **changes})


def test_a_network_of_the_peer_is_the_shipped_teacher(library):
    network, own = fastgen_quality.fashion(library)(), as_denoiser(ZooDenoiser("fashion"))
    x, labels = torch.randn(3, 1, 32, 32), torch.tensor([0, 5, 9])
    sigma = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    # the same noisy sample in the teacher's own process: alpha = cos, sigma = sin of one angle
    t, factor = own.process.t_from_log_snr(-2 * sigma.log()), (1 / (1 + sigma**2).sqrt()).float()[:, None, None, None]
    want = own(factor * x, t, {"class_labels": labels}).x0
    torch.testing.assert_close(network(x, sigma, labels), want, rtol=1e-4, atol=1e-4)


def test_curves_are_judged_at_every_so_many_seconds(tmp_path):
    curve, saved = fastgen_quality.Curve(tmp_path, "run", budget=10.0, every=2.0), []
    marks = iter([0.5, 0.85, 0.95])

    def save(path):
        path.touch()
        saved.append(curve.seconds)

    while not curve.finished:
        curve.spent(0.75, lambda: next(marks), save)
    assert saved == [2.25, 4.5, 6.0]
    assert curve.points == [[2.25, 0.5], [4.5, 0.85], [6.0, 0.95]]
    assert [curve.reached(goal) for goal in (0.8, 0.9, 0.99)] == [4.5, 6.0, None]
    again = fastgen_quality.Curve(tmp_path, "run", budget=10.0, every=2.0)
    assert again.finished
    assert again.points == curve.points


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_sides_train_and_go_on(library, tmp_path):
    short = fastgen_quality.quality(library, quality_arguments(tmp_path), tmp_path / "results")["rows"]
    assert [row["implementation"] for row in short] == list(fastgen_quality.SIDES)
    assert all(row["points"][-1][0] >= 1.0 for row in short)
    budget = 1.0 + max(row["points"][-1][0] for row in short)  # a step may take long
    more = quality_arguments(tmp_path, budget=budget, seeds=2)
    rows = fastgen_quality.quality(library, more, tmp_path / "results")["rows"]
    assert [row["seed"] for row in rows] == [0] * len(short) + [1] * len(short)
    for first, second in zip(rows[: len(short)], rows[len(short) :]):
        assert first["implementation"] == second["implementation"]
        assert first["points"][-1][1] != second["points"][-1][1]
    for before, after in zip(short, rows):
        assert after["points"][: len(before["points"])] == before["points"]
        assert after["points"][-1][0] >= budget
        assert after["points"][-1][1] != before["points"][-1][1]
    written = json.loads((tmp_path / "results/latest/quality_fastgen.json").read_text())
    assert [row["points"] for row in written["rows"]] == [row["points"] for row in rows]
