"""Configuration of Sphinx for the book; `make book` fills the folder of sources first."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from book import mathml, sources  # noqa: E402

project = "Remote-sensing image-text systems, reproduced"
author = copyright = "The contributors of this notebook collection"
release = sources.version()

extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "index"
nb_execution_mode = "off"  # the notebooks hold their outputs
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "linkify"]
myst_linkify_fuzzy_links = False  # else nbhelpers.py would be a site of Paraguay
myst_heading_anchors = 4
# Outputs and READMEs begin at the level of heading that suits them where they stand.
suppress_warnings = ["myst.header"]
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
python_maximum_signature_line_length = 120
toc_object_entries_show_parents = "hide"
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "Image-text systems, reproduced"
html_static_path = [str(HERE / "_static")]
html_css_files = ["book.css"]
html_js_files = ["sortable.js"]
html_math_renderer = "mathml"
html_sourcelink_suffix = ""
# Where the repository can be read, such as https://github.com/OWNER/NAME; links to source files
# lead there. Without an address they are plain text.
repository = os.environ.get("BOOK_REPOSITORY", "")
html_theme_options = {
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "use_repository_button": bool(repository),
    "repository_url": repository,
    "repository_provider": "github",  # the form of its addresses, whatever the host
}
html_context = {"default_mode": "auto"}


def _give_original_notebooks(app, error) -> None:
    """Let the download button give each notebook as it is in the repository."""
    folder = Path(app.outdir) / "_sources" / "notebooks"
    if error is None and folder.is_dir():
        for path in folder.glob("*.ipynb"):
            shutil.copy(ROOT / "notebooks" / path.name, path)


def setup(app) -> None:
    """Add the renderer of equations, and the original notebooks."""
    app.add_html_math_renderer("mathml", (mathml.visit_inline, None), (mathml.visit_block, None))
    app.connect("build-finished", _give_original_notebooks)
