"""`bench` on outputs of a model, and on models: one table, one record, and the forms of others."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.results import leaderboard, records
from nbhelpers.runs.commands import main
from nbhelpers.systems import bench
from nbhelpers.systems.given_outputs import Given

N, K = 24, 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A caption file of two classes with repeated sentences, and outputs of two models for it."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    rows = [
        {
            "filename": f"{'pond' if row % 2 else 'road'}_{row}.png",
            "split": "test",
            "sentences": [{"raw": f"scene {row}"}, {"raw": f"shared {row % 4}"}],
        }
        for row in range(N)
    ]
    (tmp_path / "dataset_toy.json").write_text(json.dumps({"images": rows}))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N, 16)).astype(np.float32)
    texts = np.repeat(images, K, 0) + 1.5 * rng.standard_normal((N * K, 16)).astype(np.float32)
    for row in range(N):
        texts[row * K + 1] = texts[row % 4 * K + 1]
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts)]
    np.save(tmp_path / "scores.npy", unit[0] @ unit[1].T)
    return tmp_path


def asked(folder, *more):
    return [
        *("bench", "--captions", str(folder / "dataset_toy.json"), "--out", str(folder / "rec")),
        *more,
    ]


def embeddings(folder):
    return ["--images", str(folder / "images.npy"), "--texts", str(folder / "texts.npy")]


def report(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def means(found):
    return {row["model"]: row["mR"] for row in found["tables"][0]["rows"]}


def test_embeddings_scores_and_a_run_give_one_mean(folder, capsys):
    found = report(capsys, *asked(folder, *embeddings(folder), "--trec", str(folder / "trec")))
    by_scores = report(capsys, *asked(folder, "--similarity", str(folder / "scores.npy")))
    run = str(folder / "trec/toy/images.trec")
    by_run = report(capsys, *asked(folder, "--run", run, "--name", "mine"))
    scores = np.load(folder / "scores.npy")
    expected = recall.evaluate(scores, np.repeat(np.arange(N), K)).metrics["mR"]
    assert means(found)["images"] == pytest.approx(expected, abs=1e-9)
    assert means(by_scores)["scores"] == pytest.approx(expected, abs=1e-9)
    assert means(by_run)["mine"] == pytest.approx(expected, abs=0.5)  # 9 digits; scores may tie
    assert list(means(found)) == ["images", "chance", "classes alone", "ceiling"]
    assert means(found)["chance"] < means(found)["classes alone"] < means(found)["ceiling"]
    assert "24 images x 48 captions, 16 numbers each, float32" in found["notes"][0]


def test_a_record_names_its_protocol_and_tables_keep_protocols_apart(folder, capsys):
    argv = asked(folder, *embeddings(folder), "--protocol", "expectation")
    found = report(capsys, *argv, "--protocol", "any-owner", "--protocol", "unique-texts")
    assert [table["protocol"] for table in found["tables"]] == [
        *("expectation", "any-owner", "unique-texts")
    ]
    read = [records.read_checked(path) for path in found["records"]]
    assert [one["protocol"]["name"] for one in read] == ["expectation", "any-owner", "unique-texts"]
    assert read[0]["weights"][0]["sha256"] and "parameters" not in read[0]
    boards = leaderboard.boards(records.read(folder / "rec"))
    assert len({board.stem for board in boards}) == len(boards) == 3
    assert sum("protocol any-owner" in board.heading for board in boards) == 1
    assert "bench-seed0" in main_table(folder, capsys)


def main_table(folder, capsys):
    assert main(["records", "table", str(folder / "rec"), "--format", "latex"]) == 0
    return capsys.readouterr().out


def test_the_bridge_shows_every_protocol_with_a_sentence(folder, capsys):
    argv = asked(folder, *embeddings(folder), "--protocol", "all")
    assert main(argv) == 0
    said = capsys.readouterr().out
    for protocol in ("released", "optimistic", "any-owner", "unique-texts", "prefix", "capitalize"):
        assert f"- {protocol}: " in said
    assert "moves 856 images from train to val" in said and "1,093" in said
    (bridge,) = report(capsys, *argv)["bridges"].values()
    rows = {row["protocol"]: row for row in bridge}
    assert rows["any-owner"]["difference"] > 0 and rows["prefix"]["mR"] is None
    assert rows["unique-texts"]["captions"] == N + 4


def test_the_forms_of_others_are_read_by_their_libraries(folder, capsys):
    places = {form: folder / form for form in ("csv", "latex", "mteb", "card")}
    options = [word for form, path in places.items() for word in (f"--{form}", str(path))]
    mean = means(report(capsys, *asked(folder, *embeddings(folder), *options)))["images"]
    frame = pd.read_csv(places["csv"]).set_index("model")
    assert frame.mR["images"] == pytest.approx(mean, abs=1e-6)
    assert set(frame.protocol) == {"expectation"}
    assert r"\toprule" in places["latex"].read_text() and "images" in places["latex"].read_text()
    block = (places["card"] / "images/toy-expectation-model-index.md").read_text()
    index = yaml.safe_load(block.strip("-\n"))["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "images" and results[-1].metric_value == pytest.approx(mean, abs=1e-4)
    hub = (places["card"] / "images/.eval_results/toy-expectation.yaml").read_text()
    entries = parse_eval_result_entries(yaml.safe_load(hub))
    assert entries[-1].task_id == "mR" and "protocol expectation" in entries[-1].notes
    t2i = json.loads((places["mteb"] / "images/toy-expectation-t2i.json").read_text())
    (scores,) = t2i["scores"]["test"]
    assert scores["main_score"] == scores["ndcg_at_10"] <= scores["recall_at_10"]


def test_a_wrong_order_and_equal_captions_with_other_vectors_are_pointed_out(folder, capsys):
    texts = np.load(folder / "texts.npy")
    np.save(folder / "texts.npy", texts[::-1])
    assert main(asked(folder, *embeddings(folder))) == 0
    said = capsys.readouterr().err
    assert "probably not in the order of the captions file" in said
    assert "repeat a sentence but not its embedding" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give one of --model with --set"),
        (["--images", "{}/images.npy"], "--images are compared with --texts; give both"),
        (["--similarity", "{}/scores.npy", "--run", "{}/x"], "Give one of --model"),
        (["--similarity", "{}/no.npy"], "no.npy does not exist; give --similarity"),
        (
            ["--similarity", "{}/scores.npy", "--set", "ucm"],
            "--set belongs to --model; leave it out",
        ),
        (["--similarity", "{}/scores.npy", "--prompt", "a {}"], "--prompt belongs to --model"),
        (["--similarity", "{}/scores.npy", "--activation", "gelu"], "--activation belongs to"),
        (["--similarity", "{}/scores.npy", "--data", "{}"], "--data belongs to --model"),
        (["--model", "pir", "--set", "ucm"], "--captions belongs to outputs; leave it out"),
        (["--similarity", "{}/scores.npy", "--csv", "{}"], "is a folder; give --csv the name of"),
        (["--similarity", "{}/scores.npy", "--trec", "{}/texts.npy/x"], "give --trec a folder"),
        (["--similarity", "{}/scores.npy", "--out", "{}/texts.npy"], "give --out a folder"),
        (["--model", "pir"], "give --set, too"),
        (["--similarity", "{}/scores.npy", "--protocol", "best"], "Unknown protocol 'best'"),
        (["--similarity", "{}/scores.npy", "--protocol", "prefix"], "must encode them again"),
        (["--similarity", "{}/scores.npy", "--calibrate"], "calibrate on rsicd, rsitmd, ucm"),
        (["--similarity", "{}/scores.npy", "--split", "val"], "has no image in split 'val'"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(folder, capsys, options, message):
    argv = asked(folder, *(option.format(folder) for option in options))
    assert main(argv) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "rec").exists()


def test_outputs_without_captions_are_refused(folder, capsys):
    assert main(["bench", "--similarity", str(folder / "scores.npy")]) == 1
    assert "give it with --captions" in capsys.readouterr().err


def test_models_of_a_list_are_compared(folder, capsys, monkeypatch):
    """Two functions on a set of pictures, from a YAML file: one table and a paired test."""
    from PIL import Image

    (folder / "pictures").mkdir()
    rows = json.loads((folder / "dataset_toy.json").read_text())["images"]
    for row, one in enumerate(rows):
        Image.new("RGB", (8, 8), (10 * row, 0, 0)).save(folder / "pictures" / one["filename"])
    (folder / "bench_toys.py").write_text(
        "import numpy as np\n"
        "def reds():\n"
        "    see = lambda pictures: [[np.asarray(p)[0, 0, 0] / 255, 1] for p in pictures]\n"
        "    read = lambda texts: [[int(t.split()[-1]) / 25.5, 1] for t in texts]\n"
        "    return see, read\n"
        "def none():\n"
        "    return (lambda pictures: np.ones((len(pictures), 2)),\n"
        "            lambda texts: np.ones((len(texts), 2)))\n"
    )
    monkeypatch.syspath_prepend(folder)
    sets = f"{folder / 'dataset_toy.json'}={folder / 'pictures'}"
    (folder / "list.yaml").write_text(
        yaml.safe_dump({"models": ["bench_toys:reds", "bench_toys:none"], "sets": [sets]})
    )
    found = report(capsys, "bench", "--list", str(folder / "list.yaml"))
    (pair,) = found["tables"][0]["tests"]
    assert means(found)["bench_toys:none"] == pytest.approx(means(found)["chance"])
    assert pair["difference"] == pytest.approx(
        means(found)["bench_toys:reds"] - means(found)["bench_toys:none"]
    )
    assert len(found["records"]) == 2
    (folder / "list.yaml").write_text("modells: [a]")
    assert main(["bench", "--list", str(folder / "list.yaml")]) == 1
    assert "the key modells; it may have models, sets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [a", "is no YAML"),
        ("- a", "has no keys; it may have models"),
        ("models: 5\nsets: [x]", "has 5 under models; write names there"),
        ("models: {a: b}\nsets: [x]", "has {'a': 'b'} under models"),
        ("models: [[a]]\nsets: [x]", "has ['a'] under models"),
        ("models: [a]\nsets: [x]\nsplit: tst", "has the split tst; choose one of train, val, test"),
        ("models: [a]\nsets: [x]\nprompt: [a, b]", "has ['a', 'b'] under prompt"),
        ("models:\nsets: [x]", "Give one of --model with --set"),
        ("models: [a]\nsets: ['=']", "has '='; write CAPTIONS=IMAGES, two paths"),
        ("models: ['']\nsets: [x]", "The set 'x' is not generated"),
    ],
)
def test_lists_that_cannot_be_followed_are_refused(folder, capsys, text, message):
    (folder / "list.yaml").write_text(text)
    assert main(["bench", "--list", str(folder / "list.yaml")]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_ids_of_scores_order_their_rows(folder, capsys):
    scores = np.load(folder / "scores.npy")
    order = np.random.default_rng(0).permutation(N)
    ids = [f"{'pond' if row % 2 else 'road'}_{row}.png" for row in order]
    np.savez(folder / "turned.npz", ids=np.array(ids), scores=scores[order])
    found = report(capsys, *asked(folder, "--similarity", str(folder / "turned.npz")))
    right = report(capsys, *asked(folder, "--similarity", str(folder / "scores.npy")))
    assert means(found)["turned"] == means(right)["scores"]
    assert "rows ordered by their ids, columns in the order of the list" in found["notes"][0]


def test_one_embedding_for_all_is_pointed_out(folder, capsys):
    np.save(folder / "texts.npy", np.ones((N * K, 16)))
    assert main(asked(folder, *embeddings(folder))) == 0
    assert "all captions have one embedding" in capsys.readouterr().err


def test_equal_scores_are_not_called_a_wrong_order(folder, capsys):
    np.save(folder / "scores.npy", np.ones((N, N * K)))
    assert main(asked(folder, "--similarity", str(folder / "scores.npy"))) == 0
    said = capsys.readouterr().err
    assert "all scores are equal" in said and "not in the order" not in said


def test_infinite_scores_are_refused_and_missing_ones_may_be_minus_infinity(folder, capsys):
    argv = asked(folder, "--similarity", str(folder / "scores.npy"))
    scores = np.load(folder / "scores.npy")
    scores[5, scores[5].argmax()] = np.inf
    np.save(folder / "scores.npy", scores)
    assert main(argv) == 1
    assert "holds infinity in row 5; look for a number that overflowed" in capsys.readouterr().err
    assert not (folder / "rec").exists()
    scores[5][np.isinf(scores[5])] = -np.inf
    np.save(folder / "scores.npy", scores)
    assert main(argv) == 0


@pytest.mark.parametrize(("ending", "by"), [(".npy", "numpy.save"), (".npz", "numpy.savez")])
@pytest.mark.parametrize("content", [b"\x89PNG", b"[[1, 2]]", pickle.dumps([[1.0]])])
def test_a_file_of_another_form_is_called_so(folder, capsys, ending, by, content):
    path = folder / f"other{ending}"
    path.write_bytes(content)
    assert main(asked(folder, "--similarity", str(path))) == 1
    said = capsys.readouterr().err
    assert f"is no {ending} file, only called so; write it with {by}." in said
    scores = np.load(folder / "scores.npy")
    np.save(path, scores) if ending == ".npy" else np.savez(path, scores)
    assert main(asked(folder, "--similarity", str(path))) == 0


@pytest.mark.parametrize("protocol", ["expectation", "any-owner"])
@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        (1e30, [], "Row 0 of the images is too long for float32; divide all"),
        (1e200, [], "Row 0 of the images holds NaN or infinity"),
        (1e-200, [], "Row 0 of the images is zero and has no direction"),
        (1e19, ["--no-normalise"], "Row 0 of the images is too long for float32"),
    ],
)
def test_numbers_beyond_float32_are_refused(folder, capsys, protocol, scale, options, message):
    for name in ("images", "texts"):
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy").astype(float) * scale)
    argv = asked(folder, *embeddings(folder), "--protocol", protocol, *options)
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (folder / "rec").exists()


def scored(name, mean):
    """A result on a set of this name whose mR is given."""
    images = pd.DataFrame({"image_id": ["a"], "file": ["a"], "split": "test", "scene": ""})
    table = CaptionTable(name, images, pd.DataFrame({"image_id": ["a"], "text": ["x"]}))
    hits = np.full((1, 3), mean / 100)
    found = recall.Recall("expectation", (1, 5, 10), np.zeros(1), np.zeros(1), hits, hits)
    given = Given("clip", "0" * 64)
    return bench.Result(given, table, "expectation", {"expectation": found}, [0], None, 0.0)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (33.2, "uses the field's protocol"),
        (31.0, "GELU instead of QuickGELU"),
        (5.0, "wrong order"),
        (50.0, "equal texts may count"),
    ],
)
def test_a_calibration_says_what_a_deviation_means(mean, message):
    assert message in bench.calibrate(scored("UCM", mean))


def test_a_set_without_a_known_number_cannot_calibrate():
    with pytest.raises(UserError, match="Nobody published CLIP ViT-B/32 on scenes"):
        bench.calibrate(scored("scenes", 20))


def test_outputs_are_evaluated_without_torch(folder):
    argv = asked(folder, *embeddings(folder))
    code = (
        "import sys; from nbhelpers.runs.commands import main;"
        f"code = main({argv!r}); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
