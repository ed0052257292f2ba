"""Pages to look at: pairs, training curves, descriptions and answers, as self-contained HTML files.

`svg.py` draws all charts of the project, and `page.py` holds what the pages share. Every
other module renders one kind of content. `python -m stic_min.report` writes them.
"""

from pathlib import Path

from stic_min import first_line
from stic_min.runtime.console import warn


def write_page(folder: str | Path):
    """The page of a training run that has just finished. A problem here does not fail it."""
    try:
        from stic_min.report import training  # here, so that not even a broken import fails the run

        training.write(folder)
    except Exception as error:
        warn(f"no report.html: {first_line(error)}")
