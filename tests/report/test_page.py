"""What the pages share: headings, tables, numbers, and images that galleries store once."""

import time

from pages import Page, blocks, index, sources
from PIL import Image

from stic_min.report import gallery, images, page, pair_cards


def test_headings_of_a_section_alone_move_up():
    html = page.page_of("<h2>Pairs: a&amp;b</h2><h3>Gallery</h3><h4>x</h4>", ".own {}")
    assert "<title>Pairs: a&amp;b</title>" in html and ".own {}</style>" in html
    assert "<main><h1>Pairs: a&amp;b</h1><h2>Gallery</h2><h3>x</h3></main>" in html


def test_a_table_scrolls_by_keyboard_and_has_a_name():
    [scroller] = Page(page.html_table(["a", "b"], [["1", "<2>"]], 'The "table"')).all("div")
    assert scroller == {"class": "wide", "tabindex": "0", "role": "region", "aria-label": 'The "table"'}


def test_numbers_and_letters():
    assert page.number(-1.25, "+.1f") == "−1.2" and page.number(3, ".2f") == "3.00"
    assert page.plural(1, "pair") == "1 pair" and page.plural(6000, "pair") == "6,000 pairs"
    assert page.math("p_θ(y_w) <") == "<i>p<sub>θ</sub>(y<sub>w</sub>) &lt;</i>"
    assert page.percent(1, 8) == "12.5%" and page.percent(0, 0) == ""


def test_settings_are_those_of_all_records():
    html = page.settings([{"seed": i, "model": "<m>", "top_p": None} for i in range(5)], ("model", "top_p", "seed"))
    assert html.count("<dt>") == 2 and "<dd>&lt;m&gt;</dd>" in html and "<dd>0, 1, 2, …</dd>" in html


def test_galleries_of_a_page_store_an_image_once():
    store = gallery.Images()
    keys = [store.add(f"data:image/png;base64,{i}") for i in (*range(30), 0)]
    assert keys[0] == keys[-1] and len({*keys}) == 30
    items = [f"<article>{gallery.image_tag(key, '<alt>')}</article>" for key in keys]
    first, second = (gallery.gallery("items", items, store) for _ in range(2))
    assert len(sources(first)) == 30 and sources(second) == {} and "&lt;alt&gt;" in first
    assert [len(block) for block in blocks(second)] == [24, 7]
    assert index(second) == {"noun": "items", "count": 31, "filters": []} and "<select" not in second


def test_only_filters_that_choose_are_offered():
    filters = {"kind": (["a", "b", "c"], [0, 2, 0]), "other": (["d", "e"], [1, 1, 1])}
    html = gallery.gallery("items", ["<article></article>"] * 3, gallery.Images(), filters)
    assert index(html)["filters"] == [[0, 2, 0]] and html.count("<select") == 1 and 'value="1"' not in html
    assert index(gallery.gallery("items", [], gallery.Images()))["count"] == 0


def test_thumbnails():
    small, large = Image.new("RGB", (30, 20)), Image.new("RGB", (300, 200))
    kinds = [images.thumbnail(image, 60).split(";")[0] for image in (small, large)]
    assert kinds == ["data:image/png", "data:image/jpeg"]
    assert images.thumbnail(small, 60, enlarge=True).startswith("data:image/jpeg")


def test_names_with_line_breaks_and_broken_unicode():
    html = page.page_of("<h2>a\nb \ud800</h2><p>x</p>")
    assert "<title>a\nb ?</title>" in html and "<h1>a\nb ?</h1>" in html
    assert page.markdown(["a"], [["1\n2 | 3"]]).splitlines() == ["| a |", "| --- |", r"| 1 2 \| 3 |"]


def test_responses_that_repeat_one_word_are_compared_quickly():
    begin = time.process_time()
    chosen, rejected = pair_cards.marked("w " * 4000, "w x " * 4000)
    assert time.process_time() - begin < 5  # it took minutes
    assert "<mark>" in chosen and "<mark>" in rejected
