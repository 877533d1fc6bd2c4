"""Users' split files: names are texts, and splits may have any of their usual names."""

from __future__ import annotations

from pathlib import Path

import pytest

from metareg import UsageError, find_split, read_split_file

NAMES = ["01", "yes", "1e3", "null", "a b", "2020-01-01"]
SPLIT = {"01": "train", "yes": "train", "1e3": "validation", "null": "validation", "a b": "test", "2020-01-01": "test"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.json", '\ufeff{"Train": ["01", "yes"], "val": ["1e3", "null"], "test": ["a b", "2020-01-01"]}'),
        ("s.yaml", "training: [01, yes]\nvalid: [1e3, null]\ntesting:\n- a b\n- 2020-01-01\n"),
        ("s.csv", "split,task\ntrain,01\ntrain,yes\nvalidation,1e3\nVAL,null\ntest,a b\ntest,2020-01-01\n"),
        ("s.csv", "\ufeff01;train\nyes;train\n1e3;dev\nnull;dev\na b;test\n2020-01-01;test\n\n"),
    ],
)
def test_names_are_texts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_split_file(tmp_path / name, NAMES, "task") == SPLIT


def test_numbers_of_json_keep_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"train": [1e3, 2.50], "test": [7]}')
    assert list(read_split_file(tmp_path / "s.json", ["1e3", "2.50", "7"], "task")) == ["1e3", "2.50", "7"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("s.json", '{"trian": ["01"]}', "no split .* named 'trian'; did you mean 'train'"),
        ("s.json", '{"train": ["yess"]}', "no task .* named 'yess'; did you mean 'yes'"),
        ("s.json", '{"train": ["01"], "test": ["01"]}', "puts the task '01' into train and into test"),
        ("s.json", '{"train": [null]}', "lists of names"),
        ("s.json", '["01"]', "lists of names"),
        ("s.json", "{", "not valid JSON"),
        ("s.yaml", "train: [", "not valid YAML"),
        ("s.yaml", "train: 01", "lists of names"),
        ("s.csv", "task,part\n01,train\n", "columns 'task' and 'split'; it has task, part"),
        ("s.csv", "x,01,train\n", "its first has 3 cells"),
    ],
)
def test_refused_split_files(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        read_split_file(tmp_path / name, NAMES, "task")
    with pytest.raises(UsageError, match=r"cannot be read|no file"):
        read_split_file(tmp_path / f"no-{name}", NAMES, "task")


def test_usual_names_of_splits() -> None:
    assert [find_split(name) for name in ("TRAIN", "Training", "Valid", "val", "dev", "testing", "tests")] == [
        "train", "train", "validation", "validation", "validation", "test", None,
    ]  # fmt: skip
