import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.systems import bench, given_outputs

N, K, D = 20, 2, 8


@pytest.fixture
def table():
    ids = [f"im{row}" for row in range(N)]
    images = pd.DataFrame(
        {"image_id": ids, "file": [f"{one}.tif" for one in ids], "split": "test", "scene": "x"}
    )
    captions = [(one, f"{one} text {k}") for one in ids for k in range(K)]
    return CaptionTable("toy", images, pd.DataFrame(captions, columns=["image_id", "text"]))


@pytest.fixture
def outputs(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N, D)).astype(np.float32)
    texts = np.repeat(images, K, 0) + rng.standard_normal((N * K, D)).astype(np.float32)
    return images, texts


def saved(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / f"{name}.npy" for name in arrays]


def mean(given, table):
    return bench.evaluate(given, table).recall.metrics["mR"]


@pytest.fixture
def expected(tmp_path, outputs, table):
    images, texts = outputs
    return mean(given_outputs.embeddings(*saved(tmp_path, i=images, t=texts), table), table)


def test_npy_is_mapped_and_said(tmp_path, outputs, table):
    images, texts = outputs
    found = given_outputs.embeddings(
        *saved(tmp_path, i=images.astype(np.float16), t=texts.astype(np.float64)), table
    )
    assert isinstance(found.images, np.memmap)
    assert found.notes == [
        "20 images x 40 captions, 8 numbers each, float16 read as float32 and float64 read as"
        " float32; rows in the order of the list"
    ]


def shuffled(images, texts, order, other):
    """Rows in another order, and their ids."""
    ids = [f"im{row}.png" for row in order]
    called = [f"im{row // K}#{row % K}" for row in other]
    return images[order], texts[other], ids, called


@pytest.mark.parametrize("form", ["npz", "safetensors", "parquet"])
def test_ids_bring_rows_into_order(tmp_path, outputs, table, expected, form):
    rng = np.random.default_rng(1)
    rows = shuffled(*outputs, rng.permutation(N), rng.permutation(N * K))
    files = [tmp_path / f"images.{form}", tmp_path / f"texts.{form}"]
    for path, vectors, ids in zip(files, rows[:2], rows[2:], strict=True):
        if form == "npz":
            np.savez(path, ids=np.array(ids), embeddings=vectors)
        elif form == "safetensors":
            tensors = {"embeddings": np.ascontiguousarray(vectors)}
            save_file(tensors, path, {"ids": json.dumps(ids)})
        else:
            parquet.write_table(pa.table({"id": ids, "vector": list(vectors)}), path)
    found = given_outputs.embeddings(*files, table)
    assert mean(found, table) == expected
    assert "images and captions ordered by their ids" in found.notes[0]


def test_captions_called_by_file_and_number_come_into_order(tmp_path, outputs, table, expected):
    images, texts = outputs
    order = np.random.default_rng(2).permutation(N * K)
    path = tmp_path / "t.npz"
    ids = [f"im{row // K}.tif#{row % K}" for row in order]
    np.savez(path, ids=np.array(ids), texts=texts[order])
    found = given_outputs.embeddings(*saved(tmp_path, i=images), path, table)
    assert mean(found, table) == expected
    np.savez(path, ids=np.array([ids[0], *ids[:-1]]), texts=texts[order])
    with pytest.raises(UserError, match=f"has the id {ids[0]} twice; keep one row for each item"):
        given_outputs.embeddings(*saved(tmp_path, i=images), path, table)


def test_rows_of_other_images_are_left_out_and_said(tmp_path, outputs, table, expected):
    images, texts = outputs
    path = tmp_path / "i.npz"
    ids = ["other", *(f"im{row}" for row in range(N))]
    np.savez(path, ids=np.array(ids), images=np.vstack([images[:1], images]))
    found = given_outputs.embeddings(path, *saved(tmp_path, t=texts), table)
    assert mean(found, table) == expected
    assert found.notes[1] == "1 rows of other images or captions were left out"


def test_captions_called_by_their_image_keep_its_order(tmp_path, outputs, table, expected):
    images, texts = outputs
    order = np.argsort(np.tile([0, 1], N), kind="stable")  # first captions, then second ones
    path = tmp_path / "t.npz"
    np.savez(path, image_id=np.array([f"im{row // K}" for row in order]), texts=texts[order])
    found = given_outputs.embeddings(*saved(tmp_path, i=images), path, table)
    assert mean(found, table) == expected


def bad(change):
    def make(folder, images, texts):
        return saved(folder, **dict(zip("it", change(images, texts), strict=True)))

    return make


def with_ids(ids):
    def make(folder, images, texts):
        np.savez(folder / "i.npz", ids=np.array(ids), vectors=images)
        return [folder / "i.npz", *saved(folder, t=texts)]

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad(lambda i, t: (t, i)), "exchange --images and --texts"),
        (bad(lambda i, t: (i.T, t)), "i.npy is transposed, 8 x 20; give one row for each item"),
        (bad(lambda i, t: (i, t.T)), "t.npy is transposed, 8 x 40"),
        (bad(lambda i, t: (i, t[:-1])), "t.npy has 39 rows, but the split has 40 captions"),
        (bad(lambda i, t: (i, t[:, :5])), "8 numbers a row and .*t.npy has 5"),
        (bad(lambda i, t: (i[0], t)), r"i.npy holds float32 of shape 8; give a matrix"),
        (bad(lambda i, t: (i.astype(str), t)), "i.npy holds <U.* of shape 20 x 8"),
        (with_ids(["im0"] * 20), "has the id im0 twice"),
        (with_ids([f"other{n}" for n in range(20)]), "has ids for 0 of the 20 images"),
        (with_ids(["im0"]), "has 1 ids for 20 rows"),
        (with_ids([f"other{n}" for n in range(20)]), "as the caption file does, such as im0."),
        (bad(lambda i, t: (i.astype(object), t)), "i.npy holds Python objects; save numbers"),
        (bad(lambda i, t: (i[:0], t)), "i.npy holds float32 of shape 0 x 8"),
        (bad(lambda i, t: (i > 0, t)), "i.npy holds bool of shape 20 x 8"),
        (bad(lambda i, t: (i + 0j, t)), "i.npy holds complex64 of shape 20 x 8"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path, outputs, table, make, message):
    with pytest.raises(UserError, match=message):
        given_outputs.embeddings(*make(tmp_path, *outputs), table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.T, "holds captions x images; give its transpose"),
        (lambda s: s[:, :-1], "holds 20 x 39 scores, but the split has 20 images x 40 captions"),
        (lambda s: -s, "looks like distances: mR is .*; give scores"),
        (lambda s: s * np.nan, "The similarity holds NaN"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, outputs, table, change, message):
    images, texts = outputs
    (path,) = saved(tmp_path, s=change(images @ texts.T))
    with pytest.raises(UserError, match=message):
        given_outputs.similarity(path, table)


def test_whole_numbers_and_negative_distances_are_scores(tmp_path, outputs, table):
    images, texts = outputs
    exact = (1000 * images @ texts.T).astype(np.int32)
    (path,) = saved(tmp_path, s=exact)
    found = mean(given_outputs.similarity(path, table), table)
    (path,) = saved(tmp_path, d=-exact)
    with pytest.raises(UserError, match="the negative distances"):
        given_outputs.similarity(path, table)
    (path,) = saved(tmp_path, e=-np.load(path))
    assert mean(given_outputs.similarity(path, table), table) == found


@pytest.mark.parametrize(
    "name", ["x.txt", "missing.npy", "folder.npy", "empty.npy", "broken.npy", "two.npz"]
)
def test_files_that_are_no_matrix_are_refused(tmp_path, table, name):
    (tmp_path / "x.txt").write_text("1 2")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    message = {
        "x.txt": "is none of .npy, .npz",
        "missing.npy": "does not exist",
        "folder.npy": "is a folder; name a file of embeddings",
        "empty.npy": "cannot be read",
        "broken.npy": "cannot be read",
        "two.npz": r"holds 2 matrices \(a, b\); keep one",
    }
    with pytest.raises(UserError, match=message[name]):
        given_outputs.similarity(tmp_path / name, table)
