"""Lessons for the neighbours: a toy base model learns to judge captions and to write questions.

  python -m stic_min.toy.lessons --model stic_min/toy/llava-toy --out llava-toy-lessons

SIMA's critic and triangular consistency need a base model that follows their prompts, as an
instruction-tuned model does. The toy base model does not. This continues its pretraining on three kinds of
records: ordinary ones, so that it forgets little; two captions, with their mistakes and a verdict; and
questions to write about a picture. All methods are then compared on the resulting model.

Writes an ordinary checkpoint, and pretrain.json: how it was made, and its scores on dev scenes.
"""

import argparse
import random
import time
from pathlib import Path

import torch

from stic_min import InputError
from stic_min.loader import load_llava
from stic_min.neighbours.sima_critic import critic_prompt, parse_verdict
from stic_min.neighbours.triplets import BOTH_PROMPT, Triplet, parse_form
from stic_min.runtime import flags, process
from stic_min.runtime.files import fingerprint, read_json
from stic_min.text import CAPTION_PROMPTS
from stic_min.toy import pretrain, world
from stic_min.toy.files import write_json

STEPS, LR = 1500, 1e-3  # half of pretraining's learning rate
# The kinds of lessons; the rest of the records are ordinary ones.
SHARES = {"critic": 0.2, "critic without reference": 0.2, "question": 0.05, "both": 0.05}

# SIMA's own prompt does not fit: the toy model has 512 positions and spells unknown words in characters.
# Nearly all of these words are in its vocabulary.
CRITIC = "{question}\n1: {response_1}\n2: {response_2}\nWhat objects are absent?"
CRITIC_WITH_REFERENCE = "Image description:\n{reference}\n\n" + CRITIC
# Kinds of captions to judge, with their weights: mostly those that differ little, as a model's own answers do
CANDIDATES = {"true": 1, "good": 1, "short": 4, "bad": 1}


# ---------------------------------------------------------------- records


def mistakes(scene, described):
    """The absent objects that a description of a scene, itself a Scene, mentions, in order."""
    return [name for _, name in described.objects if name not in scene.names]


def two_descriptions(scene, rng):
    """Two descriptions, as Scenes, with different numbers of mistakes, in random order."""
    while True:
        kinds = rng.choices(list(CANDIDATES), CANDIDATES.values(), k=2)
        pair = [scene if kind == "true" else world.web_scene(scene, kind, rng) for kind in kinds]
        if len(mistakes(scene, pair[0])) != len(mistakes(scene, pair[1])):
            return pair


def judge(scene, pair):
    """The critic's answer: the mistakes of each description, and the verdict for the one with fewer."""
    first, second = (mistakes(scene, described) for described in pair)
    reasons = f"1: {', '.join(first) or 'none'}. 2: {', '.join(second) or 'none'}."
    return f"{reasons} [[{1 if len(first) < len(second) else 2}]]"


def critic_turn(scene, pair, rng, with_reference):
    """(user, answer)"""
    reference = world.true_caption(scene) if with_reference else None
    template = CRITIC_WITH_REFERENCE if with_reference else CRITIC
    captions = [world.true_caption(described) for described in pair]
    return critic_prompt(rng.choice(CAPTION_PROMPTS), reference, captions, template), judge(scene, pair)


def question_turn(scene, rng, task):
    """(user, answer) of a task of triangular consistency: "question" or "both"."""
    question, answer = world.some_questions(scene, rng, 0.05, progress=1.0)[0]
    return Triplet("", "", question, answer).turn(task)


def record(scene, rng, progress=1.0):
    """One random record of the lessons, in the form of world.record."""
    [kind] = rng.choices([*SHARES, "ordinary"], [*SHARES.values(), 1 - sum(SHARES.values())])
    if kind == "ordinary":
        return world.record(scene, rng)
    if kind in ("question", "both"):
        return True, [question_turn(scene, rng, kind)]
    return True, [critic_turn(scene, two_descriptions(scene, rng), rng, kind == "critic")]


# ---------------------------------------------------------------- scores on dev scenes


def critic_scores(verdicts, right):
    """In percent, of cases that were judged in both orders. verdicts: [(1, 2 or None) in either order];
    right: the right ones in the first order. A missing verdict is wrong and disagrees."""
    both = [verdict for pair in verdicts for verdict in pair]
    expected = [verdict for first in right for verdict in (first, 3 - first)]
    percent = lambda hits, total: round(100 * sum(hits) / total, 2) if total else None
    return {
        "accuracy": percent([a == b for a, b in zip(both, expected)], len(both)),
        "no_verdict": percent([verdict is None for verdict in both], len(both)),
        "verdict_1": percent([v == 1 for v in both], len([v for v in both if v])),  # 50 without position bias
        "agree": percent([None not in pair and sum(pair) == 3 for pair in verdicts], len(verdicts)),
    }


def dev_scores(llava, count=400):
    """The critic's accuracy and position bias, with and without a reference, and the share of well-formed
    triplets, sampled as triangular.py does; then the usual scores."""
    llava.eval()
    scenes = world.scenes("dev", count)
    pictures = [[world.paint(scene, f"dev {i}")] for i, scene in enumerate(scenes)]
    scores = {}
    for name, with_reference in (("critic", True), ("critic without reference", False)):
        rng = random.Random(name)
        users, right = [], []
        for scene in scenes:
            pair = two_descriptions(scene, rng)
            state = rng.getstate()
            for order in (pair, pair[::-1]):  # the same question twice
                rng.setstate(state)
                user, answer = critic_turn(scene, order, rng, with_reference)
                users.append(user)
                right.append(parse_verdict(answer)[0])
        texts = pretrain.responses(llava, users, [picture for picture in pictures for _ in range(2)])
        verdicts = [parse_verdict(text)[0] for text in texts]
        scores[name] = {"n": count} | critic_scores(list(zip(verdicts[::2], verdicts[1::2])), right[::2])
    texts = pretrain.responses(llava, [BOTH_PROMPT] * count, pictures, temperature=0.7)
    well_formed = [parse_form(text) for text in texts]
    scores["triplets"] = {
        "n": count, "well_formed": round(100 * sum(map(bool, well_formed)) / count, 2),
        "different_questions": len({triplet[0] for triplet in well_formed if triplet}),
    }  # fmt: skip
    return scores | pretrain.dev_scores(llava, count)


# ---------------------------------------------------------------- the checkpoint


def teach(model, out, seed=0, steps=STEPS, num_scenes=world.TRAINED_ON):
    """Continues the pretraining of the checkpoint `model` on lessons and writes the result to `out`."""
    begin = time.monotonic()
    if (out / "config.json").exists():
        raise InputError(f"{out} contains a model; choose another --out, or delete the folder")
    llava = load_llava(model).requires_grad_(True)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    scenes = world.scenes("train", num_scenes)
    features = pretrain.vision_features(llava, pretrain.normalized_pixels(scenes))
    rng = random.Random(f"lessons {seed}")
    loss = pretrain.train_decoder(llava, features, scenes, steps, rng, record, lr=LR)
    (out / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    pretrain.write_llava(llava, out)
    minutes = round((time.monotonic() - begin) / 60, 1)
    scores = dev_scores(load_llava(out))
    how = f"--seed {seed} --scenes {num_scenes} --steps {steps}"
    origin = model / "pretrain.json"
    model_command = read_json(origin)["command"] if origin.exists() else None
    write_json(out / "pretrain.json", {
        "command": f"python -m stic_min.toy.lessons --model {model.resolve().name} --out {out.name} {how}",
        "model": fingerprint(model), "model_command": model_command,
        "seed": seed, "minutes": minutes, "cores": torch.get_num_threads(), "torch": torch.__version__,
        "loss": loss, "dev": scores,
    })  # fmt: skip
    print(f"{out}: written after {minutes} minutes; scores on dev scenes are in pretrain.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="toy base model to teach")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="output folder for the checkpoint")  # fmt: skip
    parser.add_argument("--seed", type=flags.seed_value, default=0,
                        help="random seed for records and their order")  # fmt: skip
    parser.add_argument("--scenes", type=flags.positive, metavar="N", default=world.TRAINED_ON,
                        help="number of scenes (and pictures) in the training data")  # fmt: skip
    parser.add_argument("--steps", type=flags.positive, metavar="N", default=STEPS,
                        help="number of training steps, 32 records each")
    args = parser.parse_args()
    teach(args.model, args.out, args.seed, args.steps, args.scenes)


if __name__ == "__main__":
    process.run(main)
