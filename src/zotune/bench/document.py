"""A document of headings, paragraphs, tables and figures, as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells are texts; ``emphasis``: indices of the rows with published figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    emphasis: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """``name``: of its file beside the Markdown."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Code:
    """Commands, or text as it is; folded away under a ``title`` where it has one."""

    text: str
    title: str = ""


Block = Heading | Paragraph | Table | Figure | Code


def markdown(title: str, blocks: Sequence[Block], figures: str) -> str:
    """The document as Markdown; ``figures``: folder of the figures, relative to the file."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Code(text, title):
                parts.append((f"{title}:\n\n" if title else "") + f"```\n{text}\n```")
            case Figure(name, caption, _):
                parts.append(f"![{caption}]({figures}/{name}.svg)")
            case Table(header, rows, emphasis):
                lines = [_line(header), "|" + "---|" * len(header)]
                lines += [_line([f"*{cell}*" if i in emphasis and cell else cell for cell in row]) for i, row in enumerate(rows)]
                parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The document as an HTML page with figures and style embedded."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text, level):
                body.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                body.append("<p>" + re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text)) + "</p>")
            case Code(text, title):
                code = f"<pre>{html.escape(text)}</pre>"
                body.append(f"<details><summary>{html.escape(title)}</summary>{code}</details>" if title else code)
            case Figure(_, caption, svg):
                drawing = svg[svg.index("<svg") :]  # without the XML declaration, which has no place inside a page
                text = html.escape(caption)
                body.append(f'<figure role="img" aria-label="{text}">{drawing}<figcaption>{text}</figcaption></figure>')
            case Table(header, rows, emphasis):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
                lines = []
                for index, row in enumerate(rows):
                    mark = ' class="published"' if index in emphasis else ""
                    lines.append(f"<tr{mark}>" + "".join(_html_cell(cell) for cell in row) + "</tr>")
                body.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_cell(cell: str) -> str:
    number = cell[:1].isdigit() or cell[:1] in "+−–" or cell.startswith("**")
    bold = cell.startswith("**") and cell.endswith("**")
    text = html.escape(cell.strip("*") if bold else cell)
    return f"<td{' class=number' if number else ''}>{f'<b>{text}</b>' if bold else text}</td>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d9dee4; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin-top: 1.4rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
th { background: #f4f6f8; } .number { text-align: right; font-variant-numeric: tabular-nums; }
tr.published td { color: #6a737d; font-style: italic; }
pre { background: #f4f6f8; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: #57606a; font-size: .85rem; }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
