"""An HTML document that needs nothing but itself: no scripts, no links, pictures inline."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from app.report.drawing import to_svg
from app.report.theme import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = "growmoe report"
"""in the head of the page, so that a later report knows its own file"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""what a browser may load for the page: nothing"""


def document(title: str, subtitle: str, body: str, badge: str = "") -> str:
    """The whole page; title and subtitle are text, the others HTML."""
    title = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{GENERATOR}">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body><main>\n<header><h1>{title}</h1><p class=soft>{escape(subtitle)}</p>{badge}</header>\n"
        f"{body}<footer>Made by <code>growmoe report</code> from the files in this folder.</footer>\n"
        "</main></body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A section, or nothing where there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def figure_block(figure: "Figure | None", name: str, title: str, note: str) -> str:
    """A figure with its caption; nothing for none."""
    if figure is None:
        return ""
    picture = to_svg(figure, name, f"{title}: {note}")
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(note)}</figcaption>{picture}</figure>"


def beside(figures: Iterable[str]) -> str:
    """Figures beside each other, as far as there is room."""
    shown = [figure for figure in figures if figure]
    return f"<div class=plots>{''.join(shown)}</div>" if shown else ""


def folded(title: str, content: str) -> str:
    """Content that a reader opens."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def table(head: Iterable[str], rows: Iterable[Sequence[str]], note: str = "", left: tuple[int, ...] = ()) -> str:
    """A table. Cells are HTML; head and note are text.

    Args:
        left: columns whose cells are aligned to the left.
    """
    align: Mapping[int, str] = dict.fromkeys(left, " class=l")

    def line(tag: str, cells: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}{align.get(i, '')}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"

    below = f"<p class=note>{escape(note)}</p>" if note else ""
    body = "".join(line("td", row) for row in rows)
    inner = f"<table><thead>{line('th', map(escape, head))}</thead><tbody>{body}</tbody></table>"
    return f"<div class=table><div class=scroll>{inner}</div>{below}</div>"
