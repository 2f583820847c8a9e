"""The command line: exit codes, sentences on stderr, no traceback, nothing heavy imported for small
questions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from nbhelpers.__main__ import main
from nbhelpers.runs import batch, commands, needs, options, stored_notebooks
from nbhelpers.systems import trained_files

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "transformers", "jsonschema", "scipy", "nbformat")


def captions(folder, **changes):
    rows = [
        {"filename": f"pond_{i}.jpg", "split": split, "sentences": [{"raw": "a pond"}] * 5}
        for i, split in enumerate(("train", "val", "test"))
    ]
    rows[0] |= changes
    path = folder / "dataset_tiny.json"
    path.write_text(json.dumps({"images": rows}))
    return str(path)


def pictures(folder):
    (folder / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / "images" / f"pond_{number}.png")
    return str(folder / "images")


def alone(*argv):
    """Run a command in a process of its own: exit code, output, errors, heavy packages."""
    code = (
        "import sys; from nbhelpers.__main__ import main; code = main(sys.argv[1:]); "
        f"print(*[name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert "Traceback" not in done.stderr
    *lines, heavy = done.stdout.splitlines()
    return done.returncode, "\n".join(lines), done.stderr, heavy.split()


def every_command(command=None, words=()):
    """Words of each command and group of commands."""
    command = command or get_command(commands.app)
    found = [list(words)]
    for name, inner in getattr(command, "commands", {}).items():
        found += every_command(inner, [*words, name])
    return found


# ---- data
def test_check_of_good_captions_exits_0(tmp_path, capsys):
    assert main(["data", "check", "--captions", captions(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "layout      karpathy" in out and "not looked at" in out and err == ""


def test_check_exits_1_with_one_line_per_class_of_problem(tmp_path, capsys):
    argv = ["data", "check", "--captions", captions(tmp_path, split="tset", sentences=[])]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert "layout" in out
    assert len(err.splitlines()) == 2
    assert all(line.startswith("problem: ") for line in err.splitlines())
    assert "unknown split" in err and "no image in split 'train'" in err


def test_check_as_json(tmp_path, capsys):
    assert main(["data", "check", "--captions", captions(tmp_path, split="tset"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "karpathy" and found["known_set"] is None
    one = {"images": 1, "captions": 5}
    assert found["splits"] == {"val": one, "test": one}
    assert found["captions"]["val"]["distinct"] == 1 and found["images_by_captions"] == {"5": 2}
    assert len(found["problems"]) == 2 and "unknown split" in found["problems"][0]


def test_check_of_an_unreadable_file(tmp_path, capsys):
    broken = tmp_path / "x.json"
    broken.write_text("{")
    assert main(["data", "check", "--captions", str(broken), "--layout", "karpathy"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_is_one_line_on_stderr(capsys):
    assert main(["data", "prepare", "--set", "ucm"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'ucm' is not generated" in err


def shards(folder):
    named = ["--captions", captions(folder), "--images", pictures(folder)]
    return ["data", "shards", *named, "--out", str(folder / "out")]


def test_shards_are_written_and_checked_without_torch(tmp_path, capsys):
    assert main([*shards(tmp_path), "--split", "train", "test", "--size", "4"]) == 0
    assert capsys.readouterr() == (f"10 samples in 4 shards lie in {tmp_path / 'out'}.\n", "")
    packed = str(tmp_path / "out")
    code, out, _, heavy = alone("data", "check", "--captions", packed, "--images", packed)
    assert code == 0 and "2 of 2 found and read" in out and "torch" not in heavy


@pytest.mark.parametrize(
    "more, words",
    [
        (["--size", "0"], "at least 1 sample"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--captions", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_shards_that_cannot_be_written_leave_nothing(more, words, tmp_path, capsys):
    assert main([*shards(tmp_path), *more]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err and not (tmp_path / "out").exists()


def test_shards_of_a_split_without_images_leave_nothing(tmp_path, capsys):
    argv = shards(tmp_path)
    captions(tmp_path, split="val")
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and "no image in split 'train'" in err and not (tmp_path / "out").exists()


# ---- help and errors
@pytest.mark.parametrize("words", every_command(), ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(words, option, capsys):
    assert main([*words, option]) == 0
    out, err = capsys.readouterr()
    assert "Usage: " in out and err == ""
    described = out.split("\n\n")[1].strip()
    assert described.endswith(".") or "\n" in described


@pytest.mark.parametrize("words", [[], ["data"], ["weights"], ["records"]], ids=" ".join)
def test_a_bare_call_lists_the_commands(words, capsys):
    assert main(words) == 2
    assert "Commands:\n" in "".join(capsys.readouterr())


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nbhelpers 0.")


def test_help_shows_the_choices(capsys):
    assert main(["eval", "--help"]) == 0
    out = capsys.readouterr().out
    assert "pir|pir_clip|pe_rsitr|cfitr" in out and "train|val|test" in out


def test_choices_are_the_systems():
    assert options.Trainable.__args__ == (*trained_files.SYSTEMS, "clip")
    assert (*trained_files.RETRIEVAL, "bita") == trained_files.SYSTEMS


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["data", "check"],
        ["notebooks", "burn"],
        ["run", "--seeds", "one"],
        ["run", "--seeds"],
        ["run", "--profil-e", "ucm"],
        ["data", "check", "--captions", "x", "--extra"],
        ["data", "shards", "--captions", "x"],
        ["data", "shards", "--captions", "x", "--images", "y", "--out", "z", "--split", "dev"],
        ["eval", "--system", "pir"],
        ["eval", "--system", "clip", "--captions", "x", "--images", "y"],
        ["eval", "--system", "pir", "--captions", "x", "--images", "y", "--ties", "luck"],
        ["eval", "--system", "pir", "--captions", "x", "--images", "y", "--split", "dev"],
        ["train"],
        ["train", "--system", "clip"],
        ["caption"],
        ["caption", "--system", "pir", "--images", "y"],
        ["cache"],
        ["cache", "burn"],
        ["search", "--system", "pir", "--images", "y"],
        ["search", "--system", "pir", "--images", "y", "--text", "t", "--image", "i"],
        ["weights", "push", "c"],
        ["weights", "pull", "a/b"],
        ["records", "list"],
        ["records", "show"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_2(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Error: " in err


@pytest.mark.parametrize("command", ["eval", "search"])
def test_bita_is_refused_where_systems_retrieve(command):
    named = ["--captions", "x"] if command == "eval" else ["--text", "x"]
    code, _, err, heavy = alone(command, "--system", "bita", "--images", "y", *named)
    assert code == 2 and "BITA writes captions" in err and heavy == []


MISSING = "missing.json does not exist"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["eval", "--system", "pir", "--captions", "missing.json", "--images", "."], MISSING),
        (["search", "--system", "pir", "--images", "missing.json", "--text", "x"], MISSING),
        (["search", "--system", "pir", "--images", ".", "--image", "missing.json"], MISSING),
        (
            ["search", "--system", "pir", "--images", ".", "--text", "x", "--profile", "my-own"],
            "my-own has no trained pir of seed 0 yet; run 20_pir first.",
        ),
        (
            ["search", "--system", "pir", "--images", ".", "--text", "x", "--start", "here.json"],
            "--start belongs to a --checkpoint",
        ),
        (
            ["eval", "--system", "pir", "--captions", ".", "--images", ".", "--k", "5"],
            "pir searches in one stage",
        ),
        (["caption", "--images", ".", "--checkpoint", "missing.json"], MISSING),
        (["caption", "--images", ".", "--beams", "0"], "ask for at least 1"),
        (["score", "--captions", "missing.json", "--references", "."], MISSING),
        (["weights", "heads", "missing.json", "--out", "x"], MISSING),
        (["weights", "push", "missing.json", "me/mine"], MISSING),
        (["train", "--system", "pir", "--profile", "nope"], "There is no profile 'nope'"),
        (["run", "--profile", "nope"], "There is no profile 'nope'"),
        (["records", "table", "missing.json"], MISSING),
    ],
    ids=" ".join,
)
def test_mistakes_are_found_before_anything_heavy_is_imported(argv, sentence):
    code, out, err, heavy = alone(*argv)
    assert code == 1 and out == "" and err.count("\n") == 1 and sentence in err
    assert heavy == []


@pytest.mark.parametrize("argv", [["--help"], ["eval", "--help"], ["--version"], ["cache", "show"]])
def test_small_questions_import_nothing_heavy(argv):
    code, out, _, heavy = alone(*argv)
    assert code == 0 and out and heavy == []


def test_the_package_and_a_check_of_captions_import_nothing_heavy(tmp_path):
    code = f"import sys, nbhelpers; sys.exit(any(name in sys.modules for name in {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    argv = ["data", "check", "--captions", captions(tmp_path, filename="/x")]
    code, _, err, heavy = alone(*argv)
    assert code == 1 and "leave the image folder" in err and heavy == []


@pytest.mark.parametrize(
    "words, expected",
    [
        ("nbhelpers sea", ["search"]),
        ("nbhelpers search --system pir_", ["pir_clip"]),
        ("nbhelpers eval --split t", ["train", "test"]),
    ],
)
def test_a_shell_completes_commands_and_choices(words, expected):
    code = "import sys; from nbhelpers.__main__ import main; sys.argv[0] = 'nbhelpers'; main()"
    asked = {"_NBHELPERS_COMPLETE": "complete_bash", "COMP_WORDS": words}
    asked["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == expected


# ---- several values after one option
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--seeds 0 1 2", "--seeds 0 --seeds 1 --seeds 2"),
        ("--seeds 0 -1 --upto 20", "--seeds 0 --seeds -1 --upto 20"),
        ("a b --seeds 3", "a b --seeds 3"),
        ("--upto 20 x --seeds 1 2", "--upto 20 x --seeds 1 --seeds 2"),
        ("--seeds 1 --seeds 2", "--seeds 1 --seeds 2"),
        ("--seeds 1 -h", "--seeds 1 -h"),
        ("--seeds --upto 20", "--seeds --upto 20"),
    ],
)
def test_an_option_is_repeated_before_each_of_its_values(words, expected):
    assert options.repeat_options(words.split(), {"--seeds"}) == expected.split()


@pytest.mark.parametrize(
    "argv, room, function, seen",
    [
        (
            ["run", "--profile", "ucm", "--data", "d", "--seeds", "3", "4", "--upto", "20"],
            batch,
            "run_chain",
            ("ucm", "d", [3, 4], "20", None),
        ),
        (["run"], batch, "run_chain", ("default", "", None, "", None)),
        (["train", "--system", "pir", "--seed", "3"], batch, "train", ("pir", "default", "", 3)),
        (["notebooks", "verify", "20", "30"], stored_notebooks, "verify", (["20", "30"],)),
    ],
)
def test_commands_hand_over_to_their_rooms(argv, room, function, seen, monkeypatch):
    calls = []
    monkeypatch.setattr(needs, "require", lambda *given: None)
    monkeypatch.setattr(room, function, lambda *given, **named: calls.append(given) or [])
    main(argv)
    assert calls == [seen]


def test_the_exit_code_of_a_run_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(batch, "run_chain", lambda *given, **named: 5)
    assert main(["run"]) == 5
    monkeypatch.setattr(stored_notebooks, "verify", lambda names: ["20_pir.ipynb holds an error"])
    assert main(["notebooks", "verify"]) == 1


def test_an_interrupt_exits_130(monkeypatch, capsys):
    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_chain", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_json_holds_no_nan(capsys):
    options.print_json({"a": [float("nan"), 1.5], "b": (float("inf"), "é")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None, "é"]}
