"""STIC and its neighbours on the toy world: one base model (lessons.py) and one seed.

Every method gets the same unlabeled pictures and, to the nearest whole epoch, the same number of training
steps: one epoch over as many samples as there are pictures, with the batch size, learning rate, beta and LoRA
of recipe.py. All else follows the defaults of stic_min/neighbours, except that SIMA samples at temperature 1:
its usual settings seldom give a toy model a second answer.

Exceptions: STIC's stage 2 comes on top of stage 1's steps; SPIN is also followed by it, and SIMA also trained
with STIC's NLL term, to see what these contribute. SPIN's two iterations and POVID's two stages get half of
the pictures each; SPIN's second iteration has only its own pairs (no --previous), since the first one's would
add steps. SIMA has no pair where its two answers are equal or its critic gives no verdict, and triangular
consistency loses malformed and repeated triplets; both train for more epochs instead.
"""

import random

from stic_min.runtime.files import read_records, write_text
from stic_min.text import CAPTION_PROMPTS, with_image
from stic_min.toy import chain, files, lessons, recipe, world

METHODS = {
    "base": "base",
    "spin": "SPIN, two iterations",
    "spinstage2": "SPIN, then STIC's stage 2",
    "sima": "SIMA",
    "simafree": "SIMA, critic without reference",
    "simanll": "SIMA with STIC's NLL term",
    "povid": "POVID, both stages",
    "triangular": "triangular consistency",
    "trirandom": "triangular consistency, random choice",
    "stage1": "STIC, stage 1",
    "stic": "STIC",
}
TRAINED = [name for name in METHODS if name != "base"]
# What each method's time and steps are added up from: files and adapters
SPIN = "spin1.jsonl", "spin1", "spin2.jsonl", "spin"
OUTPUTS = {
    "spin": SPIN,
    "spinstage2": (*SPIN, "spinstage2-descriptions.jsonl", "spinstage2"),
    "sima": ("answers.jsonl", "sima-critiques.jsonl", "sima-pairs.jsonl", "sima"),
    "simafree": ("answers.jsonl", "simafree-critiques.jsonl", "simafree-pairs.jsonl", "simafree"),
    "simanll": ("answers.jsonl", "sima-critiques.jsonl", "sima-pairs.jsonl", "simanll"),
    "povid": ("povid1.jsonl", "povid1", "povid2.jsonl", "povid"),
    "triangular": ("triplets.jsonl", "triplet-scores.jsonl", "triangular.json", "triangular"),
    "trirandom": ("triplets.jsonl", "trirandom.json", "trirandom"),  # it does not use the scores
    "stage1": ("pairs.jsonl", "stage1"),
    "stic": ("pairs.jsonl", "stage1", "stic-descriptions.jsonl", "stic"),
}
DATA = {  # of these, the pairs or triplets that it trains on
    "spin": ("spin1.jsonl", "spin2.jsonl"),
    "spinstage2": ("spin1.jsonl", "spin2.jsonl"),
    "sima": ("sima-pairs.jsonl",),
    "simafree": ("simafree-pairs.jsonl",),
    "simanll": ("sima-pairs.jsonl",),
    "povid": ("povid1.jsonl", "povid2.jsonl"),
    "triangular": ("triangular.json",),
    "trirandom": ("trirandom.json",),
    "stage1": ("pairs.jsonl",),
    "stic": ("pairs.jsonl",),
}
ADAPTERS = {name for outputs in OUTPUTS.values() for name in outputs if "." not in name}
STEPS = len(ADAPTERS) + 3 * len(TRAINED)  # adapters and scores of a chain

DPO = {flag: value for flag, value in recipe.STAGE1.items() if flag != "--alpha"}
TUNING = recipe.LORA | recipe.STAGE2 | {"--batch-size": 16, "--micro-batch": 16}
OWN_LORA = {"--lora-r": None, "--lora-alpha": None}  # the adapter's, where one is continued
TRIPLETS = 2  # per picture; the better half is kept


def labels_used(pictures):
    """What each method is told about its pictures, for the table."""
    true_captions = f"{pictures:,} true captions"
    instructions = f"{recipe.num_instructions(pictures):,} instructions"
    return dict.fromkeys(METHODS, "none") | {
        "spin": true_captions,
        "spinstage2": f"{true_captions}, {instructions}",
        "sima": f"{true_captions}, read by the critic",
        "simanll": f"{true_captions}, read by the critic",
        "povid": f"{true_captions}, and as many with invented objects",
        "stic": instructions,
    }


# ---------------------------------------------------------------- labels


def invented(scene, rng):
    """A caption that differs from the true one: it mentions the usual objects, and others that are absent."""
    while (caption := world.web_caption(scene, "bad", rng)) == world.true_caption(scene):
        pass
    return caption


def captioning_record(name, scene, rng):
    """A record of LLaVA's instructions: a short captioning prompt and the true caption. POVID's data also has
    the caption with invented objects."""
    prompt = {"from": "human", "value": with_image(rng.choice(CAPTION_PROMPTS))}
    answer = lambda caption: [prompt, {"from": "gpt", "value": caption}]
    return {"id": name, "image": name, "conversations": answer(world.true_caption(scene)),
            "rejected_conversations": answer(invented(scene, rng))}  # fmt: skip


def write_labels(folder, scenes, seed):
    """captions.json, for SIMA; its halves, for SPIN, without the rejected captions, and for POVID, with them.
    The critic's prompts. scenes: {name: Scene}."""
    rng = random.Random(f"labels {seed}")
    records = [captioning_record(name, scene, rng) for name, scene in scenes.items()]
    instructions = [{key: r[key] for key in ("id", "image", "conversations")} for r in records]
    files.write_json(folder / "captions.json", instructions)
    for number in (1, 2):
        files.write_json(folder / f"captions{number}.json", instructions[number - 1 :: 2])
        files.write_json(folder / f"invented{number}.json", records[number - 1 :: 2])
    write_text(folder / "sima-prompt.txt", lessons.CRITIC_WITH_REFERENCE)
    write_text(folder / "simafree-prompt.txt", lessons.CRITIC)


# ---------------------------------------------------------------- the methods; existing output is skipped


class Methods:
    """The methods on one base model and seed. Each function trains the adapter of its name."""

    def __init__(self, model, folder, seed, pictures):
        self.model, self.folder, self.seed, self.pictures = model, folder, seed, pictures
        self.images = folder / "unlabeled"
        self.inputs = {"--model": model, "--images": self.images, "--seed": seed}

    def call(self, method, step, out, *words):
        recipe.neighbor(method, step, *words, {"--out": self.folder / out})

    def generate(self, method, step, out, **flags):
        self.call(method, step, out, self.inputs | recipe.SAMPLING | recipe.spelled(flags))

    def train(self, method, step, data, out, training=DPO, start=None, **flags):
        """data: (flag, file). From an adapter `start`, LoRA continues with its own settings."""
        flag, file = data
        inputs = self.inputs | {flag: self.folder / file} | training | recipe.spelled(flags)
        if start:
            inputs |= {"--adapter": self.folder / start} | OWN_LORA
        if not (self.folder / out / "adapter_config.json").exists():
            self.call(method, step, out, inputs)

    def epochs(self, file):
        """How often a file's records are trained on, for as many samples as there are pictures."""
        return max(1, round(self.pictures / len(read_records(self.folder / file))))

    def spin(self):
        half = lambda number: self.folder / f"captions{number}.json"
        self.generate("spin", "pairs", "spin1.jsonl", instructions=half(1))
        self.train("spin", "train", ("--pairs", "spin1.jsonl"), "spin1", epochs=1)
        adapter = self.folder / "spin1"
        self.generate("spin", "pairs", "spin2.jsonl", instructions=half(2), adapter=adapter)
        self.train("spin", "train", ("--pairs", "spin2.jsonl"), "spin", start="spin1", epochs=1)

    def sima(self, name="sima"):
        is_free = name == "simafree"
        answers, critiques, pairs = "answers.jsonl", f"{name}-critiques.jsonl", f"{name}-pairs.jsonl"
        instructions = self.folder / "captions.json"
        self.generate("sima", "answers", answers, instructions=instructions, temperature=1.0, top_p=1.0)
        prompt = self.folder / f"{name}-prompt.txt"
        critic = {"label_free": is_free, "prompt": prompt}
        self.generate("sima", "critique", critiques, answers=self.folder / answers, **critic)
        self.call("sima", "pairs", pairs, {"--critiques": self.folder / critiques})
        self.train("sima", "train", ("--pairs", pairs), name, epochs=self.epochs(pairs))

    def simafree(self):
        self.sima("simafree")

    def simanll(self):
        pairs, alpha = "sima-pairs.jsonl", recipe.STAGE1["--alpha"]
        self.train("sima", "train", ("--pairs", pairs), "simanll", epochs=self.epochs(pairs), alpha=alpha)

    def povid(self):
        for number in (1, 2):
            data = {"--data": self.folder / f"invented{number}.json"}
            self.call("povid", "pairs", f"povid{number}.jsonl", data)
        self.train("povid", "stage1", ("--pairs", "povid1.jsonl"), "povid1", epochs=1)
        self.train("povid", "stage2", ("--pairs", "povid2.jsonl"), "povid", start="povid1")

    def triangular(self, name="triangular"):
        triplets, scores, update = "triplets.jsonl", "triplet-scores.jsonl", f"{name}.json"
        self.generate("triangular", "triplets", triplets, per_image=TRIPLETS)
        inputs = self.inputs | {"--seed": None, "--device": "cpu", "--triplets": self.folder / triplets}
        self.call("triangular", "score", scores, inputs)
        selection = recipe.spelled({"keep": 1 / TRIPLETS, "seed": self.seed, "random": name == "trirandom"})
        self.call("triangular", "select", update, {"--scores": self.folder / scores} | selection)
        data = "--instructions", update
        self.train("triangular", "train", data, name, TUNING, epochs=self.epochs(update))

    def trirandom(self):
        self.triangular("trirandom")

    def stage1(self):
        pairs = self.folder / "pairs.jsonl"
        recipe.make_pairs(self.model, self.images, pairs, self.seed)
        recipe.stage1(self.model, pairs, self.images, self.folder / "stage1", self.seed)

    def stic(self, name="stic", start="stage1"):
        instruct = self.folder / "instruct"
        recipe.stage2(self.model, self.folder / start, instruct, self.folder / name, self.seed, {})

    def spinstage2(self):
        self.stic("spinstage2", "spin")


def named_scenes(pictures, seed):
    """{name: Scene} of a seed's unlabeled pictures."""
    scenes = world.scenes("unlabeled", pictures, seed)
    return dict(zip(files.picture_names(f"unlabeled{seed}", pictures), scenes))


def run(model, folder, data, seed, pictures):
    """Everything for one base model and one seed."""
    scenes = files.write_unlabeled(folder / "unlabeled", pictures, seed)
    files.write_instructions(folder / "instruct", recipe.num_instructions(pictures), seed)
    write_labels(folder, scenes, seed)
    methods = Methods(model, folder, seed, pictures)
    for name in TRAINED:
        if not (folder / name / "adapter_config.json").exists():
            getattr(methods, name)()
        chain.measure(model, folder / name, data, folder / "results")


def run_base(model, folder, data):
    chain.measure(model, None, data, folder / "results")
