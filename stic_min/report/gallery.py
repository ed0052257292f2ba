"""A list of thousands of items with images, shown PAGE_SIZE at a time, with filters and orders.

The page opens quickly because only the first PAGE_SIZE items are HTML. The others are JSON blocks of as many
items each, parsed when they are shown; a small index of all items is enough to filter and sort. Each image
is stored once, next to the first item that shows it.
"""

import json
import re
from hashlib import sha256
from html import escape

PAGE_SIZE = 24
IMAGE = re.compile(r'<img data-image="(\w+)"')
SCRIPT = """
{
  const gallery = document.currentScript.parentElement, find = name => gallery.querySelector(name);
  const read = name => JSON.parse(find(name).textContent);
  const list = find(".list"), turn = find(".turn"), filters = [...gallery.querySelectorAll(".filter")];
  const sort = find(".sort"), back = find(".back"), next = find(".next"), page = find("input");
  const index = read("script.index"), size = PAGE_SIZE, text = number => number.toLocaleString("en");
  const blocks = {0: [...list.children].map(item => item.outerHTML)};  // page 1 is HTML
  const block = n => blocks[n] ??= read(`script.block-${n}`);
  const images = window.images ??= {};  // of all galleries of the page: {key: source}
  for (const image of list.querySelectorAll("[src]")) images[image.dataset.image] = image.src;
  const all = [...Array(index.count).keys()];
  let order = all;
  const arrange = () => {
    order = all.filter(i => filters.every((select, f) =>
      !select.value || index.filters[f][i] === +select.value));
    if (sort?.value) {
      const [values, sign] = index.orders[sort.value];
      const key = i => values[i] === null ? Infinity : sign * values[i];
      order.sort((i, j) => key(i) - key(j) || i - j);
    }
    page.value = 1;
    show();
  };
  const turnTo = () => {
    show();
    if (list.getBoundingClientRect().top < turn.getBoundingClientRect().bottom - 1) list.scrollIntoView();
  };
  const show = () => {
    const pages = Math.max(1, Math.ceil(order.length / size));
    page.max = pages;
    page.value = Math.min(pages, Math.max(1, Math.floor(page.value) || 1));
    const start = (page.value - 1) * size, shown = order.slice(start, start + size);
    back.disabled = +page.value === 1;
    next.disabled = +page.value === pages;
    find(".pages").textContent = text(pages);
    const range = shown.length ? `${text(start + 1)} to ${text(start + shown.length)} of ` : "";
    find(".count").textContent = `${range}${text(order.length)} ${index.noun}`;
    if (document.readyState === "loading" && shown.some(i => i >= size)) {  // blocks are still being read
      list.textContent = "loading";
      return addEventListener("DOMContentLoaded", show, {once: true});
    }
    list.innerHTML = shown.map(i => block(Math.floor(i / size))[i % size]).join("");
    for (const image of list.querySelectorAll("[data-image]")) {
      const key = image.dataset.image;
      image.src = images[key] ??= document.getElementById(`image-${key}`).textContent;
    }
  };
  for (const control of gallery.querySelectorAll("select")) control.onchange = arrange;
  page.onchange = turnTo;
  back.onclick = () => { page.value--; turnTo(); };
  next.onclick = () => { page.value++; turnTo(); };
  for (const tools of gallery.querySelectorAll(".tools")) tools.hidden = false;
  arrange();
}
""".replace("PAGE_SIZE", str(PAGE_SIZE))


class Images:
    """The images that the items of one or several galleries show. Equal ones have the same key."""

    def __init__(self):
        self.uris = {}  # {key: data URI}
        self.stored = set()  # keys of those that are in the page

    def add(self, uri: str) -> str:
        """The key of an image."""
        key = sha256(uri.encode()).hexdigest()[:12]
        self.uris[key] = uri
        return key

    def new_in(self, html):
        """{key: data URI} of the images that are shown for the first time, as of now stored."""
        new = {key: self.uris[key] for key in IMAGE.findall(html) if key not in self.stored}
        self.stored |= new.keys()
        return new


def image_tag(key: str, alt: str) -> str:
    """An image of an item. key: from `Images.add`; alt: text."""
    return f'<img data-image="{key}" alt="{escape(alt)}">'


def json_block(kind, value):
    """A value for the script, which finds it by the class `kind`."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def select(kind, label, names):
    choices = "".join(f'<option value="{value}">{escape(name)}</option>' for value, name in names.items())
    return f"<label>{escape(label)} <select class={kind}>{choices}</select></label>"


def gallery(
    noun: str,
    items: list[str],
    images: Images,
    filters: dict[str, tuple[list[str], list[int]]] | None = None,
    orders: dict[str, tuple[list, int]] | None = None,
) -> str:
    """The list as HTML.

    items    the HTML of each, one element; its images are `image_tag`s
    filters  {label: (names of the classes, each item's class as an index of these names)}
    orders   {label: (each item's number to sort by, 1 or -1: ascending or descending)}; None comes last
    """
    filters = {label: pair for label, pair in (filters or {}).items() if len(set(pair[1])) > 1}
    first, *others = [items[i : i + PAGE_SIZE] for i in range(0, len(items), PAGE_SIZE)] or [[]]
    html = "".join(first)
    for key, uri in images.new_in(html).items():  # so that they are shown without the script, too
        html = html.replace(f'<img data-image="{key}"', f'<img data-image="{key}" src="{uri}"', 1)
    blocks = []
    for n, block in enumerate(others, 1):
        blocks += [f'<script type="text/plain" id="image-{key}">{uri}</script>'
                   for key, uri in images.new_in("".join(block)).items()]  # fmt: skip
        blocks.append(json_block(f"block-{n}", block))
    index = {"noun": noun, "count": len(items), "filters": [classes for _, classes in filters.values()]}
    selects = [
        select("filter", label, {"": "all"} | {i: name for i, name in enumerate(names) if i in set(classes)})
        for label, (names, classes) in filters.items()
    ]
    if orders:
        index["orders"] = list(orders.values())
        selects.append(select("sort", "sorted by", {"": "order of the file"} | dict(enumerate(orders))))
    controls = f"<div class=tools hidden>{''.join(selects)}</div>" if selects else ""
    return (
        f'<div class=gallery>{controls}<div class="tools turn" hidden>'
        "<button type=button class=back>‹ previous</button>"
        "<span><label>page <input type=number min=1 value=1></label> of <span class=pages></span></span>"
        "<button type=button class=next>next ›</button>"
        "<span class=count role=status aria-live=polite></span></div>"
        f"<noscript><p class=note>Without JavaScript, only the first {PAGE_SIZE} are shown.</p></noscript>"
        f"<div class=list>{html}</div>{json_block('index', index)}<script>{SCRIPT}</script>"
        f"{''.join(blocks)}</div>"
    )
