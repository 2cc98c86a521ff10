"""Report on all training runs and evaluations below a folder, as one self-contained page: OUT/report.html.

    bash launch/report.sh OUT

OUT is the output folder of a command, or a folder of such folders. Pictures are also written to OUT/report/.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from common.runtime.files import exists, is_file, naming
from common.runtime.options import UserError
from launch.report.curves import draw_all
from launch.report.findings import check_run
from launch.report.page import Chapter, page
from launch.report.pareto import draw_fronts
from launch.report.read import Run
from launch.report.scan import scan
from launch.report.state import state_of

REFUSED = 2  # exit code after a mistake of the user, as in training


def write_report(root: Path) -> Path:
    """Write the page and its pictures; returns the path of the page.

    Raises UserError when there is nothing to report, and when the page cannot be written.
    """
    file = root / "report.html"
    if exists(file) and not is_file(file):
        raise UserError(f"{file}: is there, and not a file")
    seen = scan(root)
    try:
        chapters = {run.folder: [_chapter(run, root)] for run in seen.runs}
        for evaluation in seen.evaluations:
            chapters.setdefault(evaluation.folder, []).append(evaluation)
        in_order = [one for folder in seen.folders for one in chapters.get(folder, [])]
        fronts, undrawn = draw_fronts(seen.runs, root / "report")
        text = page(root, in_order, seen.others, [*seen.problems, *undrawn], fronts)
        with naming(file):
            file.write_bytes(text.encode(errors="replace"))  # lone surrogates
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}") from None
    return file


def _chapter(run: Run, root: Path) -> Chapter:
    pictures, undrawn = draw_all(run.lines, root / "report" / run.folder.relative_to(root))
    judgement = check_run(run.lines, run.samples, run.stage, run.valid_options)
    return Chapter(run._replace(problems=[*run.problems, *undrawn]), state_of(run), judgement, pictures)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; usage: bash launch/report.sh OUT")


def main() -> None:
    parser = argparse.ArgumentParser(usage="bash launch/report.sh OUT", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "folder", metavar="OUT", type=Path, help="output folder of a command or of a pipeline"
    )
    parser.error = _refuse
    try:
        print(f"report: {write_report(parser.parse_args().folder)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
