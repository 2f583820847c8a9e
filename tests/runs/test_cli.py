"""The command line: exit codes, sentences on stderr, no traceback, nothing heavy imported for small
questions.
"""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from nbhelpers.__main__ import main

REPOSITORY = Path(__file__).parents[2]


def captions(folder, **changes):
    rows = [
        {"filename": f"pond_{i}.jpg", "split": split, "sentences": [{"raw": "a pond"}] * 5}
        for i, split in enumerate(("train", "val", "test"))
    ]
    rows[0] |= changes
    path = folder / "dataset_tiny.json"
    path.write_text(json.dumps({"images": rows}))
    return str(path)


def test_check_of_good_captions_exits_0(tmp_path, capsys):
    assert main(["data", "check", "--captions", captions(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "layout      karpathy" in out and "not looked at" in out and err == ""


def test_check_exits_1_with_one_line_per_class_of_problem(tmp_path, capsys):
    assert (
        main(["data", "check", "--captions", captions(tmp_path, split="tset", sentences=[])]) == 1
    )
    out, err = capsys.readouterr()
    assert "layout" in out
    assert len(err.splitlines()) == 2 and all(
        line.startswith("problem: ") for line in err.splitlines()
    )
    assert "unknown split" in err and "no image in split 'train'" in err


def test_check_of_an_unreadable_file(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert (
        main(["data", "check", "--captions", str(tmp_path / "x.json"), "--layout", "karpathy"]) == 1
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["data", "prepare", "--set", "ucm"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'ucm' is not generated" in err


def pictures(folder):
    (folder / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / "images" / f"pond_{number}.png")
    return str(folder / "images")


def test_shards_are_written_and_checked_without_torch(tmp_path, capsys):
    argv = [
        "data",
        "shards",
        "--captions",
        captions(tmp_path),
        "--images",
        pictures(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--split", "train", "test", "--size", "4"]) == 0
    assert capsys.readouterr() == (f"10 samples in 4 shards lie in {tmp_path / 'out'}.\n", "")
    code = (
        "import sys; from nbhelpers.__main__ import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    check = [
        "data",
        "check",
        "--captions",
        str(tmp_path / "out"),
        "--images",
        str(tmp_path / "out"),
    ]
    found = subprocess.run(
        [sys.executable, "-c", code, *check], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (
        found.returncode == 0
        and "2 of 2 found and read" in found.stdout
        and found.stdout.endswith("False\n")
    )


@pytest.mark.parametrize(
    "more, words",
    [
        (["--split", "dev"], "no image in split 'dev'"),
        (["--size", "0"], "at least 1 sample"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--captions", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_shards_that_cannot_be_written_leave_nothing(more, words, tmp_path, capsys):
    argv = [
        "data",
        "shards",
        "--captions",
        captions(tmp_path),
        "--images",
        pictures(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*argv, *more]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err and not (tmp_path / "out").exists()


def test_as_a_program_without_traceback_and_without_torch(tmp_path):
    code = (
        "import sys; from nbhelpers.__main__ import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules); sys.exit(code)"
    )
    argv = ["data", "check", "--captions", captions(tmp_path, filename="/x")]
    found = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (
        found.returncode == 1
        and "Traceback" not in found.stderr
        and "leave the image folder" in found.stderr
    )
    assert found.stdout.endswith("False False\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["data"],
        ["nothing"],
        ["data", "check"],
        ["notebooks", "burn"],
        ["run", "--seeds", "one"],
        ["run", "--profil-e", "ucm"],
        ["data", "check", "--captions", "x", "--extra"],
        ["data", "shards", "--captions", "x"],
        ["eval", "--system", "pir"],
        ["train"],
        ["caption"],
        ["cache"],
        ["cache", "burn"],
        ["search", "--system", "pir", "--images", "y"],
        ["weights", "push", "c"],
        ["weights", "pull", "a/b"],
        ["search", "--system", "pir", "--images", "y", "--text", "t", "--image", "i"],
        [
            "eval",
            "--system",
            "pir",
            "--checkpoint",
            "c",
            "--captions",
            "x",
            "--images",
            "y",
            "--ties",
            "luck",
        ],
    ],
)
def test_a_wrong_command_line_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, room, function, seen",
    [
        (
            ["run", "--profile", "ucm", "--data", "d", "--seeds", "3", "4", "--upto", "20"],
            "batch",
            "main",
            {"profile": "ucm", "data": "d", "seeds": [3, 4], "upto": "20", "jobs": None},
        ),
        (
            ["run"],
            "batch",
            "main",
            {"profile": "default", "data": "", "seeds": None, "upto": "", "jobs": None},
        ),
        (
            ["train", "--system", "pir", "--seed", "3"],
            "batch",
            "train_main",
            {"system": "pir", "profile": "default", "data": "", "seed": 3},
        ),
        (
            ["notebooks", "store", "20", "30"],
            "batch",
            "notebooks_main",
            {"action": "store", "names": ["20", "30"]},
        ),
        (
            ["records", "list", "--profile", "ucm"],
            "record_commands",
            "main",
            ["list", "--profile", "ucm"],
        ),
    ],
)
def test_commands_hand_over_to_their_rooms(argv, room, function, seen, monkeypatch):
    calls = []
    stand_in = types.ModuleType(f"nbhelpers.{room}")
    setattr(stand_in, function, lambda given: calls.append(given) or 5)
    monkeypatch.setitem(sys.modules, f"nbhelpers.{room}", stand_in)
    monkeypatch.setattr(f"nbhelpers.{room}", stand_in, raising=False)
    assert main(argv) == 5
    given = (
        calls[0] if isinstance(calls[0], list) else {key: getattr(calls[0], key) for key in seen}
    )
    assert given == seen
