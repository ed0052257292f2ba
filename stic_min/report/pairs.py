"""Preference pairs as a gallery: images as the model saw them, prompts, and how the two responses differ.

Works from a pairs file alone: the recorded seed of a corruption replays it. With an adapter, the page also
has log p of both responses before and after training.
"""

from html import escape
from pathlib import Path
from statistics import mean

from stic_min.data import parse_pair
from stic_min.formats.records import read_kind
from stic_min.report import pair_cards, svg
from stic_min.report import record as records
from stic_min.report.gallery import Images, gallery
from stic_min.report.images import image_folders, in_threads, missing_line
from stic_min.report.logps import response_logps
from stic_min.report.options import Options
from stic_min.report.page import html_table, math, note, number, page_of, percent, plural, settings
from stic_min.report.pair_cards import KINDS, Entry, count_words
from stic_min.runtime.files import write_text

LIMIT = 10_000  # pairs in one gallery, about 15 KB each
SETTINGS = ("model", "adapter", "fingerprint", "template", "image_mode", "dtype", "temperature", "top_k",
            "top_p", "max_new_tokens", "seed", "images", "preset", "no_corruption")  # fmt: skip
LETTERS = {
    "v": "the image as the model sees it",
    "h(v)": "a corrupted copy",
    "x": "captioning prompt",
    "x_g": "step-by-step prompt",
    "x_b": "misleading prompt",
    "y_w": "preferred response",
    "y_l": "dispreferred response",
}
STYLE = pair_cards.STYLE


def section(path: str | Path, options: Options) -> str:
    """The pairs of a file as HTML, from an <h2> on; with --adapter, also log p."""
    entries = [Entry(parse_pair(where, record), record) for where, record in read_kind(path, "pairs")]
    folders = image_folders(path, options.images, entries[0].text("images"))
    if options.adapter:
        pairs = [entry.pair for entry in entries]
        for entry, logps in zip(entries, response_logps(pairs, folders, options.model, options.adapter)):
            entry.logps = logps
    shown = entries[:LIMIT]
    images = Images()
    views = in_threads("images", lambda entry: pair_cards.view_of(entry, folders, images), shown)
    return (
        f"<h2>Preference pairs: {escape(Path(path).name)}</h2>"
        + summary(entries)
        + "".join(map(note, remarks(path, entries, views, folders, options)))
        + margin_chart(entries)
        + settings([entry.record for entry in entries], SETTINGS)
        + "<h3>Gallery</h3>"
        + pair_gallery(shown, views, images)
    )


def write(path: str | Path, options: Options) -> Path:
    """Writes NAME.html next to the file and returns its path."""
    out = Path(path).with_suffix(".html")
    write_text(out, page_of(section(path, options), STYLE))
    return out


# ---------------------------------------------------------------- summary


def margins_of(entries):
    """Those of the pairs that differ: the margin of two equal responses is 0 and means nothing."""
    return [entry.margin for entry in entries if entry.logps and not entry.equal]


def summary(entries) -> str:
    """Counts and means by kind, as a table."""
    groups = {name: [e for e in entries if e.kind == kind] for kind, name in KINDS.items()}
    groups = {name: group for name, group in groups.items() if group}
    if len(groups) > 1:
        groups["all"] = entries

    def counted(test):
        counts = [(sum(map(test, group)), len(group)) for group in groups.values()]
        return [f"{count:,} ({percent(count, total)})" for count, total in counts]

    def average_words(side):
        return [f"{mean(count_words(getattr(e.pair, side)) for e in group):.1f}" for group in groups.values()]

    rows = [
        ["pairs", *(f"{len(group):,} ({percent(len(group), len(entries))})" for group in groups.values())],
        ["equal responses", *counted(lambda entry: entry.equal)],
        ["preferred cut off", *counted(lambda entry: not entry.pair.chosen_stopped)],
        ["dispreferred cut off", *counted(lambda entry: not entry.pair.rejected_stopped)],
        ["words, preferred", *average_words("chosen")],
        ["words, dispreferred", *average_words("rejected")],
    ]
    if any(entry.logps for entry in entries):
        margins = [margins_of(group) for group in groups.values()]
        rows += [
            ["margin, mean", *(number(mean(group), "+.2f") if group else "" for group in margins)],
            ["margin > 0", *(percent(sum(margin > 0 for margin in group), len(group)) for group in margins)],
        ]
    return html_table(["kind of pair", *groups], rows, "Pairs by kind")


def remarks(path, entries, views, folders, options) -> list[str]:
    """What is missing or unexpected."""
    missing = sum(not view.clean for view in views)
    lines = [records.unfinished(path), missing_line(missing, len(views), "pair", folders, options.images)]
    if len(entries) > len(views):
        lines.append(f"The gallery shows the first {len(views):,} of {plural(len(entries), 'pair')}.")
    if changed := sum(view.changed for view in views):
        lines.append(f"The corrupted images of {plural(changed, 'pair')} are not those that the model saw: "
                     "replayed from their seeds, the corruptions have other parameters.")  # fmt: skip
    if seedless := sum(entry.corrupted and entry.seed is None for entry in entries):
        lines.append(f"The corrupted images of {plural(seedless, 'pair')} can't be shown: "
                     "no seed is recorded.")  # fmt: skip
    unscored = sum(entry.logps is None for entry in entries)
    if options.adapter and unscored:
        lines.append(f"No log p for {plural(unscored, 'pair')}: no image, or no room for a response.")
    return lines


def margin_chart(entries) -> str:
    margins = margins_of(entries)
    if not margins:
        return ""
    p_w, p_l, ref_p_w, ref_p_l = map(math, ("p_θ(y_w)", "p_θ(y_l)", "p_0(y_w)", "p_0(y_l)"))
    text = (
        f"Margin: (log {p_w} − log {ref_p_w}) − (log {p_l} − log {ref_p_l}), by how much training made the "
        f"preferred response more likely than the dispreferred one; {math('p_0')} is the model before "
        f"training. It is DPO's margin without the factor {math('β')}. Equal responses are left out."
    )
    return f"<p class=note>{text}</p>" + svg.histogram("Margins", margins, "margin", "pairs")


# ---------------------------------------------------------------- gallery


def pair_gallery(entries, views, images) -> str:
    numbered = [(position, *both) for position, both in enumerate(zip(entries, views), 1)]
    articles = in_threads("pairs", lambda item: pair_cards.article(*item), numbered)
    kinds = list(KINDS)
    filters = {
        "kind": (list(KINDS.values()), [kinds.index(entry.kind) for entry in entries]),
        "responses": (["different", "equal"], [int(entry.equal) for entry in entries]),
    }
    extra = [count_words(entry.pair.chosen) - count_words(entry.pair.rejected) for entry in entries]
    orders = {"preferred longer first": (extra, -1), "dispreferred longer first": (extra, 1)}
    if any(entry.logps for entry in entries):
        margins = [round(entry.margin, 4) if entry.logps else None for entry in entries]
        orders |= {"lowest margin first": (margins, 1), "highest margin first": (margins, -1)}
    letters = "; ".join(f"{math(letter)} {meaning}" for letter, meaning in LETTERS.items())
    return (
        f"<div class=pairs><p class=note>{letters}. <mark>Marked</mark>: words that the other response does "
        f"not have at this place.</p>{gallery('pairs', articles, images, filters, orders)}</div>"
    )
