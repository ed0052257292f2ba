"""A page of pictures with the model's captions before and after training, as one self-contained HTML file."""

import base64
import html
from pathlib import Path

from stic_min.report.page import html_table, page
from stic_min.toy.captions import mentions, pattern

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #222; }
h1 { font-size: 1.5em; } table { border-collapse: collapse; width: 100%; margin: 1em 0 2em; }
th, td { text-align: left; vertical-align: top; padding: .6em .8em; border-top: 1px solid #ddd; }
.wide th + th, .wide td + td { text-align: right; } .note { color: #555; }
img { width: 144px; height: 144px; image-rendering: pixelated; display: block; }
.wrong { background: #ffd5d0; color: #a00; text-decoration: line-through; }
.right { background: #dcf2dc; color: #063; } .missed { color: #777; font-size: .9em; }
@media (max-width: 45em) { td, th { padding: .4em; font-size: .9em; } img { width: 96px; height: 96px; } }
"""


def marked(text, question):
    """A caption as HTML: present objects on green, absent ones struck out on red, omissions listed below."""
    present = set(question["objects"])

    def mark(match):
        kind = "right" if match[0].lower() in present else "wrong"
        return f'<span class="{kind}">{match[0]}</span>'

    body = pattern(question["vocabulary"]).sub(mark, html.escape(text))
    missed = sorted(present - set(mentions(text, question["vocabulary"])))
    return body + (f'<div class="missed">not mentioned: {", ".join(missed)}</div>' if missed else "")


def data_uri(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(path):
    return f'<img src="{data_uri(Path(path).read_bytes())}" alt="">'


def write_sheet(path, title, intro, header, scores, note, data, questions, captions):
    """header, scores: the table above the pictures, with a note. captions: {model: {question id: its
    caption}}, one column each."""
    rows = ["<tr><th>picture</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in captions) + "</tr>"]
    for question in questions:
        texts = [by_id[question["question_id"]] for by_id in captions.values()]
        cells = "".join(f"<td>{marked(text, question)}</td>" for text in texts)
        rows.append(f"<tr><td>{picture(Path(data) / question['image'])}</td>{cells}</tr>")
    summary = f'{html_table(header, scores, 0)}<p class="note">{note}</p>'
    body = f"<h1>{title}</h1><p>{intro}</p>{summary}<table>{''.join(rows)}</table>"
    Path(path).write_text(page(title, body, STYLE), encoding="utf-8")
