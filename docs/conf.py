"""The site: `bash scripts/docs.sh` builds it into build/site. Optimizer pages come from the docstrings."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The rendered results are pages of the site, and Sphinx takes pages from below this folder only.
PAGES = ROOT / "docs" / "results"
shutil.rmtree(PAGES, ignore_errors=True)
no_pages = shutil.ignore_patterns("measured", "published", "benchmarks", "*.csv", "*.tex")
shutil.copytree(ROOT / "results", PAGES, ignore=no_pages)

project = "KOALA"
author = "The KOALA suite authors"
copyright = author
html_title = "KOALA: Kalman-filter optimizers"
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_js_files = ["filter.js", "tablesort.min.js", "tables.js"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx.ext.mathjax", "sphinx-mathjax-offline"]  # formulas need no network
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_raise_on_error, nb_execution_timeout = True, 120  # the notebook is executed as it has no outputs
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what types mean
napoleon_use_rtype = False
exclude_patterns = ["build"]
nitpick_ignore = [("py:class", "l_j^2"), ("py:class", "0-dim float64")]  # what a property's docstring says it is
