"""What a notebook was made of is told by content: bytes of files, syntax trees of code."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbhelpers.errors import UserError
from nbhelpers.runs import freshness


def test_the_sources_are_what_a_notebook_may_use():
    names = {path.name for path in freshness.sources()}
    assert {"style.py", "scene_captions.py", "pir.py", "pir.md", "search_panel.css"} <= names
    assert not {"batch.py", "stored.py", "__main__.py", "README.md"} & names


CODE = 'import os\n\ndef f(x: int = 1):\n    """Says."""\n    return x + 1  # one more\n'


@pytest.mark.parametrize(
    "changed, same",
    [
        (
            (
                'import os\ndef f(x: int=1):\n    """Says more."""\n    # a comment\n    return (x'
                " + 1)\n"
            ),
            True,
        ),
        (CODE.replace("x + 1", "x + 2"), False),
        (CODE.replace("= 1", "= 2"), False),
        (CODE + "a = f()\nb = f(2)\n", False),
    ],
)
def test_a_comment_does_not_count_and_a_computation_does(tmp_path, monkeypatch, changed, same):
    (source := tmp_path / "a.py").write_text(CODE)
    monkeypatch.setattr(freshness, "sources", lambda: [source])

    def digests(code: str) -> tuple[str, str]:
        source.write_text(code)
        cells = [new_markdown_cell(code), new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
        return freshness.package(), freshness.cells(tmp_path / "a.ipynb")

    before, after = digests(CODE), digests(changed)
    assert [one == other for one, other in zip(before, after, strict=True)] == [same, same]


def test_the_order_of_statements_and_what_is_imported_count():
    lines = (
        "from numpy.random import default_rng\nrng = default_rng(0)\na = rng.random()\nb ="
        " rng.random()\n"
    )
    swapped = lines.replace("a =", "c =").replace("b =", "a =").replace("c =", "b =")
    other = lines.replace("numpy.random", "elsewhere")
    assert len({freshness._code(text) for text in (lines, swapped, other)}) == 3
    assert freshness._code(f"{lines}# a comment\n") == freshness._code(lines)


def test_a_cell_that_is_no_python_counts_as_it_is_written(tmp_path):
    found = []
    for line in ("%time x", "%time y"):
        nbformat.write(new_notebook(cells=[new_code_cell(line)]), tmp_path / "a.ipynb")
        found.append(freshness.cells(tmp_path / "a.ipynb"))
    assert found[0] != found[1]


def test_the_files_of_a_set_are_found_by_its_name(tmp_path):
    for name in (
        "dataset_ucm.json",
        "ucm_images.zip",
        "UCM_train.json",
        "ucmerced.zip",
        "dataset_rsicd.json",
        "x.csv",
    ):
        (tmp_path / name).touch()

    def names(values: dict, *patterns: str) -> set[str]:
        return {
            path.name
            for path in freshness.files({"DATA": str(tmp_path)} | values, tmp_path, patterns)
        }

    ucm = {"dataset_ucm.json", "ucm_images.zip", "UCM_train.json"}
    assert names({"SET": "ucm"}) == ucm
    assert names({"SET": "ucm", "CAPTION_SETS": ["rsicd"]}) == ucm | {"dataset_rsicd.json"}
    assert names({"SET": "ucm"}, "dataset_*.json") == ucm | {"dataset_rsicd.json"}
    assert names({"SET": "scenes", "CHECKPOINT": "x.csv", "CLIP": "clip_vit_b32"}) == {"x.csv"}
    assert freshness.files({"SET": "ucm", "DATA": ""}, tmp_path) == []


def test_a_folder_of_the_set_itself_counts_whole(tmp_path):
    (own := tmp_path / "ucm").mkdir()
    (own / "dataset.json").touch()
    assert freshness.files({"SET": "ucm", "DATA": "ucm"}, tmp_path) == [own]


def test_bytes_and_names_count_and_times_do_not(tmp_path):
    def digest_after(change) -> str:
        change()
        return freshness.digest(folder)

    (folder := tmp_path / "images").mkdir()
    (file := folder / "1.png").write_bytes(b"one")
    before, kept = freshness.digest(folder), file.stat()
    assert digest_after(lambda: os.utime(file)) == before

    def replace_unseen() -> None:
        file.write_bytes(b"two")
        os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))

    found = [
        before,
        digest_after(replace_unseen),
        digest_after(lambda: file.rename(folder / "2.png")),
        digest_after(lambda: (folder / "3.png").touch()),
    ]
    assert len(set(found)) == 4


def test_a_linked_folder_is_read_and_one_that_holds_itself_ends(tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (folder := tmp_path / "images").mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "itself").symlink_to(folder)
    before = freshness.digest(folder)
    (elsewhere / "1.png").touch()
    assert freshness.digest(folder) != before


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.zip cannot be read \\(No such file"):
        freshness.digest(Path(tmp_path / "gone.zip"))
