"""Tables of real sets that the notebooks show."""

import pytest

from nbhelpers.errors import UserError
from nbhelpers.results import real_sets

# what audit.class_only gives for the published test splits
CLASS_ONLY_MR = {"ucm": 46.88, "rsicd": 14.532}


@pytest.mark.parametrize(
    ("notebook", "system"),
    [
        ("20_pir", "PIR"),
        ("21_pir_clip", "PIR-CLIP"),
        ("22_pe_rsitr", "PE-RSITR"),
        ("23_cfitr", "CFITR"),
    ],
)
def test_each_retrieval_system_has_its_rows_on_both_sets(notebook, system):
    table = real_sets.rows(notebook)
    assert set(table.index.get_level_values("set")) == {"ucm", "rsicd"}
    for name in real_sets.SETS:
        rows = table.loc[name]
        assert list(rows.index[-2:]) == ["class only", "chance"] and system in rows.index
        assert rows.loc["class only", "mR"] == f"{CLASS_ONLY_MR[name]:.1f}"
        mean = float(rows.loc[system, "mR"].split()[0])
        low, high = map(float, rows.loc[system, "95 % interval"].strip("[]").split(", "))
        assert low <= mean <= high and mean > float(rows.loc["chance", "mR"])
        assert int(rows.loc[system, "seeds"]) >= 1
    assert not any("PIR" in label for _, label in table.index) or "pir" in notebook


def test_captions_have_their_scores_and_no_line_of_recalls():
    table = real_sets.rows("50_score_captions")
    assert not {"class only", "chance"} & set(table.index.get_level_values("system"))
    assert {"BITA", "nearest training image"} <= set(table.loc["rsicd"].index)
    assert list(table.columns) == ["BLEU-4", "METEOR", "CIDEr", "seeds"]


def test_a_folder_without_records_is_said(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        real_sets.rows("20_pir", tmp_path)
