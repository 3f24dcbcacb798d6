"""Settings of the documentation. Build: `sphinx-build -W -b html docs docs/_build`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from adapterkit import __version__  # noqa: E402

project = "adapterkit"
author = "the adapterkit authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "reference"]
exclude_patterns = ["_build", "_ext"]
smartquotes = False  # words in quotes are typed as they stand
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"adapterkit {release}"
html_show_sourcelink = False
