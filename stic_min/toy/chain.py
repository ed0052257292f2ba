"""One base model and one seed of the study: its own pictures, pairs, every variant and every evaluation.

The first rows are the paper's; rows A to released are the authors' release, one difference at a time and all
together (the letters are those of the README's table). The settings are those of recipe.py; they and the
world were fixed on the dev split before the test split was used.
"""

import json
from contextlib import contextmanager, nullcontext

from torch.nn import functional as F

from stic_min import InputError
from stic_min.lora import LoRALinear
from stic_min.runtime.files import read_records, write_text
from stic_min.toy import files, recipe

RELEASED = {"preset": "released", "projector_lr": None}  # None: the preset's, not recipe.py's

# ---------------------------------------------------------------- what is trained

# name: the file of pairs, and flags that differ from recipe.STAGE1. Names with "1" are only stage 2's start.
STAGE1 = {
    "stage1": ("pairs", {}),
    "positives1": ("pairs", {"beta": 0}),  # Table 3: Eq. 4.1 without its DPO term
    "A1": ("pairs", {"rejected_score": "argmax"}),
    "C1": ("pairs-C", {}),
    "F1": ("pairs", {"template": "vicuna_v1"}),
    "H1": ("pairs", {"projector_lr": 0}),
    "Q1": ("pairs-Q", {}),
    "released1": ("pairs-released", RELEASED),
    "alpha0": ("pairs", {"alpha": 0}),
    "prompts": ("prompts", {}),
    "corruptions": ("corruptions", {}),
}
# name: the stage 1 that its stage 2 starts from (None: the base model), flags of --describe and of training
STAGE2 = {
    "stic": ("stage1", {}, {}),
    "positives": ("positives1", {}, {}),
    "stage2only": (None, {}, {}),
    "plain": (None, {}, {"plain": True}),
    "A": ("A1", {}, {}),
    "C": ("C1", {}, {}),
    "F": ("F1", {}, {"template": "vicuna_v1"}),
    "H": ("H1", {}, {"projector_lr": 0}),
    "Q": ("Q1", {"top_k": 50}, {}),
    "released": ("released1", {"preset": "released"}, RELEASED),
}
PAIRS = {  # name: flags of generate_pairs.py
    "pairs-C": {"no_corruption": True},
    "pairs-Q": {"top_k": 50},
    "pairs-released": {"preset": "released"},
}
EVALUATION = {  # name: flags of evaluate.py
    "F": {"template": "vicuna_v1"},
    "released": {"preset": "released"},
}
# captions and questions, direct and with DaR
MAIN = ("stage1", "stic", "positives")  # for the base model that trusts text
MEASURED = ("stage1", "alpha0", "prompts", "corruptions", *STAGE2)

# ---------------------------------------------------------------- the first base model only

ROUNDS = [f"round{number}-{reference}" for reference in ("theta0", "previous") for number in (2, 3)]
# captions only
BETAS = [factor * recipe.STAGE1["--beta"] for factor in (1 / 4, 1, 4)]
RATES = [factor * recipe.STAGE1["--lr"] for factor in (1 / 3, 1, 3)]
GRID = {
    f"beta{beta:g}-lr{lr:g}": {"beta": beta, "lr": lr}
    for beta in BETAS for lr in RATES if (beta, lr) != (BETAS[1], RATES[1])
}  # fmt: skip
SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # Figure 7: pairs for stage 1 as a multiple of --images
SCALE_LR = recipe.STAGE1["--lr"] / 2
# Stage 1 of LoRA alone, at a learning rate at which rounding to bf16 shows. It has no scores: the margins of
# training are compared.
SMALL_LR = recipe.STAGE1["--lr"] / 100
ROUNDING = ("fp32", "bf16-one-rounding", "bf16-two-roundings")


def scale_name(scale):
    return f"scale{scale:g}"


def scaled(scale, pairs):
    return max(1, round(scale * pairs))


# ---------------------------------------------------------------- one chain


def select_pairs(folder, kind, pairs):
    """Writes the pairs whose dispreferred response came from a bad prompt, or from a corrupted picture."""
    records = [record for _, record in read_records(folder / "pairs.jsonl")]
    selected = [record for record in records if record["image_corruption"] == (kind == "corruptions")]
    if len(selected) < pairs:
        raise InputError(
            f"{folder}: only {len(selected)} of {len(records)} pairs are from {kind}; {pairs} are needed"
        )
    write_text(folder / f"{kind}.jsonl", "".join(json.dumps(record) + "\n" for record in selected))


def measure(model, adapter, data, out, **flags):
    """Captions and questions, direct and with DaR; the authors' preset describes without the picture."""
    recipe.evaluate("toycaptions", model, adapter, data, out, **flags)
    recipe.evaluate("toyvqa", model, adapter, data, out, **flags)
    recipe.evaluate("toyvqa", model, adapter, data, out, "blind-dar" if "preset" in flags else "dar", **flags)


def iterate(model, folder, data, seed, pairs):
    """Iterated STIC: theta_1 generates the pairs of round 2, and theta_2 those of round 3, each on another
    random part of the pictures; any two parts share almost half of theirs.

    The policy continues from the previous round; the reference stays theta_0, or is the previous round's
    result.
    """
    for reference in ("theta0", "previous"):
        adapter = folder / "stage1"
        for number in (2, 3):
            name = f"round{number}-{reference}"
            file, pictures = folder / f"{name}.jsonl", folder / "unlabeled"
            recipe.make_pairs(model, pictures, file, seed + 1000 * number, adapter=adapter, limit=pairs)
            lora = {"adapter": adapter, "lora_r": None, "lora_alpha": None}  # the adapter's own
            if reference == "previous":
                lora["reference"] = adapter
            recipe.stage1(model, file, pictures, folder / name, seed, **lora)
            adapter = folder / name
            measure(model, adapter, data, folder / "results")


@contextmanager
def two_roundings():
    """Inside, LoRA's update is added to W x after both have been rounded, as other implementations do."""

    def forward(self, x):
        y = F.linear(x, self.weight)
        if self.enabled:
            z = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
            y = y + self.scale * z
        return y

    one_rounding = LoRALinear.forward
    LoRALinear.forward = forward
    try:
        yield
    finally:
        LoRALinear.forward = one_rounding


def run_first_base(model, folder, data, seed, pairs):
    """What is trained with the first base model only."""
    stage1 = lambda name, limit=pairs, **flags: recipe.stage1(
        model, folder / "pairs.jsonl", folder / "unlabeled", folder / name, seed, limit, **flags
    )
    captions = lambda name: recipe.evaluate("toycaptions", model, folder / name, data, folder / "results")
    for name, flags in GRID.items():
        stage1(name, **flags)
        captions(name)
    for scale in SCALES:
        stage1(scale_name(scale), scaled(scale, pairs), lr=SCALE_LR)
        captions(scale_name(scale))
    for name in ROUNDING:
        with two_roundings() if name == "bf16-two-roundings" else nullcontext():
            dtype = "float32" if name == "fp32" else "bfloat16"
            stage1(name, lr=SMALL_LR, projector_lr=0, dtype=dtype)


def num_steps(is_first, main_only):
    """Adapters and scores of a chain."""
    if main_only:
        return sum(name in STAGE2 for name in MAIN) + 2 + 3 * len(MAIN)
    extra = 4 * len(ROUNDS) + 2 * (len(GRID) + len(SCALES)) + len(ROUNDING) if is_first else 0
    return len(STAGE1) + len(STAGE2) + 3 * len(MEASURED) + 1 + extra


def run(model, folder, data, seed, pairs, is_first, main_only):
    """Everything for one base model and one seed; with `main_only`, the variants of MAIN."""
    pictures, instruct = folder / "unlabeled", folder / "instruct"
    # Each kind of dispreferred response makes up about half; with this margin, either alone fills `pairs`.
    files.write_unlabeled(pictures, 2 * pairs + max(200, int(6 * pairs**0.5)), seed)
    files.write_instructions(instruct, recipe.num_instructions(pairs), seed)
    recipe.make_pairs(model, pictures, folder / "pairs.jsonl", seed)
    for kind in ("prompts", "corruptions"):
        select_pairs(folder, kind, pairs)
    measured = MAIN if main_only else MEASURED
    starts = {STAGE2[name][0] for name in measured if name in STAGE2} | set(measured)
    for name, (kind, flags) in STAGE1.items():
        if name in starts:
            if kind in PAIRS:
                recipe.make_pairs(model, pictures, folder / f"{kind}.jsonl", seed, limit=pairs, **PAIRS[kind])
            recipe.stage1(model, folder / f"{kind}.jsonl", pictures, folder / name, seed, pairs, **flags)
    for name in measured:
        if name in STAGE2:
            start, describe_flags, flags = STAGE2[name]
            start = start and folder / start
            recipe.stage2(model, start, instruct, folder / name, seed, describe_flags, **flags)
        measure(model, folder / name, data, folder / "results", **EVALUATION.get(name, {}))
    if not main_only:
        recipe.evaluate("toyvqa", model, folder / "stic", data, folder / "results", "blind-dar")  # row E
    if is_first:
        iterate(model, folder, data, seed, pairs)
        run_first_base(model, folder, data, seed, pairs)


def run_base(model, folder, data):
    """The base model's own scores, in its own template and in Vicuna's."""
    measure(model, None, data, folder / "results")
    measure(model, None, data, folder / "results-vicuna", template="vicuna_v1")
