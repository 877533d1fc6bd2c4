"""Letters of users' fonts: drawing, splits, omissions, and invalid fonts."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont
from fontTools.ttLib.tables._c_m_a_p import CmapSubtable

import metareg
from metareg import UsageError
from metareg_image import FontFolder
from metareg_image.characters import find_script, parse_characters
from metareg_image.font_files import read_faces
from metareg_image.letters import has_ink
from metareg_image.likeness import find_alike, select_distinct

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWX"
KANJI = "".join(map(chr, range(0x4E00, 0x4E18)))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAREG_DATA", raising=False)


def draw_glyph(shape: int, width: int) -> Any:
    """Return squares at 9 random positions of a 5 × 5 grid, fixed by the number; none for 0."""
    pen = TTGlyphPen(None)
    for place in random.Random(shape).sample(range(25), 9 if shape else 0):
        left, bottom = 170 * (place % 5), 170 * (place // 5)
        pen.moveTo((left, bottom))
        for right, up in ((0, width), (width, width), (width, 0)):
            pen.lineTo((left + right, bottom + up))
        pen.closePath()
    return pen.glyph()


def make_font(path: Path, letters: str = LATIN, width: int = 130, **shapes: int) -> Path:
    """Write a font whose letters have different shapes, or shapes given by numbers; 0 is an empty shape."""
    glyphs = {".notdef": draw_glyph(1, width)}
    glyphs |= {f"g{ord(each)}": draw_glyph(shapes.get(each, ord(each)), width) for each in letters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(each): f"g{ord(each)}" for each in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (850, 0)))
    builder.setupHorizontalHeader(ascent=850, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


def make_family(folder: Path, letters: str = LATIN, **shapes: int) -> Path:
    for width in (100, 120, 140, 160):
        make_font(folder / f"Face{width}.ttf", letters, width, **shapes)
    return folder


def task_of(folder: Path, **options: Any) -> FontFolder:
    return FontFolder(FontFolder.Config(data=str(folder), **options))


def names_of(task: FontFolder) -> dict[str, set[str]]:
    return {split: set(index.names) for split, index in task.store.splits.items()}


def latin(letters: Iterable[str]) -> set[str]:
    return {f"Latin capital letter {letter.lower()}" for letter in letters}


# ------------------------------------------------------------------------------------------------------------ the classes


def test_a_class_is_a_character_and_an_example_a_face(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "fonts", LATIN + KANJI)
    task = task_of(folder, characters="latin, U+4E00-4E05", examples=16)
    names = names_of(task)
    assert set.union(*names.values()) == latin(LATIN) | {f"U+{0x4E00 + n:04X}" for n in range(6)}
    assert [len(names[split]) for split in ("train", "validation", "test")] == [18, 6, 6]
    assert {int(count) for index in task.store.splits.values() for count in index.counts} == {16}
    pixels = np.array(task.store.pixels, dtype=float).reshape(30, 16, 28, 28)
    ink = pixels.sum((2, 3)).reshape(30, 4, 4).mean((0, 1))
    assert len(np.unique(pixels.reshape(480, -1), axis=0)) == 480
    # The files in their order are the faces, from light to bold.
    assert (np.diff(ink) > 0).all()

    again = task_of(folder, characters="LATIN,U+4E00-U+4E05", examples=16)
    assert names_of(again) == names
    np.testing.assert_array_equal(again.store.pixels, task.store.pixels)
    other = names_of(task_of(folder, characters="LATIN,U+4E00-4E05", split_seed=1))
    assert other != names
    assert set.union(*other.values()) == set.union(*names.values())


def test_a_letter_needs_faces_that_draw_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_family(tmp_path / "fonts", "ABCDEFGH")
    make_font(folder / "More.ttf", "ABCDIJKL", 130, B=0)
    make_font(folder / "Face100.ttf", "ABCDEFGH", 100, A=0, B=0)
    assert set.union(*names_of(task_of(folder, faces=4)).values()) == latin("ACDEFGH")
    assert "5 characters that are in fewer than 4 of the 5 faces" in caplog.text
    with pytest.raises(UsageError, match="is in 6 of the 5 faces"):
        _ = task_of(folder, faces=6).store


def test_a_collection_holds_several_faces(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    collection = TTCollection()
    collection.fonts = [TTFont(path) for path in sorted(family.iterdir())]
    (tmp_path / "fonts").mkdir()
    collection.save(tmp_path / "fonts" / "all.ttc")
    one = np.array(task_of(tmp_path / "fonts").store.pixels)
    np.testing.assert_array_equal(np.sort(one, 0), np.sort(np.array(task_of(family).store.pixels), 0))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (None, "aÞあ丁ק", "é1ａ ・"),
        ("HIRAGANA", "あ", "アa"),
        ("old italic, Kana", "𐌀ア", "あ𐎠"),
        ("U+4E00-9FFF,U+0030", "丁0", "1あ"),
        ("u+00c9", "É", "E"),
    ],
)
def test_characters(text: str | None, inside: str, outside: str) -> None:
    is_meant = parse_characters(text)
    assert [each for each in inside + outside if is_meant(each)] == list(inside)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("HIRAGNA", "did you mean 'HIRAGANA'"),
        ("U+9FFF-4E00", "not a range of codes"),
        ("U+XY", "not a range of codes"),
        (" ,", "'characters' is empty"),
    ],
)
def test_characters_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_characters(text)


@pytest.mark.slow
def test_a_run_on_fonts(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "fonts", LATIN + KANJI)
    run = metareg.train(
        "maml", task="font-folder", data=str(folder), out=tmp_path / "run", steps=2, ways=3, query=2, eval_query=2,
        eval_tasks=2, test_tasks=2, **{"model.width": 4},
    )  # fmt: skip
    assert run.evaluation is not None


# ------------------------------------------------------------------------------------------------------------ the split


def test_scripts_are_split_by_a_file_and_training_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = make_family(tmp_path / "fonts", LATIN + KANJI + "АВЖЯИЮЩЭ", А=ord("A"), В=ord("B"))
    (tmp_path / "split.yaml").write_text("train: [LATIN]\nvalidation: [HAN]\ntest: [CYRILLIC]\n")
    names = names_of(task_of(folder, split_by="script", split_file=str(tmp_path / "split.yaml")))
    assert len(names["test"]) == 8
    assert names["train"] == latin(LATIN) - latin("AB")
    assert "22/24/8 characters" in caplog.text
    assert "0 of the same split, 2 of another" in caplog.text


def test_letters_of_one_script_that_are_the_same_are_in_once(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "fonts", LATIN, B=ord("A"), C=ord("A"), D=ord("A"))
    for seed in range(2):
        names = set.union(*names_of(task_of(folder, split_seed=seed)).values())
        assert len(names & latin("ABCD")) == 1
        assert len(names) == len(LATIN) - 3


def test_letters_of_other_scripts_that_look_alike(tmp_path: Path) -> None:
    """T and τ, K and Ϗ, but not k and κ, look alike in DejaVu."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    for style in ("", "-Bold", "-Oblique", "-BoldOblique"):
        name = f"DejaVuSans{style}.ttf"
        (folder / name).symlink_to(Path(matplotlib.get_data_path(), "fonts", "ttf", name))
    (tmp_path / "split.csv").write_text("LATIN,train\nHEBREW,validation\nGREEK,test\n")
    chosen = {"characters": "U+0041-0054,U+006B,U+03BA,U+03C4,U+03CF,U+05D0-05D4", "split_by": "script"}
    names = names_of(task_of(folder, **chosen, split_file=str(tmp_path / "split.csv")))
    assert {"Greek small letter tau", "Greek capital kai symbol", "Greek small letter kappa"} <= names["test"]
    assert not latin("TK") & names["train"]
    assert {"Latin small letter k", "Latin capital letter b"} <= names["train"]


def test_letters_are_compared_as_the_formula_says() -> None:
    images = np.random.default_rng(0).random((12, 2, 16, 16)).astype(np.float32)
    images[6:] = images[:6] + 0.4 * images[6:]  # pairs of all distances
    images[3, 1] = images[7, 0] = 0  # faces that a letter lacks
    images[4, 0] = images[10, 1] = 0  # … and two letters without a common face
    first, second = images[:6], images[6:]
    expected: list[tuple[int, int, float]] = []
    for i, j, down, right in np.ndindex(6, 6, 3, 3):
        moved = np.roll(second[j], (down - 1, right - 1), (1, 2)).astype(float)
        shared = [face for face in range(2) if first[i, face].any() and moved[face].any()]
        distances = [
            np.sum((first[i, face] - moved[face]) ** 2) / min(np.sum(first[i, face] ** 2), np.sum(moved[face] ** 2))
            for face in shared
        ]
        if distances and np.mean(distances) < 0.5:
            expected.append((i, j, float(np.mean(distances))))
    found = sorted(find_alike(first, second, 0.5, 1))
    assert [pair[:2] for pair in found] == sorted(pair[:2] for pair in expected)
    np.testing.assert_allclose([pair[2] for pair in found], [pair[2] for pair in sorted(expected)], rtol=1e-4)
    assert {pair[:2] for pair in expected} != {pair[:2] for pair in find_alike(first, second, 0.5)}
    assert select_distinct(5, [(0, 1), (2, 1), (3, 2), (4, 4)]) == [0, 2, 4]


@pytest.mark.parametrize("form", ["table", "unihan"])
def test_groups_stay_together(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_family(tmp_path / "fonts", KANJI)
    group = {letter: number // 4 for number, letter in enumerate(KANJI[:-1])}
    lines = {
        "table": ["character,group", *(f"{letter},{radical}" for letter, radical in group.items())],
        "unihan": ["# Unihan", *(f"U+{ord(each):04X}\tkRSUnicode\t{group[each]}'.3 99.1" for each in group)],
    }[form]
    (tmp_path / "groups.txt").write_text("\n".join(lines), encoding="utf-8")
    names = names_of(task_of(folder, split_by="group", groups=str(tmp_path / "groups.txt")))
    assert "1 characters that are in no group" in caplog.text
    groups = [{group[chr(int(name[2:], 16))] for name in part} for part in names.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6
    assert all(groups)


def test_scripts_are_those_of_unicode() -> None:
    assert [find_script(each) for each in "aあア丁𐌀ϣ"] == [
        "LATIN",
        "HIRAGANA",
        "KATAKANA",
        "HAN",
        "OLD ITALIC",
        "COPTIC",
    ]


@pytest.mark.parametrize(
    ("options", "files", "words"),
    [
        ({"split_by": "group"}, {}, "require each other"),
        ({"groups": "groups.csv"}, {"groups.csv": "A,1"}, "require each other"),
        ({"split_by": "group", "groups": "none.csv"}, {}, "There is no file"),
        (
            {"split_by": "group", "groups": "groups.csv"},
            {"groups.csv": "A,1\nB,2\nA,2"},
            "puts the character 'A' into '1'",
        ),
        (
            {"split_by": "group", "groups": "groups.csv"},
            {"groups.csv": "character,group\nAB,1"},
            "contains 'AB' instead of one",
        ),
        (
            {"split_by": "group", "groups": "groups.csv"},
            {"groups.csv": "a,b,c\n1,2,3"},
            "columns 'character' and 'group'",
        ),
        ({"split_file": "split.csv"}, {"split.csv": "Å,train"}, "no character .* named 'Å'"),
        ({"ratios": [0, 0, 0]}, {}, "not all zero"),
        ({"characters": "HEBREW"}, {}, "None of the chosen characters"),
    ],
)
def test_wrong_options_are_one_sentence(
    options: dict[str, Any], files: dict[str, str], words: str, tmp_path: Path
) -> None:
    folder = make_family(tmp_path / "fonts")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = {name: str(tmp_path / options[name]) for name in ("groups", "split_file") if name in options}
    options |= paths
    with pytest.raises((UsageError, ValueError), match=words):
        _ = task_of(folder, **options).store


# ------------------------------------------------------------------------------------------------------- fonts of strangers


def test_what_is_no_font_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_family(tmp_path / "fonts" / "deep" / "deeper").parent.parent
    make_family(tmp_path / "elsewhere")
    (folder / "OFL.txt").write_text("a licence")
    (folder / "deep" / ".hidden.ttf").touch()
    (folder / "notes.ttf").write_text("no font at all")
    (folder / "half.ttf").write_bytes((folder / "deep" / "deeper" / "Face120.ttf").read_bytes()[:700])
    (folder / "empty.otf").touch()
    (folder / "gone.ttf").symlink_to(tmp_path / "nowhere.ttf")
    (folder / "same.ttf").symlink_to(folder / "deep" / "deeper" / "Face100.ttf")
    (folder / "around").symlink_to(tmp_path)
    (folder / "folder.ttf").mkdir()
    os.mkfifo(folder / "pipe.ttf")
    with (folder / "huge.ttf").open("wb") as file:
        file.truncate(1 << 29)
    with TTFont(folder / "deep" / "deeper" / "Face120.ttf") as without:
        without["cmap"].tables = []
        without.save(folder / "blind.ttf")
    assert len(set.union(*names_of(task_of(folder)).values())) == len(LATIN)
    first, second = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    for words in (
        "not regular files: pipe.ttf, gone.ttf",
        "links to fonts that are already included: same.ttf",
        "links to folders: around",
        "larger than 256 MiB: huge.ttf",
        "not fonts: 1 .txt",
        "hidden: deep/.hidden.ttf",
    ):
        assert words in first
    assert second.count(".ttf (") + second.count(".otf (") == 3
    assert second.endswith("and 1 more.")


def test_a_code_that_is_none_is_passed_over(tmp_path: Path) -> None:
    path = make_font(tmp_path / "font.ttf")
    with TTFont(path) as font:
        table = font.getBestCmap()
        wide = CmapSubtable.newSubtable(12)
        wide.platformID, wide.platEncID, wide.language = 3, 10, 0
        wide.cmap = {**table, 0x110000: "g65", 0xFFFFFFF0: "g66"}
        font["cmap"].tables = [wide]
        font.save(tmp_path / "wide.ttf")
    faces, unreadable = read_faces([tmp_path / "wide.ttf"])
    assert not unreadable
    assert list(faces.values()) == [frozenset(map(ord, LATIN))]


def test_a_folder_without_fonts(tmp_path: Path) -> None:
    (tmp_path / "fonts").mkdir()
    with pytest.raises(UsageError, match="There are no fonts in"):
        _ = task_of(tmp_path / "fonts").store
    (tmp_path / "fonts" / "a.ttf").write_text("no font")
    with pytest.raises(UsageError, match="None of the fonts"):
        _ = task_of(tmp_path / "fonts").store


def test_damaged_fonts_are_named_or_drawn_and_nothing_else(tmp_path: Path) -> None:
    content = make_font(tmp_path / "whole.ttf").read_bytes()
    refused = 0
    for seed in range(80):
        damage = random.Random(seed)
        changed = bytearray(content)
        for _ in range(damage.choice((1, 4, 30))):
            changed[damage.randrange(len(changed))] = damage.randrange(256)
        path = tmp_path / f"{seed}.ttf"
        path.write_bytes(changed)
        faces, unreadable = read_faces([path])
        refused += len(unreadable)
        assert len(faces) + len(unreadable) == 1
        for face in faces:
            assert {has_ink(letter, face) for letter in "ABC"} <= {True, False}
    assert 0 < refused < 80
