"""Sphinx configuration of the HTML site; the pages come from bigmodel_utils.report.html."""

project = "Large models, measured"
author = "the course's authors"
copyright = "the course's authors; text CC BY 4.0, code MIT"
extensions = ["myst_nb", "sphinx-mathjax-offline", "sphinx_copybutton", "bigmodel_utils.report.doctree"]
language = "en"

nb_execution_mode = "off"  # the runner executed them
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
mathjax3_config = {
    "loader": {"load": ["ui/safe"]},  # no macros that make links, styles or identifiers: outputs may hold mathematics, too
    "options": {"enableMenu": False},  # each of hundreds of formulas would be a stop of the Tab key
}
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": True,
    "home_page_in_toc": True,
    "navigation_with_keys": False,
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_static_path = ["static"]
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_copy_source = False
html_use_index = False  # there are no index entries; the search has every word
html_show_sourcelink = False
html_last_updated_fmt = None
