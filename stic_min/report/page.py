"""What the pages share: a style for light and dark screens; tables, bars and images as HTML."""

import base64
import io
import json
import re
from html import escape

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #ffffff;
  --panel: #f6f8fa; --own: #e8f1fd; --blue: #0a5bd0; --gray: #8f98a3; --ocher: #c08a1e; --interval: #0a1f44;
  --right: #116329; --right-back: #d3f5dc; --wrong: #a40e26; --wrong-back: #ffe1de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #353c45;
  --paper: #14181d; --panel: #1d232a; --own: #152a45;
  --blue: #6cb0ff; --gray: #6e7781; --ocher: #d8a640; --interval: #ffffff;
  --right: #7ee2a0; --right-back: #12381f; --wrong: #ff9aa2; --wrong-back: #4a1519; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 2em auto; max-width: 76em;
  padding: 0 1em; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2.2em 0 .4em; }
h3 { font-size: 1em; margin: 1.8em 0 .4em; } small, .note { color: var(--soft); }
a, summary { color: var(--blue); } summary { cursor: pointer; padding: .15em 0; }
.right { color: var(--right); background: var(--right-back); border-radius: 3px; }
.wrong { color: var(--wrong); background: var(--wrong-back); border-radius: 3px; }
figure { margin: 0; } figure img { max-width: 100%; display: block; }
figcaption { font-size: .85em; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; margin: .6em 0; min-width: 100%;
  overflow-wrap: break-word; }
th, td { text-align: right; padding: .35em .7em; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr.own td { background: var(--own); font-weight: 600; } td small { font-weight: 400; }
.runs td, .runs th { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34em, 100%), 1fr)); gap: 0 3em; }
.bar { display: grid; grid-template-columns: 13em 1fr 9.5em; gap: .8em; align-items: center;
       margin: .25em 0; }
.bar.own { font-weight: 600; } .bar small { font-weight: 400; }
.track { position: relative; height: 1.1em; background: var(--panel); }
.track i { position: absolute; inset: 0 auto 0 0; background: var(--gray); }
.own .track i { background: var(--blue); } .llava .track i { background: var(--ocher); }
.partial .track i { background: repeating-linear-gradient(135deg, var(--blue) 0 5px, var(--own) 5px 10px); }
.track b { position: absolute; top: 45%; height: 2px; background: var(--interval);
  box-shadow: 0 0 0 1px var(--panel); }
button, select { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--gray);
  border-radius: 4px; padding: .2em .7em; cursor: pointer; } button:disabled { opacity: .5; cursor: default; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.paged .list { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30em, 100%), 1fr));
  gap: 1em 2em; }
.flip { display: grid; grid-template-columns: 8em minmax(0, 1fr); gap: 1em; align-items: start;
  border-top: 1px solid var(--line); padding-top: 1em; }
.flip img { width: 100%; } .flip p { margin: 0 0 .3em; } .text { white-space: pre-wrap; }
.right, .wrong { padding: 0 .3em; }
.paged nav { display: flex; flex-wrap: wrap; gap: .5em; align-items: center; margin: .6em 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  padding: .7em; font-size: .85em; }
@media (max-width: 45em) {
  .bar { grid-template-columns: 1fr auto; gap: 0 .8em; }
  .track { grid-column: 1 / -1; grid-row: 2; height: .8em; }
  th:first-child, td:first-child { min-width: 7em; max-width: 9em; white-space: normal;
    overflow-wrap: break-word; }
  .flip { grid-template-columns: 6em minmax(0, 1fr); } body { margin: 1em auto; }
}
"""

# A list that shows PAGE_SIZE of its items at a time. The items, and the images that several lists share, are
# JSON and become HTML when they are shown.
PAGE_SIZE = 24
SCRIPT = """
for (const box of document.querySelectorAll(".paged")) {
  const read = (place, name) => JSON.parse(place?.querySelector("script." + name)?.textContent || "{}");
  const items = read(box, "items"), images = read(box.closest("section"), "images"), size = PAGE_SIZE;
  const [list, kind, back, next, place] = [".list", "select", ".back", ".next", ".place"]
    .map(name => box.querySelector(name));
  let first = 0;
  const show = () => {
    const chosen = items.filter(item => !kind.value || item.kind === kind.value);
    list.innerHTML = chosen.slice(first, first + size).map(item => item.html).join("");
    for (const image of list.querySelectorAll("img[data-image]")) image.src = images[image.dataset.image];
    const last = Math.min(first + size, chosen.length);
    place.textContent = last ? `${first + 1} to ${last} of ${chosen.length}` : "none";
    back.hidden = next.hidden = chosen.length <= size;
    back.disabled = !first;
    next.disabled = last === chosen.length;
  };
  const turn = step => { first += step; show(); box.scrollIntoView(); };
  kind.onchange = () => { first = 0; show(); };
  back.onclick = () => turn(-size);
  next.onclick = () => turn(size);
  show();
}
""".replace("PAGE_SIZE", str(PAGE_SIZE))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of text cells."""
    line = lambda row: "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def page(title: str, body: str, style: str = "") -> str:
    """A complete HTML page. title: text; body: HTML; style: CSS in addition to STYLE."""
    script = f"<script>{SCRIPT}</script>" if "class=paged" in body else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><main>{body}</main>{script}</html>\n"
    )


def json_block(kind: str, value) -> str:
    """A value for a page's script, which finds it by the class `kind`."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def paged(items: list[tuple[str, str]], kinds: dict[str, str]) -> str:
    """A list that is shown in parts and can be filtered by kind.

    items: [(kind, HTML)]; kinds: {kind: label}, both text. An <img data-image=KEY> in an item gets its source
    from `json_block("images", {KEY: URI})` in the <section> around the list.
    """
    options = "".join(f'<option value="{escape(kind)}">{escape(name)}' for kind, name in kinds.items())
    return (
        '<div class=paged><nav><label>show <select><option value="">all' + options + "</select></label>"
        "<button class=back>previous</button><button class=next>next</button>"
        "<span class=place aria-live=polite></span></nav><div class=list></div>"
        + json_block("items", [{"kind": kind, "html": html} for kind, html in items])
        + "<noscript>These items need JavaScript.</noscript></div>"
    )


def data_uri(image: Image.Image, form: str = "PNG", **options) -> str:
    """A PIL image as a data URI. form: PNG or JPEG; options: Pillow's, such as quality."""
    encoded = io.BytesIO()
    image.save(encoded, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def figure(image: Image.Image, alt: str, caption: str = "") -> str:
    """An image with its caption below. alt, caption: text."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{data_uri(image)}" alt="{escape(alt)}">{note}</figure>'


def html_table(header: list[str], rows: list[list[str]], ours: int) -> str:
    """An HTML table of text cells. The first `ours` rows are highlighted; intervals go below their scores."""
    interval = r" (\[[-0-9., ]+\](?: \([^)]*\))?)"  # and what is missing, in parentheses
    text = lambda cell: re.sub(interval, r"<br><small>\1</small>", escape(cell))

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
