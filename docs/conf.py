# SPDX-License-Identifier: Apache-2.0
"""The site of this folder: ``sphinx-build -W --keep-going -b html docs OUT``.

It needs the extra `docs`, PyTorch (for the reference of `nb_sparse_adam.torch`), and no network.
"""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import nb_sparse_adam  # noqa: E402 (found on the path that was just set)

project = "nb_sparse_adam"
author = "the nb_sparse_adam developers"
version = release = nb_sparse_adam.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxarg.ext",
]
default_role = "py:obj"  # what docstrings have between backticks are names
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # numpydoc shows the types that docstrings give, with shapes
numpydoc_show_class_members = False  # autodoc shows them
# Sections that there are, in numpydoc's order; parameters that there are, in the signature's.
numpydoc_validation_checks = {
    *("GL03", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10"),
    *("SS01", "SS02", "SS04", "PR02", "PR03", "PR05", "PR10", "RT02"),
}

html_theme = "furo"
html_show_copyright = False
html_title = f"nb_sparse_adam {release}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "

# --- links ------------------------------------------------------------------------------------------------

INCLUDED = {
    "architecture": ROOT / "ARCHITECTURE.md",
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
}
"""Pages that show a file of the repository."""

PAGES = {
    **{file: DOCS / f"{page}.md" for page, file in INCLUDED.items()},
    ROOT / "README.md": DOCS / "index.md",
}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def relink(text: str, folder: Path, page: Path) -> str:
    """Make links that are relative to a folder of the repository ones of a page of the site.

    A file that is no page of the site becomes its name: the repository has no address to link to.
    """

    def replaced(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups(default="")
        file = (folder / target).resolve()
        if not file.exists():
            return match[0]  # an address; or a mistake, which Sphinx reports
        file = PAGES.get(file, file)
        if not image and not (file.suffix in {".md", ".rst"} and file.is_relative_to(DOCS)):
            return label if "`" in label else f"`{label}`"
        return f"{image}[{label}]({os.path.relpath(file, page.parent)}{anchor})"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def read_page(app, docname, source):
    """Put included files in their page's place, and mend links."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    file = INCLUDED.get(docname)
    if file is None:
        source[0] = relink(source[0], page.parent, page)
    else:
        app.env.note_dependency(str(file))
        source[0] = relink(file.read_text(encoding="utf-8"), file.parent, page)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", read_page)
