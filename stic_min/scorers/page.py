"""Tables in Markdown, and a self-contained HTML page of tables and charts."""

import re
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2.2em 0 .4em; } small, .note { color: #666; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; margin: .6em 0; min-width: 100%; }
th, td { text-align: right; padding: .35em .7em; border-top: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.own td { background: #eef4fd; font-weight: 600; } td small { font-weight: 400; }
.runs td, .runs th { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34em, 100%), 1fr)); gap: 0 3em; }
.bar { display: grid; grid-template-columns: 13em 1fr 9.5em; gap: .8em; align-items: center;
       margin: .25em 0; }
.bar.own { font-weight: 600; } .bar small { font-weight: 400; }
.track { position: relative; height: 1.1em; background: #f1f1f1; }
.track i { position: absolute; inset: 0 auto 0 0; background: #b9bec7; }
.own .track i { background: #1f6feb; } .llava .track i { background: #ddb86a; }
.track b { position: absolute; top: 45%; height: 2px; background: #0a1f44; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; font-size: .85em; }
@media (max-width: 45em) {
  .bar { grid-template-columns: 1fr auto; gap: 0 .8em; }
  .track { grid-column: 1 / -1; grid-row: 2; height: .8em; }
  th:first-child, td:first-child { max-width: 9em; white-space: normal; } body { margin: 1em auto; }
}
"""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of text cells."""
    line = lambda row: "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def page(title: str, style: str, body: str) -> str:
    """A complete HTML page. body: HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style>{body}</html>\n"
    )


def html_table(header: list[str], rows: list[list[str]], ours: int) -> str:
    """An HTML table of text cells. The first `ours` rows are highlighted; intervals go below their scores."""
    text = lambda cell: re.sub(r" (\[[-0-9., ]+\])", r"<br><small>\1</small>", escape(cell))

    def line(tag, cells, attribute=""):
        return f"<tr{attribute}>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [line("td", row, " class=own" if i < ours else "") for i, row in enumerate(rows)]
    return f"<div class=wide><table>{line('th', header)}{''.join(body)}</table></div>"


def bar(label: str, value: str, score: float, interval: list[float] | None, kind: str, full: float) -> str:
    """One bar of a chart whose axis ends at `full` percent, with a thin line for the interval."""
    place = lambda number: f"{100 * min(max(number, 0), full) / full:.2f}%"
    span, line = "", ""
    if interval:
        low, high = interval
        line = f'<b style="left:{place(low)};right:calc(100% - {place(high)})"></b>'
        span = f" <small>{low:.1f} to {high:.1f}</small>"
    track = f'<span class=track><i style="width:{place(score)}"></i>{line}</span>'
    return f'<div class="bar {kind}"><span>{escape(label)}</span>{track}<span>{value}{span}</span></div>'
