"""A page of pictures with what the model says of them before and after, as one HTML file that needs nothing else."""

import base64
import html
from pathlib import Path

from stic_min.scorers.report import page
from stic_min.toy.captions import mentions, pattern

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } table { border-collapse: collapse; width: 100%; margin: 1em 0 2em; }
th, td { text-align: left; vertical-align: top; padding: .6em .8em; border-top: 1px solid #ddd; }
td.n, th.n { text-align: right; } caption { text-align: left; color: #555; padding-bottom: .4em; }
img { width: 144px; height: 144px; image-rendering: pixelated; display: block; }
.wrong { background: #ffd5d0; color: #a00; text-decoration: line-through; } .right { background: #dcf2dc; color: #063; }
.missed { color: #777; font-size: .9em; }
@media (max-width: 45em) { td, th { padding: .4em; font-size: .9em; } img { width: 96px; height: 96px; } }
"""


def marked(text, question):
    """A caption as HTML: objects that are there on green, others struck through on red; below it what it leaves out."""
    there, found = set(question["objects"]), mentions(text, question["vocabulary"])
    mark = lambda m: f'<span class="{"right" if m[0].lower() in there else "wrong"}">{m[0]}</span>'
    body = pattern(question["vocabulary"]).sub(mark, html.escape(text))
    missed = sorted(there - set(found))
    return body + (f'<div class="missed">not mentioned: {", ".join(missed)}</div>' if missed else "")


def picture(path):
    return f'<img src="data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" alt="">'


def table(header, rows, caption=""):
    """Rows of finished HTML cells; every column but the first is numeric."""
    line = lambda tag, cells: (
        "<tr>" + "".join(f"<{tag}{' class=n' if i else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"
    )
    lines = [f"<caption>{caption}</caption>", line("th", header), *(line("td", row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def write_sheet(path, title, intro, summary, data, questions, captions):
    """captions: {name of the model: {question id: its caption}}, a column each; `summary`: HTML above the pictures."""
    names = list(captions)
    rows = ["<tr><th>picture</th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"]
    for q in questions:
        cells = "".join(f"<td>{marked(captions[n][q['question_id']], q)}</td>" for n in names)
        rows.append(f"<tr><td>{picture(Path(data) / q['image'])}</td>{cells}</tr>")
    Path(path).write_text(
        page(title, STYLE, f"<h1>{title}</h1><p>{intro}</p>{summary}<table>{''.join(rows)}</table>"),
        encoding="utf-8",
    )
