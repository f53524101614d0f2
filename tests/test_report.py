"""The report page: everything a run left behind is on it, and nothing of it is taken as HTML."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_distill.cli import main
from lightning_distill.records import EvaluationLog, EvaluationRow
from lightning_distill.report import load_run_data, write_report
from lightning_distill.report.curves import curve_sections
from lightning_distill.report.data import Picture
from lightning_distill.report.measures import best_row, describe
from lightning_distill.report.numbers import MAX_POINTS, column_number, downsample, nice_ticks, number, smooth
from lightning_distill.report.pictures import chosen, encode
from lightning_distill.report.svg import Chart, Reference, Series, draw

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "input", "img", "br", "hr", "link"}
TAGS = {
    "train/student/matching": lambda s: 1.0 / (1 + s),
    "train/student/gan": lambda s: 0.7,
    "train/student/total": lambda s: 1.0 / (1 + s) + 0.7,
    "train/student/grad_norm": lambda s: 3.0,
    "train/student/skipped_steps": lambda s: 0.0,
    "train/fake_score/denoising": lambda s: 0.25,
    "train/fake_score/total": lambda s: 0.25,
    "health/fake_score_lag": lambda s: 1.1,
    "health/fake_score_lag/level_0.5": lambda s: 1.2,
    "health/duplicates": lambda s: 0.0,
    "lr-AdamW": lambda s: 1e-4,
    "epoch": lambda s: 0.0,
}


class Page(HTMLParser):
    """A parsed page; refuses elements that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words, self.hidden = [], [], [], 0
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def configuration(**model):
    teacher = {"class_path": "lightning_distill.networks.specs.ZooDenoiser", "init_args": {"name": "fashion"}}
    arguments = {"teacher": teacher, "num_steps": 2, "student_times": None, "loss_weights": None, **model}
    return {
        "seed_everything": 7,
        "trainer": {
            "max_steps": 40,
            "precision": "bf16-mixed",
            "logger": {"init_args": {"name": str(model)}},
        },
        "model": {"class_path": "lightning_distill.methods.DMD2", "init_args": arguments},
        "data": {"class_path": "lightning_distill.data.Prior", "init_args": {"batch_size": 48}},
    }


def log(fd=(6.0, 3.5, 4.0), nfe=2):
    rows = [
        EvaluationRow("student", nfe, {"fd_cnn": v, "recall_cnn": 0.5 + i / 10, "odd": 12.5}, "ema", step, "fit", 2560)
        for i, (step, v) in enumerate(zip((10, 20, 40), fd))
    ]
    teacher = [
        EvaluationRow("teacher", 50, {"fd_cnn": 2.25, "recall_cnn": 0.9}, stage="card", num_samples=5000),
        EvaluationRow("teacher", nfe, {"fd_cnn": 33.0, "recall_cnn": 0.125}, stage="card", num_samples=5000),
    ]
    return EvaluationLog(rows, teacher, {"floors": {"fd_cnn": 0.5}})


def scalars(folder, tags=TAGS, steps=range(40)):
    with SummaryWriter(folder) as writer:
        for name, value in tags.items():
            for step in steps:
                writer.add_scalar(name, value(step), step)


def picture(path, size=(60, 40)):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def make_run(folder, evaluated=None, tags=TAGS, **model):
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# written by a test\n" + yaml.safe_dump(configuration(**model)))
    scalars(folder, tags)
    (evaluated or log()).save(folder)
    for step in (10, 20, 40):
        picture(folder / "samples" / f"step_{step:06d}.png")
    picture(folder / "samples" / "strip_000040.png")
    (folder / "environment.json").write_text(json.dumps({"cpu": "Abacus 9", "threads": None, "cores": 2}))
    warning = {"step": 30, "kind": "collapse", "message": "recall fell by half."}
    (folder / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "toy" / "version_0")


def assert_even_tables(text):
    """Every row of a Markdown table has as many cells as the others."""
    found = re.findall(r"(?m)(?:^\|.*\n)+", text)
    assert found
    for table in found:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def charts(*folders):
    return {c.name: c for s in curve_sections([load_run_data(f) for f in folders]) for c in s.charts}


# ------------------------------------------------------------------------------------------------ one run
def test_the_page_is_valid_and_needs_nothing_else(run):
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action", "background"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, key)
    assert not re.search(r"url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


def test_everything_of_a_run_is_shown(run):
    page = Page(write_report(run).read_text())
    for words in (
        "toy/version_0",
        "DMD2: ZooDenoiser fashion into 2 steps",
        "40 of 40",
        "Prior",
        "bf16-mixed",
        "2.250",  # the teacher, then the student and its ratio to the floor, and what it had been
        "33",
        "4.000",
        "8.000",
        "3.500 @ 20",
        "0.700",
        "12.5",
        "5000 samples",
        "collapse",
        "recall fell by half.",
        "Abacus 9",
        "# written by a test",
    ):
        assert words in page.text, words
    assert len(page.all("img")) == 4
    assert [a for a in page.all("input") if "checked" in a] == page.all("input")[-1:]
    titles = [a["aria-label"].split(":")[0] for a in page.all("svg")]
    shown = {"train/student/matching", "train/student/gan", "train/student/total", "train/student/grad_norm"}
    shown |= {"train/fake_score/denoising", "health/fake_score_lag", "health/duplicates", "lr-AdamW"}
    assert shown | {"fd_cnn/nfe2", "recall_cnn/nfe2", "odd/nfe2"} == set(titles)
    assert "denoising (= total)" in page.text, "a total that is its only term is told, not drawn again"
    assert "not evaluated" not in page.text


def test_the_best_of_a_column_is_bold(run, tmp_path):
    def bold(path):
        return re.findall(r'<td class="n best">([^<]+)', path.read_text())

    assert bold(write_report(run)) == ["2.250", "4.500", "0.900"], "the teacher has the least FD and the most recall"
    other = make_run(tmp_path / "other", log((9.0, 8.0, 1.5)))
    both = bold(write_report([run, other], tmp_path / "both.html"))
    assert both == ["0.700", "1.500", "3.000", "0.700"], "of several students the best; equal ones both"


def test_direction_of_figures():
    rows = [EvaluationRow("student", 1, {"fd_cnn": v, "recall_cnn": v, "odd": v}) for v in (float("nan"), 2.0, 1.0)]
    assert best_row(rows, describe("fd_cnn")) is rows[2]
    assert best_row(rows, describe("recall_cnn")) is rows[1]
    assert best_row(rows, describe("odd")) is None
    assert best_row(rows[:1], describe("fd_cnn")) is None
    figure = describe("nearest_ratio_cnn")
    assert (figure.label, figure.source, figure.direction) == ("nearest / teacher's", "cnn", None)
    assert describe("fd_dino/floor").label == "FD / floor"
    assert describe("fd_dino/floor").source == "dino"
    assert describe("progress_cnn").rank < describe("fd_cnn").rank < describe("recall_cnn").rank


def test_the_teacher_is_a_line_at_its_value(run):
    chart = charts(run)["fd_cnn/nfe2"]
    assert {(r.label, r.value) for r in chart.references} == {
        ("teacher, 50 steps", 2.25),
        ("teacher, 2 steps", 33.0),
        ("real data against real data", 0.5),
    }
    assert chart.series[0].steps.tolist() == [10, 20, 40]
    assert chart.series[0].values.tolist() == [6.0, 3.5, 4.0]
    page = Page(write_report(run).read_text())
    assert "teacher, 50 steps: 2.25" in page.text
    assert len([a for a in page.all("path") if a.get("class") == "reference"]) == 3 + 2


def test_rows_of_a_test_are_no_points_of_the_curve(run):
    evaluated = log()
    final = EvaluationRow("student", 2, {"fd_cnn": 4.75}, "ema", 40, "test", 5000, 20000, "held_out")
    EvaluationLog([*evaluated.rows, final], evaluated.teacher, {}).save(run)
    assert charts(run)["fd_cnn/nfe2"].series[0].values.tolist() == [6.0, 3.5, 4.0]
    text = Page(write_report(run).read_text()).text
    assert "student (ema, fit)" in text
    assert "student (ema, test)" in text
    assert "Student (ema, test), 2 steps, update 40, 5000 samples." in text
    assert "held-out half" in text


def test_teachers_of_several_samples_stand_beside_their_students(run):
    evaluated, other = log(), {"num_samples": 60, "seed": 7, "half": "held_out"}
    final = EvaluationRow("student", 2, {"fd_cnn": 4.75}, "ema", 40, "test", **other)
    few = EvaluationRow("teacher", 8, {"fd_cnn": 5.5}, **other)
    EvaluationLog([*evaluated.rows, final], [*evaluated.teacher, few], {}).save(run)
    assert {r.label for r in charts(run)["fd_cnn/nfe2"].references} == {"teacher, 50 steps", "teacher, 2 steps"}
    text = Page(write_report(run).read_text()).text
    assert "60 samples, held-out half" in text
    assert "5000 samples, selection half" in text
    alone = EvaluationLog([final], [*evaluated.teacher, few], {})
    alone.save(run)
    assert "5000 samples" not in Page(write_report(run).read_text()).text


def test_curves_of_an_unrecorded_evaluation_come_from_the_logger(run):
    (run / "metrics.json").unlink()
    scalars(run, {"val/fd_cnn/nfe2/ema": lambda s: 5.0 + s, "test/fd_cnn/nfe2/ema": lambda s: 1.0}, [10, 20])
    assert charts(run)["fd_cnn/nfe2"].series[0].values.tolist() == [15.0, 25.0]


def test_health_figures_share_a_plot_with_their_levels(run, tmp_path):
    chart = charts(run)["health/fake_score_lag"]
    assert [s.label for s in chart.series] == ["all", "level 0.5"]
    assert chart.healthy == (0.5, 1.05)
    assert chart.marks == [(30, "collapse: recall fell by half.")]
    sections = curve_sections([load_run_data(run), load_run_data(make_run(tmp_path / "other"))])
    folded = next(s for s in sections if s.folded)
    assert [c.name for c in folded.charts] == ["health/fake_score_lag/level_0.5"]
    assert len(folded.charts[0].series) == 2


def test_skipped_updates_and_values_that_are_not_finite_are_told(tmp_path):
    tags = {
        "train/student/skipped_steps": lambda s: float(s > 30),
        "train/student/matching": lambda s: float("nan") if 10 <= s < 13 else float(s),
        "train/student/gone": lambda s: float("inf"),
    }
    run = make_run(tmp_path / "run", tags=tags)
    found = charts(run)
    assert found["train/student/skipped_steps"].series[0].values[-1] == 1
    assert "train/student/gone" not in found
    assert found["train/student/matching"].note == "3 not finite"
    assert "3 not finite" in Page(write_report(run).read_text()).text


def test_a_resumed_run_shows_its_last_word(run):
    (run / "events.out.tfevents.0000000001.first.1.0").write_bytes(next(run.glob("events*")).read_bytes())
    for file in run.glob("events.out.tfevents.[1-9]*"):
        file.unlink()
    scalars(run, {"train/student/matching": lambda s: 100.0 + s}, range(25, 50))
    curve = load_run_data(run).scalars["train/student/matching"]
    assert curve.steps.tolist() == list(range(50))
    np.testing.assert_allclose(curve.values[24], 1 / 25)
    np.testing.assert_allclose(curve.values[25:], 100.0 + np.arange(25, 50))
    assert load_run_data(run).updates == 50


# ------------------------------------------------------------------------------------------------ what is missing
def test_missing_parts_are_told_in_a_sentence(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": "my.package.Method"}))
    page = Page(write_report(run).read_text())
    for words in ("no TensorBoard event files", "not evaluated", "no sample grids", "no environment.json", "Method"):
        assert words in page.text
    assert not page.all("svg")
    assert "no TensorBoard event files" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": 1, "stud', "metrics.json is damaged"),
        ("[]", "metrics.json is damaged"),
        ('{"format": 1, "reference": {}, "teacher": [{"nfe": 1}], "student": []}', "metrics.json is damaged"),
        (
            '{"format": 1, "reference": {}, "teacher": [], "student": [{"role": "student", "nfe": 1, "metrics": []}]}',
            "metrics.json is damaged",
        ),
        (
            '{"format": 1, "reference": {}, "teacher": [{"role": "teacher", "nfe": 1, "metrics": {"a": "b"}}], '
            '"student": []}',
            "a figure is no number",
        ),
        ('{"format": 99}', "metrics of format 99 cannot be read"),
    ],
)
def test_a_damaged_metrics_file_is_one_sentence_and_the_rest_is_shown(run, content, said):
    (run / "metrics.json").write_text(content)
    notes = load_run_data(run).notes
    assert len(notes) == 1
    assert notes[0].startswith("There are no figures: ")
    page = Page(write_report(run).read_text())
    assert said in page.text
    assert "Abacus 9" in page.text
    assert "train/student/matching" in page.text


def test_other_damaged_files_are_told_too(run):
    (run / "warnings.jsonl").write_text('{"step": 3, "kind": "a", "message": "b"}\nnonsense\n[1]\n\n{"step": 4')
    (run / "environment.json").write_text("{")
    (run / "samples" / "step_000020.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for file in run.glob("events*"):
        file.write_bytes(b"\x00" * 40)
    page = Page(write_report(run).read_text())
    assert "3 lines of warnings.jsonl cannot be read" in page.text
    assert "environment.json is damaged" in page.text
    assert "step_000020.png is damaged" in page.text
    assert "hold no values yet, or are damaged" in page.text
    assert len(page.all("img")) == 3
    assert "step\\_000020.png is damaged" in (run / "report.md").read_text()


def test_a_folder_that_is_no_run_is_an_error(tmp_path, run, capsys):
    assert main(["report", str(tmp_path / "toy"), str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    (run / "config.yaml").write_text("a: [1")
    assert main(["report", str(run)]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err
    assert main(["report"]) == 2
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([])


def test_where_the_report_is_written(run, tmp_path, capsys, monkeypatch):
    assert main(["report", str(run.parent), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "new" / "page.html"),
        str(tmp_path / "new" / "page.md"),
    ]
    assert (tmp_path / "new" / "page_files").is_dir()
    assert write_report(run, tmp_path / "new") == tmp_path / "new" / "report.html"
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report(run, tmp_path / "page.pdf")
    monkeypatch.chdir(tmp_path)
    assert write_report([run, run]) == run / "report.html", "the same run twice is one run"
    make_run(tmp_path / "other")
    assert write_report([run, "other"]) == Path("report.html")


# ------------------------------------------------------------------------------------------------ several runs
def test_two_runs_side_by_side(run, tmp_path):
    other = make_run(
        tmp_path / "other" / "version_3", log((7.0, 6.5, 6.25)), num_steps=4, gan={"weight": 0.03}, student_times=[1, 0]
    )
    page = Page(write_report([run, other], tmp_path / "both.html").read_text())
    for words in ("toy/version_0 and other/version_3", "4.000", "6.250", "3.500 @ 20"):
        assert words in page.text
    differing = page.text.split("Configuration: what differs")[1].split("Keys that differ")[0]
    assert set(re.findall(r"model\.init_args\.[\w.]+", differing)) == {
        "model.init_args.num_steps",
        "model.init_args.gan.weight",
        "model.init_args.student_times",
    }
    assert "0.03" in differing
    assert "–" in differing
    assert not re.search("trainer|seed|data", differing)
    assert len(page.all("img")) == 8
    assert len({a["name"] for a in page.all("input")}) == 2
    both = charts(run, other)
    assert [(s.label, s.colour) for s in both["fd_cnn/nfe2"].series] == [("toy/version_0", 0), ("other/version_3", 1)]
    assert [s.label for s in both["train/student/matching"].series] == ["toy/version_0", "other/version_3"]
    assert len(both["fd_cnn/nfe2"].references) == 3, "runs of one teacher share its lines"
    assert page.text.count("all runs") == 2


def test_students_of_different_steps_get_plots_of_their_own(run, tmp_path):
    other = make_run(tmp_path / "other", log(nfe=4))
    found = charts(run, other)
    assert [s.label for s in found["fd_cnn/nfe2"].series] == ["toy/version_0"]
    assert [s.label for s in found["fd_cnn/nfe4"].series] == ["other"]
    assert "teacher of other, 4 steps" in {r.label for r in found["fd_cnn/nfe4"].references}


def test_equal_configurations_and_equal_names(run, tmp_path):
    twin = tmp_path / "elsewhere" / "toy" / "version_0"
    shutil.copytree(run, twin)
    page = Page(write_report([run, twin], tmp_path / "both.html").read_text())
    assert "The configurations are equal" in page.text
    assert f"{tmp_path.name}/toy/version_0" in page.text
    assert "elsewhere/toy/version_0" in page.text


# ------------------------------------------------------------------------------------------------ escaping
def test_nothing_of_a_run_is_taken_as_html(tmp_path):
    evil = "<script>alert('1')<&\"|`"
    tags = {f"train/student/{evil}": lambda s: float(s), f"health/{evil}": lambda s: float(s)}
    evaluated = log()
    evaluated.rows[-1].metrics[evil] = 1.0
    run = make_run(tmp_path / evil, evaluated, tags, note=f"</pre></style>{evil}")
    (run / "warnings.jsonl").write_text(json.dumps({"step": 1, "kind": evil, "message": f"\x1b[31m{evil}\x00"}))
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    shutil.copytree(run, tmp_path / f"{evil}2")
    for folders in (run, [run, tmp_path / f"{evil}2"]):
        path = write_report(folders, tmp_path / "page.html")
        page = Page(path.read_text())
        assert {tag for tag, _ in page.elements}.isdisjoint({"script"})
        assert page.text.count("<script>alert(") > 8, "it is shown as text"
        assert not re.search("[\x00\x1b]", path.read_text())
        outside = re.sub(r"(?s)^(`{3,})yaml\n.*?\n\1$", "", path.with_suffix(".md").read_text(), flags=re.M)
        assert "<script" not in outside
        assert_even_tables(outside)
    for file in (tmp_path / "page_files").glob("*.svg"):
        root = ElementTree.parse(file).getroot()
        assert root.tag == f"{SVG}svg"
        assert not list(root.iter(f"{SVG}script"))


# ------------------------------------------------------------------------------------------------ markdown
def test_the_markdown_twin_is_complete(run):
    write_report(run)
    text = (run / "report.md").read_text()
    links = re.findall(r"\]\((report_files/[^)]+)\)", text)
    assert len(links) == 4 + len(charts(run))
    assert {f"report_files/{p.name}" for p in (run / "report_files").iterdir()} == set(links)
    for words in ("**2.250**", "4.000 (3.500 @ 20)", "recall fell by half.", "Abacus 9", "# written by a test"):
        assert words in text
    assert_even_tables(text)
    curve = ElementTree.parse(run / "report_files" / "curve_fd_cnn_nfe2.svg").getroot()
    assert "prefers-color-scheme" in curve.find(f"{SVG}style").text


# ------------------------------------------------------------------------------------------------ curves
def line(values, **arguments):
    values = np.array(values, dtype=np.float64)
    return Series("a", np.arange(len(values)), values, **arguments)


def drawn(*series, **arguments):
    return ElementTree.fromstring(draw(Chart("t", list(series), **arguments)))


def curve_paths(root):
    return [p.get("d") for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("curve")]


def test_ticks_are_round_and_within():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-3, 12) == [0, 5, 10]
    assert nice_ticks(0.0213, 0.0258) == [0.022, 0.023, 0.024, 0.025]
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(size=200) * 10.0 ** rng.integers(-6, 6, 200), 10.0 ** rng.uniform(-6, 6, 200)):
        ticks = nice_ticks(low, low + width)
        assert 2 <= len(ticks) <= 7
        assert low - 1e-6 * width <= min(ticks) <= max(ticks) <= low + width * (1 + 1e-6)


def test_numbers_for_people():
    assert [number(v) for v in (0.123456, 12345.6, 1e-7, float("nan"), -2.0)] == [
        "0.1235",
        "1.235e4",
        "1e-7",
        "nan",
        "-2",
    ]
    assert [column_number(v) for v in (0.0, 0.5, 9.9996, 12.346, 0.00123)] == [
        "0.000",
        "0.500",
        "10.000",
        "12.35",
        "0.00123",
    ]


def test_points_lie_where_their_values_are():
    root = drawn(line([1.0, 2.0, 4.0], points=True), references=[Reference("r", 3.0)])
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.21)
    reference = next(p for p in root.iter(f"{SVG}path") if p.get("class") == "reference")
    assert float(re.match(r"M46 ([\d.]+)H", reference.get("d"))[1]) == pytest.approx((y1 + y2) / 2, abs=0.11)
    grid = {float(e.get("y1")) for e in root.iter(f"{SVG}line") if e.get("class") == "grid"}
    assert any(abs(y - y1) < 0.11 for y in grid), "a grid line at 2"


def test_wide_positive_ranges_are_logarithmic():
    def heights(values):
        return [float(c.get("cy")) for c in drawn(line(values, points=True)).iter(f"{SVG}circle")]

    a, b, c = heights([0.1, 10.0, 1000.0])
    assert a - b == pytest.approx(b - c, abs=0.11)
    a, b, c = heights([1.0, 50.0, 99.0])
    assert a - b == pytest.approx(b - c, abs=0.11)
    a, b, c = heights([0.0, 10.0, 1000.0])
    assert b - c > 50 * (a - b)
    assert "(logarithmic values)" in draw(Chart("t", [line([0.1, 100.0])]))
    assert "(logarithmic values)" in draw(Chart("t", [line([1.0, 2.0])], [Reference("far", 500.0)]))


def test_a_missing_value_is_a_gap():
    (path,) = curve_paths(drawn(line([1, 2, float("nan"), 3, float("inf"), 4, 5])))
    assert [part.count("L") for part in path.split("M")[1:]] == [1, 0, 1]


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [-3.0] * 4, [1e300, -1e300], [1e-12, 1e-12 * (1 + 1e-7)]])
def test_degenerate_curves_are_drawn(values):
    root = drawn(line(values))
    assert all(np.isfinite(float(n)) for p in curve_paths(root) for n in re.findall(r"-?[\d.]+|nan|inf", p))
    ticks = [t for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert 1 <= len(ticks) <= 9


def test_long_curves_are_thinned_and_keep_their_spikes():
    values = np.sin(np.arange(20_001) / 400.0)
    values[7777] = 9.0
    kept = downsample(values)
    assert len(kept) <= MAX_POINTS
    assert {0, 7777, 20_000} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    (path,) = curve_paths(drawn(line(values)))
    assert path.count("L") < MAX_POINTS
    assert np.array_equal(downsample(values[:100]), np.arange(100))


def test_noisy_curves_get_a_smooth_one():
    rng = np.random.default_rng(0)
    clean = np.linspace(3.0, 1.0, 400)
    noisy = clean + 0.5 * rng.normal(size=400)
    assert np.abs(smooth(noisy) - clean).max() < 0.5 * np.abs(noisy - clean).max()
    np.testing.assert_allclose(smooth(5.0 + np.resize([0.0, 1e-3], 60)), 5.0, atol=1.01e-3)  # no fall at the ends
    assert smooth(clean) is None
    assert smooth(noisy[:10]) is None
    root = drawn(line(noisy))
    assert [p.get("class") for p in root.iter(f"{SVG}path") if "curve" in p.get("class", "")] == ["curve raw", "curve"]


def test_values_are_told_under_the_pointer():
    root = drawn(line([1.0, 2.5]), Series("b", np.array([1]), np.array([7.25]), colour=1))
    told = [e.find(f"{SVG}title").text for e in root.iter(f"{SVG}rect") if e.get("class") == "band"]
    assert told == ["update 0\na: 1", "update 1\na: 2.5\nb: 7.25"]
    many = drawn(line(np.random.default_rng(0).normal(size=3000)))
    assert 20 < len([e for e in many.iter(f"{SVG}rect") if e.get("class") == "band"]) <= 60


# ------------------------------------------------------------------------------------------------ pictures
def test_pictures_are_chosen_evenly():
    pictures = [Picture(Path(f"{i}.png"), i) for i in range(101)]
    assert [p.step for p in chosen(pictures, 5)] == [0, 25, 50, 75, 100]
    assert chosen(pictures[:3], 5) == pictures[:3]


def test_large_pictures_are_made_smaller(tmp_path):
    picture(tmp_path / "small.png")
    assert encode(tmp_path / "small.png").data == (tmp_path / "small.png").read_bytes()
    picture(tmp_path / "wide.png", (2000, 300))
    wide = encode(tmp_path / "wide.png")
    assert (wide.suffix, wide.width, wide.height) == ("webp", 1600, 240)
    assert encode(tmp_path / "wide.png", large=False).width == 1000
    assert len(wide.data) < (tmp_path / "wide.png").stat().st_size
    flat = tmp_path / "flat.png"
    Image.fromarray((np.indices((300, 300)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB").save(flat)
    assert encode(flat, large=False).data == flat.read_bytes()
    (tmp_path / "half.png").write_bytes((tmp_path / "wide.png").read_bytes()[:5000])
    assert encode(tmp_path / "half.png") is None
