"""What the pages share: a style for light and dark screens; tables, notes, numbers and letters as HTML."""

import base64
import io
import re
from collections import Counter
from html import escape, unescape

from PIL import Image

from stic_min.runtime.files import brief

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #ffffff;
  --panel: #f6f8fa; --own: #e8f1fd; --mark: #d5e7ff; --blue: #0a5bd0; --gray: #8f98a3;
  --right: #116329; --right-back: #d3f5dc; --wrong: #a40e26; --wrong-back: #ffe1de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #353c45;
  --paper: #14181d; --panel: #1d232a; --own: #152a45; --mark: #1b416f; --blue: #6cb0ff; --gray: #6e7781;
  --right: #7ee2a0; --right-back: #12381f; --wrong: #ff9aa2; --wrong-back: #4a1519; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 2em auto; max-width: 76em;
  padding: 0 1em; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2.2em 0 .4em; }
h3, h4 { font-size: 1em; margin: 1.8em 0 .4em; } small, .note { color: var(--soft); }
a, summary { color: var(--blue); } summary { cursor: pointer; padding: .15em 0; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
button, select, input { font: inherit; color: inherit; background: var(--panel); max-width: 100%;
  border: 1px solid var(--gray); border-radius: 4px; padding: .2em .6em; }
button, select { cursor: pointer; } button:disabled { opacity: .5; cursor: default; }
.right { color: var(--right); background: var(--right-back); border-radius: 3px; padding: 0 .3em; }
.wrong { color: var(--wrong); background: var(--wrong-back); border-radius: 3px; padding: 0 .3em; }
mark { color: var(--ink); background: var(--mark); border-radius: 3px; }
pre, .text { white-space: pre-wrap; }
pre { background: var(--panel); padding: .7em; margin: .3em 0 1em; font-size: .85em; }
figure { margin: 0; } figure img { max-width: 100%; display: block; }
figcaption { font-size: .85em; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; margin: .6em 0; min-width: 100%;
  overflow-wrap: break-word; }
th, td { text-align: right; padding: .35em .7em; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr.own td { background: var(--own); font-weight: 600; } td small { font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34em, 100%), 1fr)); gap: 0 3em; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr)); gap: .2em 2em; }
.settings div { border-top: 1px solid var(--line); padding: .2em 0; }
.settings dt { color: var(--soft); font-size: .85em; } .settings dd { margin: 0; }
.tools { display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center; padding: .5em 0; }
.tools[hidden] { display: none; }
.turn { position: sticky; top: 0; z-index: 2; background: var(--paper);
  border-bottom: 1px solid var(--line); }
.turn input { width: 4.5em; }
.list { scroll-margin-top: 3.5em; display: grid; gap: 0 2em;
  grid-template-columns: repeat(auto-fill, minmax(min(28em, 100%), 1fr)); }
.card { display: grid; grid-template-columns: 8em minmax(0, 1fr); gap: 1em; align-items: start;
  align-content: start; padding: .9em 0; border-top: 1px solid var(--line); }
.card img { width: 100%; max-height: 12em; object-fit: contain; object-position: top; }
.card p { margin: 0 0 .3em; }
.missing { background: var(--panel); padding: 1.5em .5em; font-size: .85em; }
@media (max-width: 45em) {
  body { margin: 1em auto; }
  th:first-child, td:first-child { min-width: 7em; max-width: 9em; white-space: normal;
    overflow-wrap: break-word; }
  .card { grid-template-columns: 6em minmax(0, 1fr); }
  .turn { gap: .3em .6em; } .list { scroll-margin-top: 6em; }
}
"""


def page(title: str, body: str, style: str = "") -> str:
    """A complete HTML page. title: text; body: HTML; style: CSS in addition to STYLE."""
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><main>{body}</main></html>\n"
    )
    return html.encode(errors="replace").decode()  # halves of surrogate pairs can't be written


def page_of(section: str, style: str = "") -> str:
    """The page of a section alone: its <h2> becomes the page's title, and the headings below move up."""
    title = unescape(re.match("<h2>(.*?)</h2>", section, re.DOTALL)[1])
    body = re.sub(r"(</?h)([2-4])>", lambda match: f"{match[1]}{int(match[2]) - 1}>", section)
    return page(title, body, style)


# ---------------------------------------------------------------- text


def number(value: float, form: str) -> str:
    """A formatted number, with a minus sign instead of a hyphen."""
    return f"{value:{form}}".replace("-", "−")


def percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%" if total else ""


def plural(count: int, noun: str) -> str:
    """1 pair; 6,000 pairs."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def math(text: str) -> str:
    """y_w -> an italic letter with a subscript, as HTML."""
    return "<i>" + re.sub(r"_(\w+)", r"<sub>\1</sub>", escape(text)) + "</i>"


def note(text: str) -> str:
    """A line of text in a soft color."""
    return f"<p class=note>{escape(text)}</p>" if text else ""


# ---------------------------------------------------------------- tables


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of text cells."""
    text = lambda cell: cell.replace("|", r"\|").replace("\n", " ")
    line = lambda row: "| " + " | ".join(map(text, row)) + " |"
    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def wide(table: str, label: str) -> str:
    """A place in which a wide table scrolls, also by keyboard. label: text."""
    return f'<div class=wide tabindex=0 role=region aria-label="{escape(label)}">{table}</div>'


def html_table(header: list[str], rows: list[list[str]], label: str, ours: int = 0) -> str:
    """An HTML table of text cells. The first `ours` rows are highlighted; intervals go below their scores."""
    interval = r" (\[[-0-9., ]+\](?: \([^)]*\))?)"  # and what is missing, in parentheses
    text = lambda cell: re.sub(interval, r"<br><small>\1</small>", escape(cell))

    def line(tag, cells, attribute=""):
        return f"<tr{attribute}>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [line("td", row, " class=own" if i < ours else "") for i, row in enumerate(rows)]
    return wide(f"<table>{line('th', header)}{''.join(body)}</table>", label)


def settings(records: list[dict], names: tuple[str, ...]) -> str:
    """How these records were generated, as far as they say: the values of some fields."""
    parts = []
    for name in names:
        values = Counter(str(record[name]) for record in records if record.get(name) is not None)
        texts = [brief(value) for value, _ in values.most_common(3)]
        if len(values) > 3:
            texts.append("…")
        if texts:
            parts.append(f"<div><dt>{name.replace('_', ' ')}</dt><dd>{escape(', '.join(texts))}</dd></div>")
    return f"<dl class=settings>{''.join(parts)}</dl>" if parts else ""


# ---------------------------------------------------------------- images


def data_uri(image: Image.Image, form: str = "PNG", **options) -> str:
    """A PIL image as a data URI. form: PNG or JPEG; options: Pillow's, such as quality."""
    encoded = io.BytesIO()
    image.save(encoded, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
