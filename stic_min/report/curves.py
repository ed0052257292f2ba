"""The curves of a training run, from log.jsonl, each with what to look for below it."""

import math
from dataclasses import dataclass

from stic_min.report import record as records
from stic_min.report import svg

LN2 = math.log(2)
CLIP_NORM = 1.0  # training.CLIP_NORM; importing it would import torch
MOST_POINTS = 2000  # of a line; a longer one keeps the extremes of its neighborhoods

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22em, 100%), 1fr));
  gap: 1.6em 2em; margin: 1em 0; }
.curves svg { width: 100%; max-width: 30em; }
.curves figcaption { max-width: 36em; }
"""


@dataclass
class Curve:
    title: str
    fields: dict[str, str]  # {name in log.jsonl: name in the legend}
    how_to_read: str  # HTML
    zero: bool = False
    smooth: bool = True
    levels: dict[str, float] | None = None


def curves(stage: int | None, record: dict, scores_text: bool = True) -> list[Curve]:
    """What is drawn of a stage. record: of run.json; scores_text: whether the rejected text is scored."""
    equal, samples = records.number(record, "equal"), records.number(record, "samples")
    floor = argmax = ""
    if not scores_text:
        argmax = " For the dispreferred response, it is that of the model's own top token at each position."
    elif equal and samples:
        floor = (
            f" Pairs with identical responses stay at ln 2, so here the average over all pairs can't fall "
            f"below {equal / samples * LN2:.2f}."
        )
    stage1 = [
        Curve(
            "Loss and its two terms (Eq. 4.1)",
            {"loss": "loss", "dpo": "DPO term", "alpha_nll": "α·NLL term"},
            "loss = DPO term + α·NLL term. The DPO term (Eq. 3.3) starts at ln 2 = 0.693 if policy and "
            f"reference start as the same model, and should fall.{floor} The α·NLL term is −α log p of the "
            "preferred response; it falls if that becomes more probable.",
            levels={"ln 2": LN2},
        ),
        Curve(
            "Margin",
            {"margin": "margin"},
            "Reward of the preferred response minus that of the dispreferred one, the argument of ℓ in "
            "Eq. 3.3, averaged over the pairs whose responses differ. It should rise. It starts at 0 if "
            "policy and reference start as the same model.",
            zero=True,
        ),
        Curve(
            "Accuracy",
            {"accuracy": "accuracy"},
            "Fraction of the differing pairs whose margin is positive. It should rise toward 1; at 0.5, the "
            "responses are told apart no better than by chance. (If all margins are 0, as at the start, so "
            "is the accuracy.)",
            zero=True,
            levels={"chance": 0.5},
        ),
        Curve(
            "log p of the responses",
            {"logp_chosen": "preferred", "logp_rejected": "dispreferred"},
            "log p(y | v, x) under the model in training, summed over the tokens, so long responses have "
            f"lower values.{argmax} The gap should grow. If log p of the preferred response falls as well, "
            "both become less probable: Eq. 3.3 sees only their difference. The α·NLL term of Eq. 4.1 pulls "
            "the preferred one up. (log.jsonl calls the responses chosen and rejected.)",
        ),
        Curve(
            "Reward of the responses",
            {"reward_chosen": "preferred", "reward_rejected": "dispreferred"},
            "β (log p − log p of the reference), DPO's implicit reward. Good: preferred above 0, "
            "dispreferred below. A negative reward of the preferred response means that it is less probable "
            "than under the reference.",
            zero=True,
        ),
    ]
    stage2 = [
        Curve(
            "Loss",
            {"loss": "loss"},
            "−log p(y | v, x) of the answers (Algorithm 2), averaged over the answer tokens of each batch. "
            "It should fall, at least at first, and then level off.",
        ),
    ]
    common = [
        Curve(
            "Gradient norm",
            {"grad_norm": "gradient norm"},
            f"Before clipping: above {CLIP_NORM:g}, the dashed line, gradients are scaled down to it. Single "
            "peaks are harmless; if the norm keeps growing, the learning rate may be too high.",
            zero=True,
            levels={"clipped": CLIP_NORM},
        ),
        Curve(
            "Learning rate for LoRA",
            {"lr": "learning rate"},
            "Linear warm-up over the first 3% of the steps, then a cosine to 0.",
            zero=True,
            smooth=False,
        ),
        Curve(
            "Tokens per second",
            {"tokens_per_s": "tokens per second"},
            "Over all ranks, image tokens included. A step that saved a checkpoint counts the time for it "
            "toward the next one.",
            zero=True,
        ),
        Curve(
            "Peak memory in GB",
            {"memory_gb": "memory"},
            "Of the first rank up to this step: its GPU's, or on a CPU the process's. It never falls, except "
            "where a run was resumed.",
            zero=True,
            smooth=False,
        ),
    ]
    return {1: stage1, 2: stage2}.get(stage, []) + common


def thin(points):
    """At most about MOST_POINTS points: the lowest and the highest of each neighborhood, in order."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        y = lambda i, part=part: part[i][1]
        extremes = {min(range(len(part)), key=y), max(range(len(part)), key=y)}
        kept += [part[i] for i in sorted(extremes)]
    return kept


def points_of(log, field):
    """[(step, value), ...] of a field of log.jsonl, and how many values are NaN or (almost) infinite."""
    points = [(record["step"], record[field]) for record in log if field in record]
    finite = [(step, value) for step, value in points if abs(value) < 1e300]
    return finite, len(points) - len(finite)


def figure(log: list[dict], curve: Curve) -> str:
    """One chart with what to look for below it; a line of text if there is nothing to draw."""
    series, not_finite = {}, 0
    for field, name in curve.fields.items():
        points, count = points_of(log, field)
        not_finite += count
        if points:
            series[name] = thin(points)
    note = f" {not_finite} values are NaN or infinite and left out." if not_finite else ""
    if not series:
        return f"<figure><b>{curve.title}</b><figcaption>No data in log.jsonl.{note}</figcaption></figure>"
    count = max(map(len, series.values()))
    window = smoothing(count) if curve.smooth else 1
    chart = svg.line_chart(
        curve.title, series, zero=curve.zero, smooth=window, levels=curve.levels
    )
    missing = [name for name in curve.fields.values() if name not in series]
    if missing:
        note += f" Not in log.jsonl: {', '.join(missing)}."
    return f"<figure>{chart}<figcaption>{curve.how_to_read}{note}</figcaption></figure>"


def smoothing(count):
    """The window of the running mean: about a tenth of the points, and none where there are few."""
    return max(3, count // 10 | 1) if count >= 20 else 1


def section(log: list[dict], stage: int | None, record: dict, scores_text: bool) -> str:
    """All curves as HTML."""
    count = smoothing(min(len(log), MOST_POINTS))
    strong = f" The strong line is the running mean of {count} points." if count > 1 else ""
    figures = "".join(figure(log, curve) for curve in curves(stage, record, scores_text))
    return (
        f"<p class=note>Each point of a curve is one optimizer step.{strong}</p>"
        f"<div class=curves>{figures}</div>"
    )
