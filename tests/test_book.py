"""The book: its pages, its links and its tables. Only the last test needs Sphinx."""

from __future__ import annotations

import fnmatch
import json
import posixpath
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from book import api, links, notebook_pages, sources  # noqa: E402

TOCTREE = re.compile(r"```\{toctree\}\n(?::[^\n]*\n)*(.*?)```", re.S)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of sources of this repository's book."""
    out = tmp_path_factory.mktemp("book")
    assert sources.write(out)
    return out


def names(folder: Path) -> set[str]:
    """The pages of a folder of sources, as Sphinx names them."""
    return {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*")
        if path.suffix in {".md", ".ipynb"}
    }


def texts(path: Path) -> list[str]:
    """The Markdown of a page or of a notebook's cells and outputs."""
    if path.suffix == ".md":
        return [path.read_text("utf-8")]
    cells = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"] + [
        "".join(output.get("data", {}).get("text/markdown", "")) for output in outputs
    ]


def listed(folder: Path, page: str) -> set[str]:
    """The pages that the contents of a page name."""
    path, known, found = folder / f"{page}.md", names(folder), set()
    if not path.is_file():
        return found
    for body in TOCTREE.findall(path.read_text("utf-8")):
        for line in filter(None, map(str.strip, body.splitlines())):
            entry = re.sub(r"^.*<(.*)>$", r"\1", line)
            place = posixpath.join("/", posixpath.dirname(page), entry).lstrip("/")
            found |= set(fnmatch.filter(known, place))
    return found


def test_every_page_is_in_the_contents(written):
    reached, left = set(), {"index"}
    while left:
        page = left.pop()
        reached.add(page)
        left |= listed(written, page) - reached
    assert names(written) == reached, "name the page in a toctree of book/index.md"
    stored = {f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")}
    results = {f"{folder}/leaderboard" for folder in sources.result_folders()}
    assert stored | results <= reached and len(results) >= 3


def test_every_relative_link_and_picture_has_its_target(written):
    labels = set(api.anchors(ROOT / "nbhelpers").values())
    shown = 0
    for path in written.rglob("*"):
        for text in texts(path) if path.suffix in {".md", ".ipynb"} else ():
            found: list[str] = []
            links.outside_code(
                text, lambda part, found=found: links.LINK.sub(lambda m: _note(m, found), part)
            )
            for target in found:
                shown += 1
                if target.startswith("#"):
                    assert target[1:] in labels, (path, target)
                elif not target.startswith(("http:", "https:", "mailto:")):
                    assert (path.parent / target.split("#")[0]).is_file(), (path, target)
    assert shown > 300


def _note(found: re.Match, into: list[str]) -> str:
    into.append(found["target"])
    return found["text"]


def test_links_to_source_files_lead_to_the_package_or_the_repository():
    pages = {"README.md": "README.md", "notebooks/README.md": "notebooks/README.md"}
    anchors = {"nbhelpers/data/table.py": "file-nbhelpers.data.table"}
    plain = links.Resolver(ROOT, pages, anchors)
    known = links.Resolver(ROOT, pages, anchors, "https://example.org/a/b/")
    text = "[`table`](nbhelpers/data/table.py), [LICENSE](LICENSE), [n](notebooks), `[x](y.md)`"
    assert plain.text(text, "README.md") == (
        "[`table`](#file-nbhelpers.data.table), LICENSE, [n](notebooks/README.md), `[x](y.md)`"
    )
    assert "[LICENSE](https://example.org/a/b/blob/main/LICENSE)" in known.text(text, "README.md")
    fenced = "```\n[x](nowhere.md)\n```"
    assert plain.text(fenced, "README.md") == fenced
    with pytest.raises(ValueError, match="nowhere.md"):
        plain.text("[x](nowhere.md)", "README.md")
    with pytest.raises(ValueError, match="nowhere.png"):
        plain.text("![x](nowhere.png)", "README.md")


def test_pages_of_the_book_lie_elsewhere_than_in_the_repository():
    resolver = links.Resolver(ROOT, sources.pages(), {})
    assert resolver.text("[x](../data/README.md)", "book/index.md") == "[x](data/README.md)"
    picture = "![x](../figures/default/20_pir/training.png)"
    assert resolver.text(picture, "book/index.md") == "![x](figures/default/20_pir/training.png)"
    assert resolver.files == {"figures/default/20_pir/training.png"}


@pytest.mark.parametrize("folder", sources.result_folders())
def test_a_leaderboard_is_made_from_the_records(written, folder):
    from nbhelpers.results import records

    page = (written / folder / "leaderboard.md").read_text("utf-8")
    tables = re.findall(r":::\{table\}\n:class: sortable\n(\|.*?)\n:::", page, re.S)
    assert len(tables) == page.count("\n| system |") >= 2
    best = max(
        record["metrics"]["expectation"]["mR"]
        for record in map(records.read_one, records.paths([ROOT / folder]))
        if "expectation" in record["metrics"]
    )
    # records of several sets have a table each; captions have no fourth column with mR
    firsts = [table.splitlines()[2].split("|")[4].split("±")[0] for table in tables]
    first = max(map(float, firsts if folder.endswith("ideas") else firsts[:1]))
    assert first == pytest.approx(best, abs=1.5)  # the best seed beside the mean of its seeds
    for name in re.findall(r"\]\((\S+?\.json)\)", page):
        assert (written / folder / name).is_file()


def test_the_glossary_is_that_of_the_first_notebook(written):
    rows = [line for line in (written / "glossary.md").read_text().splitlines() if line[:1] == "|"]
    assert len(rows) > 30 and any(row.startswith("| mR |") for row in rows)
    assert "](notebooks/30_evaluate_retrieval.ipynb)" in "".join(rows)


def test_the_results_page_points_to_the_leaderboards_instead_of_repeating_them(written):
    page = (written / "data/results/README.md").read_text("utf-8")
    assert "<!-- records" not in page and "ucm/leaderboard.md" in page


# ---- notebooks
def code_cell(source: str, *data: dict) -> dict:
    outputs = [{"output_type": "display_data", "data": one, "metadata": {}} for one in data]
    return {"cell_type": "code", "source": source, "outputs": outputs, "metadata": {}}


def test_a_stored_picture_is_shown_and_a_missing_one_is_said(tmp_path):
    shutil.copy(ROOT / "figures/default/20_pir/training.png", tmp_path / "belief_1_after.png")
    shown = {"text/plain": notebook_pages.PLACEHOLDER}
    cell = code_cell('run.show(f(), f"belief_{n}_{name}")', shown, shown)
    first, second = notebook_pages._outputs(cell, tmp_path)
    assert set(first["data"]) == {"image/png", "text/plain"}
    assert second["data"]["text/markdown"].startswith("*1 more picture:")
    assert cell["metadata"]["mystnb"]["image"]["alt"] == "belief"


def test_a_listing_of_code_follows_the_colours_of_the_page(tmp_path):
    listing = {
        "text/html": "<style>...</style>",
        "text/latex": "\\begin{Verbatim}...",
        "text/plain": "x = 1",
    }
    (output,) = notebook_pages._outputs(code_cell("Code('x = 1')", listing), tmp_path)
    assert output["data"] == {"text/markdown": "```python\nx = 1\n```"}


def test_notebooks_keep_their_cells_and_get_their_numbers(written):
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        stored, page = (
            json.loads(p.read_text("utf-8")) for p in (path, written / "notebooks" / path.name)
        )
        assert len(stored["cells"]) == len(page["cells"])
        assert "".join(page["cells"][0]["source"]).startswith(f"# {path.stem[:2]} · ")
        for cell in page["cells"]:
            for output in cell.get("outputs", []):
                assert output.get("data") != {"text/plain": notebook_pages.PLACEHOLDER}
        code = [
            [c["source"] for c in book["cells"] if c["cell_type"] == "code"]
            for book in (stored, page)
        ]
        assert code[0] == code[1]


# ---- the package
def test_the_package_is_described_from_its_source(written):
    page = (written / "api/metrics.md").read_text("utf-8")
    assert "(file-nbhelpers.metrics.recall)=\n\n## recall" in page
    assert "{py:function} evaluate(" in page and "{py:class} Recall" in page
    assert "{py:function} _" not in page and "{py:method} _" not in page
    rooms = {path.parent.name for path in ROOT.glob("nbhelpers/*/__init__.py")}
    assert {path.stem for path in (written / "api").glob("*.md")} == rooms | {"root"}


def test_docstrings_become_prose_and_definitions():
    assert api.prose("Give x_y in `a_b`.\n\nname   what *it* is,\n       and more") == (
        "Give x\\_y in `a_b`.\n\n`name`\n: what \\*it\\* is, and more"
    )
    assert api.prose("Draw:\n\n    a -> b\n      -> c").endswith(
        "```text\n    a -> b\n      -> c\n```"
    )


# ---- the built pages
def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"></a><a href="#x"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#x"></a><img src="c.png"><a href="https://o">')
    assert links.dead(tmp_path) == [
        "a.html: b.html#y leads to no place on its page",
        "b.html: c.png leads to no file",
    ]


def test_the_configuration_needs_no_sphinx_and_finds_its_files():
    settings = runpy.run_path(str(ROOT / "book/conf.py"))
    static = Path(settings["html_static_path"][0])
    for name in settings["html_css_files"] + settings["html_js_files"]:
        assert (static / name).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings["release"] == project["version"]


def test_every_package_of_the_book_is_pinned_and_none_is_needed_for_the_tests():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in (line.split("==") for line in lines)
    }
    book, test = ({Requirement(text).name for text in optional[name]} for name in ("book", "test"))
    for text in optional["book"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name]), text
    assert not book & test


def test_the_workflow_publishes_what_make_book_builds():
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text())
    assert workflow[True]["push"]["branches"] == ["main"]  # YAML reads the key `on` as true
    steps = workflow["jobs"]["build"]["steps"]
    assert "make book" in [step.get("run") for step in steps]
    assert steps[-1]["with"]["path"] == "build/book"
    done = subprocess.run(
        ["make", "-n", "book", "BOOK_REPOSITORY=https://example.org"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "-m sphinx -W" in done.stdout and "build/book\n" in done.stdout


def test_the_style_is_that_of_the_package():
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "book"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


TABLE = """<table class="sortable"><thead><tr><th>system</th><th>mR</th></tr></thead><tbody>
<tr><td>b</td><td>9.5 ± 0.3</td></tr><tr><td>c</td><td></td></tr><tr><td>a</td><td>51.6</td></tr>
<tr><td>d</td><td>1,234 / 5</td></tr></tbody></table>"""


@pytest.mark.browser
def test_a_click_on_a_title_sorts():
    playwright = pytest.importorskip("playwright.sync_api")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("there is no Chromium")
    script = (ROOT / "book/_static/sortable.js").read_text()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(f"{TABLE}<script>{script}</script>")

        def order(title: str) -> str:
            page.click(f"th:has-text('{title}') button")
            return "".join(page.locator("td:first-child").all_inner_texts())

        assert [order("mR"), order("mR")] == ["dabc", "badc"]  # the empty cell stays last
        assert page.get_attribute("th:nth-child(2)", "aria-sort") == "ascending"
        assert [order("system"), order("system")] == ["abcd", "dcba"]
        browser.close()


@pytest.mark.slow
def test_the_book_is_built_without_a_warning_or_a_dead_link(written, tmp_path):
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml"):
        pytest.importorskip(name, reason="`make book` installs what builds the book")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "book"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(written), str(tmp_path / "built")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert links.dead(tmp_path / "built") == []
    for name in ("notebooks/20_pir", "data/results/ucm/leaderboard", "glossary", "api/metrics"):
        assert (tmp_path / "built" / f"{name}.html").is_file()
    given = tmp_path / "built/_sources/notebooks/20_pir.ipynb"
    assert given.read_bytes() == (ROOT / "notebooks/20_pir.ipynb").read_bytes()
