"""Prompt files in every format, and one sentence for each way in which they can be wrong."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lightning_distill.data.prompts import Prompt, read_prompts


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_text(tmp_path):
    file = write(tmp_path / "p.txt", '\ufeffa cat \r\n\r\n  a dog, "quoted"\n# not a comment\n')
    assert [p.text for p in read_prompts(file)] == ["a cat", 'a dog, "quoted"', "# not a comment"]


def test_csv_with_all_columns(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    rows = 'prompt,negative_prompt,image,weight\n"a cat, a hat",blurry,1.png,2.5\n"two\nlines",,,\n'
    assert read_prompts(write(tmp_path / "p.csv", rows)) == [
        Prompt("a cat, a hat", "blurry", tmp_path / "1.png", 2.5),
        Prompt("two\nlines"),
    ]


def test_other_formats_agree(tmp_path):
    rows = [{"caption": "a cat", "weight": 3}, {"caption": "ein Hündchen 🐶", "weight": 1}]
    tsv = write(tmp_path / "p.tsv", "caption\tweight\na cat\t3\nein Hündchen 🐶\t1\n")
    jsonl = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_prompts(tsv) == read_prompts(jsonl) == [Prompt("a cat", weight=3.0), Prompt("ein Hündchen 🐶")]
    plain = write(tmp_path / "q.jsonl", '"a cat"\n{"text": "a dog"}\n')
    assert [p.text for p in read_prompts(plain)] == ["a cat", "a dog"]


def test_a_named_column(tmp_path):
    file = write(tmp_path / "p.csv", "prompt,title\na cat,The Cat\n")
    assert read_prompts(file, "title") == [Prompt("The Cat")]
    with pytest.raises(ValueError, match=r"line 2: there is no column 'name', only prompt, title"):
        read_prompts(file, "name")


def test_parquet_through_either_library(tmp_path, monkeypatch):
    file = write(tmp_path / "p.parquet", "not read by the stand-ins")
    rows = [{"prompt": "a cat", "weight": float("nan"), "negative_prompt": None}]
    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    parquet.read_table = lambda path: SimpleNamespace(to_pylist=lambda: rows)
    arrow.parquet = parquet
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert read_prompts(file) == [Prompt("a cat")]
    parquet.read_table = lambda path: (_ for _ in ()).throw(ValueError("Parquet magic bytes not found\nin footer"))
    with pytest.raises(ValueError, match=r"not a readable parquet file \(Parquet magic bytes not found\)"):
        read_prompts(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    pandas = ModuleType("pandas")
    pandas.read_parquet = lambda path: SimpleNamespace(to_dict=lambda kind: rows)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert read_prompts(file) == [Prompt("a cat")]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RuntimeError, match=r"parquet files need pyarrow; install it with .*\[data\]"):
        read_prompts(file)


def test_real_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["a cat", "a dog"], "weight": [1.0, 2.0]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Prompt("a cat"), Prompt("a dog", weight=2.0)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", "\n \n", "holds no prompts; write one per line"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "title,weight\na cat,1\n", r"line 2: there is no column prompt .* only title, weight"),
        ("p.csv", "prompt\na cat, a dog\n", "line 2: there are more fields than columns .* double quotes"),
        ("p.csv", 'prompt\n"a cat\n', "no valid csv"),
        ("p.csv", "prompt,weight\na cat,heavy\n", "line 2: the weight is 'heavy'; write a number"),
        ("p.csv", "prompt,weight\na cat,-1\n", "the weight is '-1'"),
        ("p.csv", "prompt,weight\na cat,0\n", "every weight is 0"),
        ("p.csv", "prompt,weight\n  ,1\n", "line 2: the prompt in column 'prompt' is '  '"),
        ("p.jsonl", '{"prompt": 5}\n', "line 1: the prompt in column 'prompt' is 5"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("p.jsonl", "[1, 2]\n", "line 1 holds a list"),
        ("p.docx", "a cat", "prompts are read from .txt, .csv"),
    ],
)
def test_bad_files(tmp_path, name, content, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p.txt does not exist; give a file of .txt"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match=r"line 2: the picture .*none.png does not exist"):
        read_prompts(write(tmp_path / "p.csv", "prompt,image\na cat,none.png\n"))
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 2\)"):
        read_prompts(write(tmp_path / "q.txt", "ab\xe9", "latin-1"))


def test_half_characters_are_refused_with_their_line(tmp_path):
    for rows, what in (('"a cat"\n{"prompt": "a \\ud83d dog"}', "a "), ('{"prompt": "a"}\n"b \\ude00"', "b ")):
        with pytest.raises(ValueError, match=rf"p.jsonl, line 2: half of a character ends '{what}.ud"):
            read_prompts(write(tmp_path / "p.jsonl", rows))
    with pytest.raises(ValueError, match=r"line 1: half of a character"):
        read_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a", "negative_prompt": "\\ud83d"}'))
    whole = write(tmp_path / "p.jsonl", '"a \\ud83d\\ude00"')
    assert read_prompts(whole) == [Prompt("a 😀")]
