"""A page of text, tables and pictures, as Markdown beside its pictures and as one HTML file that needs nothing else."""

import base64
import html
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.files import write_whole

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:64em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left;vertical-align:top;"
    "white-space:pre-wrap}img{max-width:100%}code{background:#eee}"
)


class Text(NamedTuple):
    """A paragraph; of a level, a heading."""

    text: str
    level: int = 0


class Code(NamedTuple):
    """A line as it was typed."""

    text: str


class Table(NamedTuple):
    """Rows of cells under a header; what a cell says is never markup."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A PNG in the page's folder."""

    path: str
    title: str


Block = Text | Code | Table | Picture


def write(folder: pathlib.Path, name: str, blocks: Sequence[Block]) -> None:
    """Writes name.md and name.html into the folder, which holds the pictures."""
    write_whole(folder / f"{name}.md", "\n\n".join(map(_markdown, blocks)) + "\n")
    title = html.escape(blocks[0].text)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    write_whole(folder / f"{name}.html", head + "\n".join(_html(block, folder) for block in blocks) + "\n</html>\n")


def _markdown(block: Block) -> str:
    match block:
        case Text(text, level):
            return f"{'#' * level} {text}" if level else text
        case Code(text):
            return f"    {text}"
        case Picture(path, title):
            return f"![{title}]({path})"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    for mark in ("\\", "|", "<", "`", "*", "_", "[", "$"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\r", "").replace("\n", "⏎")


def _html(block: Block, folder: pathlib.Path) -> str:
    match block:
        case Text(text, level):
            tag = f"h{level}" if level else "p"
            return f"<{tag}>{html.escape(text)}</{tag}>"
        case Code(text):
            return f"<p><code>{html.escape(text)}</code></p>"
        case Picture(path, title):
            data = base64.b64encode((folder / path).read_bytes()).decode()
            return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        case Table(header, rows):
            line = lambda cells, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
            return f"<table><tr>{line(header, 'th')}</tr>{body}</table>"
