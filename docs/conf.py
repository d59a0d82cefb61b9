"""The site: `bash scripts/docs.sh` builds it into build/site. Optimizer pages come from the docstrings."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "KOALA"
author = "The KOALA suite authors"
copyright = author
html_title = "KOALA: Kalman-filter optimizers"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what types mean
napoleon_use_rtype = False
exclude_patterns = ["build"]
