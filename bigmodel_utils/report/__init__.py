"""The report: notebooks executed by papermill under a profile, then an HTML site and a PDF of what they computed.

`profiles` reads the sizes of a run, `chapters` reads and normalises notebooks, `lint` refuses what must not be committed,
`runner` decides what changed and `execute` runs it, `compose` joins prose and outputs into pages, `html` and `pdf` render them,
`publish` swaps the whole report in, with `summary`, `manifest` and `sbom`; `verify` builds it again; `new` adds a chapter.
`python -m bigmodel_utils.report --help` lists the commands.
"""


class ReportError(Exception):
    """A build cannot go on; the message names the thing and the way out."""
