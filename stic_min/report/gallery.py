"""A list of thousands of items with images, shown PAGE_SIZE at a time, with filters and orders.

The page opens quickly because only the first PAGE_SIZE items are HTML. The others are JSON blocks of as many
items each, parsed when they are shown; a small index of all items is enough to filter and sort. Each image
is stored once, in the block of the first item that shows it.
"""

import re
from html import escape

from stic_min.report.page import PAGE_SIZE, json_block

STYLE = """
.gallery .tools { display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center; padding: .5em 0; }
.gallery .tools[hidden] { display: none; }
.gallery .turn { position: sticky; top: 0; z-index: 2; background: var(--paper);
  border-bottom: 1px solid var(--line); }
.gallery .list { scroll-margin-top: 3.5em; }
.gallery select { max-width: 100%; }
.gallery input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--gray);
  border-radius: 4px; padding: .2em .6em; width: 4.5em; }
@media (max-width: 45em) { .gallery .turn { gap: .3em .6em; } .gallery .list { scroll-margin-top: 6em; } }
"""

SCRIPT = """
{
  const gallery = document.currentScript.parentElement, find = name => gallery.querySelector(name);
  const read = name => JSON.parse(find(name).textContent);
  const list = find(".list"), turn = find(".turn"), filters = [...gallery.querySelectorAll(".filter")];
  const sort = find(".sort"), back = find(".back"), next = find(".next"), page = find("input");
  const index = read("script.index"), size = PAGE_SIZE, text = number => number.toLocaleString("en");
  const first = {items: [...list.children].map(item => item.outerHTML), images: []};  // page 1 is HTML
  for (const image of list.querySelectorAll("[src]")) first.images[image.dataset.image] = image.src;
  const all = [...Array(index.count).keys()];
  let order = all;
  const arrange = () => {
    order = all.filter(i => filters.every((select, f) =>
      !select.value || index.filters[f][i] === +select.value));
    if (sort.value) {
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
    const blocks = {0: first};
    const block = n => blocks[n] ??= read(`script.block-${n}`);
    list.innerHTML = shown.map(i => block(Math.floor(i / size)).items[i % size]).join("");
    for (const image of list.querySelectorAll("[data-image]")) {
      const number = +image.dataset.image, n = index.images.findLastIndex(start => start <= number);
      image.src = block(n).images[number - index.images[n]];
    }
  };
  for (const control of [...filters, sort]) control.onchange = arrange;
  page.onchange = turnTo;
  back.onclick = () => { page.value--; turnTo(); };
  next.onclick = () => { page.value++; turnTo(); };
  for (const tools of gallery.querySelectorAll(".tools")) tools.hidden = false;
  arrange();
}
""".replace("PAGE_SIZE", str(PAGE_SIZE))


def select(kind, label, names):
    choices = "".join(f'<option value="{value}">{escape(name)}</option>' for value, name in names.items())
    return f"<label>{escape(label)} <select class={kind}>{choices}</select></label>"


def with_sources(html, uris):
    """The images of the first page, for readers without the script as well; these see a repeated image's
    description in the place of its copies."""
    unused = set(range(len(uris)))

    def source(match):
        number = int(match[1])
        if number not in unused:
            return match[0]
        unused.remove(number)
        return f'{match[0]} src="{uris[number]}"'

    return re.sub(r'<img data-image="(\d+)"', source, html)


def gallery(
    noun: str,
    items: list[str],
    uris: list[str],
    filters: dict[str, tuple[list[str], list[int]]],
    orders: dict[str, tuple[list, int]],
) -> str:
    """The list as HTML.

    items    the HTML of each, one element; `<img data-image="N"` shows uris[N]
    uris     the images as data URIs, in the order in which `items` mention them first
    filters  {label: (names of the classes, each item's class as an index of these names)}
    orders   {label: (each item's number to sort by, 1 or -1: ascending or descending)}; None comes last
    """
    blocks = [items[start : start + PAGE_SIZE] for start in range(0, len(items), PAGE_SIZE)]
    bounds = [0]  # numbers of each block's first image
    for block in blocks:
        numbers = map(int, re.findall(r'<img data-image="(\d+)"', "".join(block)))
        bounds.append(max(bounds[-1], *(number + 1 for number in numbers), 0))
    scripts = [
        json_block(f"block-{n}", {"items": block, "images": uris[bounds[n] : bounds[n + 1]]})
        for n, block in enumerate(blocks[1:], 1)
    ]
    index = {
        "noun": noun,
        "count": len(items),
        "filters": [classes for _, classes in filters.values()],
        "orders": list(orders.values()),
        "images": bounds[:-1],
    }
    selects = [
        select("filter", label, {"": "all"} | {i: name for i, name in enumerate(names) if i in set(classes)})
        for label, (names, classes) in filters.items()
    ]
    selects.append(select("sort", "sorted by", {"": "order of the file"} | dict(enumerate(orders))))
    return (
        f'<div class=gallery><div class=tools hidden>{"".join(selects)}</div>'
        '<div class="tools turn" hidden><button type=button class=back>‹ previous</button>'
        "<span><label>page <input type=number min=1 value=1></label> of <span class=pages></span></span>"
        "<button type=button class=next>next ›</button>"
        "<span class=count role=status aria-live=polite></span></div>"
        f"<noscript><p class=note>Without JavaScript, only the first {PAGE_SIZE} are shown.</p></noscript>"
        f"<div class=list>{with_sources(''.join(blocks[0]) if blocks else '', uris)}</div>"
        f"{json_block('index', index)}<script>{SCRIPT}</script>{''.join(scripts)}</div>"
    )
