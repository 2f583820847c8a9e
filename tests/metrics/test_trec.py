import ir_measures
import numpy as np
import pytest

from nbhelpers.errors import UserError
from nbhelpers.metrics import protocols, recall, trec
from nbhelpers.metrics.protocols import Scores
from nbhelpers.metrics.trec import Names


def case(seed=0, images=15):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), 3)
    scores = rng.permutation(images * len(owner)).reshape(images, -1) / 7.0  # no ties
    scores[owner, np.arange(len(owner))] += rng.integers(0, 90, len(owner)) + 0.01
    return Names.of([f"place {row}.png" for row in range(images)], owner), scores, owner


def test_a_run_that_was_written_is_read_again(tmp_path):
    names, scores, owner = case()
    run, qrels = trec.write(tmp_path, "mine", names, Scores.of(scores))
    found, notes = trec.read(run, names)
    expected = recall.evaluate(scores, owner).metrics
    texts = [str(number) for number in range(len(owner))]
    again, _ = protocols.evaluate("expectation", found, texts, owner)
    assert again.metrics == expected
    assert "15 image and 45 caption queries" in notes[0]
    assert "place%200.png 0 place%200.png#0 1" in qrels.read_text().splitlines()


@pytest.mark.parametrize("seed", range(5))
def test_recalls_are_those_of_ir_measures_without_ties(tmp_path, seed):
    names, scores, owner = case(seed)
    run, qrels = trec.write(tmp_path, "mine", names, Scores.of(scores))
    ours = recall.evaluate(scores, owner).metrics
    lines = list(ir_measures.read_trec_run(str(run)))
    right = list(ir_measures.read_trec_qrels(str(qrels)))
    for way, queries in (("i2t", set(names.images)), ("t2i", set(names.captions))):
        for k in (1, 5, 10):
            measure = ir_measures.Success @ k
            found = ir_measures.calc_aggregate(
                [measure],
                [one for one in right if one.query_id in queries],
                [one for one in lines if one.query_id in queries],
            )
            assert 100 * found[measure] == pytest.approx(ours[f"{way}_R@{k}"], abs=1e-9)


def test_tabs_other_line_ends_and_a_mark_of_utf8_are_read(tmp_path):
    names, scores, _ = case()
    run, _ = trec.write(tmp_path, "mine", names, Scores.of(scores))
    text = run.read_text()
    expected = trec.read(run, names)[0]
    run.write_bytes(text.replace(" ", "\t").replace("\n", "\r\n").encode("utf-8-sig"))
    found = trec.read(run, names)[0]
    assert np.array_equal(found.i2t, expected.i2t) and np.array_equal(found.t2i, expected.t2i)


def test_ndcg_and_mrr_as_worked_out_by_hand():
    names = Names.of(["a", "b"], np.array([0, 1]))
    found = trec.measures(names, Scores.of(np.array([[2.0, 1.0], [4.0, 3.0]])))
    assert found["i2t_nDCG@10"] == pytest.approx(50 * (1 + 1 / np.log2(3)))
    assert found["i2t_MRR@100"] == found["t2i_MRR@100"] == 75


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a Q0 b#0 1", "Line 1 of .* is no line of a TREC run"),
        ("a Q0 b#0 1 high mine", "Line 1 of .* is no line of a TREC run"),
        ("a Q0 c 1 1.0 mine", "names c, which the captions do not have; .* such as a, .* a#0"),
        ("a Q0 b#0 1 1.0 mine\na Q0 b#0 2 0.5 mine", "Line 2 of .* lists b#0 twice for a"),
        ("a Q0 b#0 1 1.0 mine", r"no line for 1 of the 2 image queries \(first: b\)"),
        (
            "a Q0 b#0 1 1 m\nb Q0 b#0 1 1 m\na#0 Q0 a 1 1 m",
            r"no line for 1 of the 2 caption queries \(first: b#0\)",
        ),
    ],
)
def test_runs_that_cannot_be_evaluated_are_refused_in_a_sentence(tmp_path, line, message):
    names = Names.of(["a", "b"], np.array([0, 1]))
    (tmp_path / "run.trec").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        trec.read(tmp_path / "run.trec", names)
