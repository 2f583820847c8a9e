"""Numbers in the sentences of pages are those of the records."""

from __future__ import annotations

import pytest

from nbhelpers.__main__ import main
from nbhelpers.errors import UserError
from nbhelpers.paths import repository_root
from nbhelpers.results import traces

RESULTS = repository_root() / "data/results"
PAGES = [repository_root() / "README.md", *sorted(RESULTS.rglob("README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_numbers_of_the_pages_are_those_of_the_records(page):
    found = traces.traces(page, RESULTS)
    assert len(found) >= 4
    assert [str(trace) for trace in found if not trace.holds] == []
    assert all(trace.records for trace in found if trace.row != "chance")


@pytest.fixture
def page(tmp_path):
    def write(sentence: str):
        path = tmp_path / "page.md"
        path.write_text(f"# A page\n\n{sentence}\n")
        return path

    return write


def test_a_number_is_found_with_its_spread_its_interval_and_its_sign(page):
    path = page(
        "PIR: 51.6 ± 0.3<!-- ucm | PIR | mR -->, +2.9<!-- ucm | PIR | over its control -->"
        " (0.9 to 4.8<!-- ucm | PIR | over its control -->), 12.6<!-- ucm | PE-RSITR | over its"
        " control --> behind."
    )
    first, gain, interval = traces.traces(path, RESULTS)[:3]
    assert (first.said, gain.said, interval.said) == ("51.6 ± 0.3", "+2.9", "0.9 to 4.8")
    assert first.line == 3 and first.holds and gain.holds and interval.holds
    assert [one.name for one in first.records] == [f"20_pir-seed{seed}.json" for seed in range(3)]


@pytest.mark.parametrize("said", ["51.7 ± 0.3", "51.6 ± 0.2", "-51.6", "51.60", "1.6", "6"])
def test_a_number_that_is_not_the_records_is_said(page, said, capsys):
    path = page(f"PIR reaches {said}<!-- ucm | PIR | mR -->.")
    assert main(["records", "trace", str(path)]) == 1
    answer = capsys.readouterr().err
    assert f"line 3: the sentence says {said}" in answer and "51.6 ± 0.3; write that" in answer
    path.write_text(path.read_text().replace(said, "51.6 ± 0.3"))  # as advised
    assert main(["records", "trace", str(path)]) == 0


def test_a_row_that_no_record_has_is_said(page):
    with pytest.raises(UserError, match=r"line 3: no leaderboard of ucm has the row 'PIRR'"):
        traces.traces(page("It has 1.0<!-- ucm | PIRR | mR -->."), RESULTS)


def test_a_folder_without_records_is_said(page):
    with pytest.raises(UserError, match="nowhere"):
        traces.traces(page("It has 1.0<!-- nowhere | PIR | mR -->."), RESULTS)
