"""The page: one HTML file with embedded style and pictures, without scripts. Texts of runs are escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from launch.report import parts
from launch.report.curves import TRADE, Picture
from launch.report.evaluations import Evaluation, pictures_of, render_evaluation
from launch.report.findings import Judgement
from launch.report.read import Run
from launch.report.state import State

STYLE = Path(__file__).with_name("style.css")


class Chapter(NamedTuple):
    """A training run, its state, its findings, and its pictures by group."""

    run: Run
    state: State
    judgement: Judgement
    pictures: dict[str, list[Picture]]


def page(
    root: Path, chapters: Sequence[Chapter | Evaluation], others: Sequence[str], problems: Sequence[str],
    fronts: Sequence[Picture] = (),
) -> str:  # fmt: skip
    """The report on a folder.

    others: folders that are not shown. problems: sentences about files that belong to no chapter. fronts:
    pictures of several runs.
    """
    name = root.resolve().name
    contents, bodies = [], []
    if fronts:
        contents.append('<li><a href="#objectives">Objectives: runs with other weights</a></li>')
        bodies += ['<h2 id="objectives">Objectives</h2>', parts.gallery(fronts, is_wide=True)]
    for number, chapter in enumerate(chapters, start=1):
        is_run = isinstance(chapter, Chapter)
        folder = chapter.run.folder if is_run else chapter.folder
        heading = chapter.run.title if is_run else chapter.kind.title
        path = folder.relative_to(root) if folder != root else name
        title = f"{escape(heading)} <small>({escape(str(path))})</small>"
        links, sections = [], []
        by_heading = _sections(chapter) if is_run else {"": _evaluation(chapter)}
        for part, (heading, section) in enumerate(by_heading.items()):
            if section and heading:
                anchor = f"run{number}-{part}"
                links.append(f'<li><a href="#{anchor}">{escape(heading)}</a></li>')
                sections.append(f'<section id="{anchor}">\n<h3>{escape(heading)}</h3>\n{section}\n</section>')
            elif section:
                sections.append(section)
        status = f' <small class="soft">{escape(_status(chapter))}</small>' if is_run else ""
        below = f"<ul>{''.join(links)}</ul>" if links else ""
        contents.append(f'<li><a href="#run{number}">{title}</a>{status}{below}</li>')
        steps = f'\n<p class="soft">{_logged_steps(chapter.run)}</p>' if is_run else ""
        bodies += [f'<h2 id="run{number}">{title}</h2>{steps}', *sections]
    rest = f'<p class="soft">Not shown: {escape(", ".join(others))}.</p>' if others else ""
    if not chapters:
        rest = f"<p>No training run and no evaluation here.</p>\n{rest}"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Report: {escape(name)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>",
            f"<h1>Report: {escape(name)}</h1>",
            f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>',
            *[rest, parts.cards(problems, "absent"), "<main>", *bodies, "</main>\n</body>\n</html>\n"],
        ]
    )


def _sections(chapter: Chapter) -> dict[str, str]:
    """HTML by heading; empty for parts that the run does not have."""
    run = chapter.run
    return {
        "Findings": parts.cards(run.problems, "absent") + _verdict(chapter),
        "Metrics": parts.figures(run),
        **{group: parts.gallery(shown, is_wide=group == TRADE) for group, shown in chapter.pictures.items()},
        "Samples": parts.samples(run.samples),
        "Golden pairs": parts.golden(run) if run.golden else "",
        "Options": parts.options(run) if run.options else "",
    }


def _logged_steps(run: Run) -> str:
    steps = [line["step"] for line in run.lines]
    return f"Logged from step {min(steps)} to {max(steps)}." if steps else "No step has been logged."


def _status(chapter: Chapter) -> str:
    """The verdict in a few words, for the contents."""
    judgement, count = chapter.judgement, len(chapter.judgement.findings)
    words = [] if chapter.state.is_finished else ["not finished"]
    words += [f"{count} finding{'s' * (count > 1)}"] if count else []
    words += ["too short to judge"] if judgement.is_short else []
    return ", ".join(words or ["no problems detected"])


def _verdict(chapter: Chapter) -> str:
    """The findings, or that there are none: in green only for a finished run long enough to judge."""
    state, judgement = chapter.state, chapter.judgement
    shown = parts.cards([state.text], "" if not state.is_finished else "absent") if state.text else ""
    if not chapter.run.lines:
        return shown
    shown += parts.findings(judgement.findings)
    extent = f"{judgement.steps} steps ({judgement.logged} logged, {judgement.evaluations} evaluations)"
    if judgement.is_short:
        shown += parts.cards([f"Too short to judge trends: {extent}."], "absent")
    elif not judgement.findings:
        kind = "well" if state.is_finished else "absent"
        shown += parts.cards([f"No problems detected in {extent}."], kind)
    reasons = [f"{', '.join(names)} ({reason})" for reason, names in judgement.unchecked.items()]
    return shown + (parts.cards([f"Not checked: {'; '.join(reasons)}."], "absent") if reasons else "")


def _evaluation(evaluation: Evaluation) -> str:
    """The table of an evaluation, as its command prints it, and its pictures."""
    text, findings, problems = render_evaluation(evaluation)
    pictures = pictures_of(evaluation)
    return "\n".join(
        [
            parts.cards(problems, "absent") + parts.findings(findings),
            f'<div class="scroll"><pre>{escape(text)}</pre></div>' if text else "",
            parts.gallery(pictures, is_wide=True) if pictures else "",
        ]
    )
