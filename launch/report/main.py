"""A run, or all runs of a pipeline, as one page that needs nothing else: OUT/report.html.

    bash launch/report.sh OUT

OUT is the output folder of a step, or one that holds such folders. The pictures are in OUT/report/ too.
"""

import argparse
import sys
from pathlib import Path

from common.options import UserError
from launch.report.curves import draw_all
from launch.report.findings import findings
from launch.report.page import page
from launch.report.read import find_runs

REFUSED = 2  # exit code after a mistake of the user, as in training


def write_report(folder: Path) -> Path:
    """Write the page and its pictures, and return where the page is.

    Raises UserError when there is no run in the folder, and when a file of a run cannot be read.
    """
    runs = find_runs(folder)
    pictures = folder / "report"
    chapters = []
    for run in runs:
        drawn = draw_all(run.lines, pictures / run.folder.relative_to(folder))
        chapters.append((run, findings(run.lines, run.samples), drawn))
    (folder / "report.html").write_text(page(folder.resolve().name, chapters), encoding="utf-8")
    return folder / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(usage="bash launch/report.sh OUT", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="OUT", type=Path, help="output folder of a step or of a pipeline")
    try:
        print(f"report: {write_report(parser.parse_args().folder)}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
