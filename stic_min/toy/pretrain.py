"""Pretrains the toy base model from scratch, in one command:

  python -m stic_min.toy.pretrain --seed 0 --out stic_min/toy/llava-toy

1. a sentencepiece model whose pieces are the words of the toy world and of STIC's prompts;
2. the ViT, supervised with the contents of each cell;
3. projector and decoder on captions, questions and descriptions (world.record), the ViT frozen, as in LLaVA.

Writes an ordinary LLaVA checkpoint in bf16, and pretrain.json: seed, command, time, losses and dev scores.
"""

import argparse
import functools
import io
import random
import time
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from torch.nn import functional as F

from stic_min import InputError
from stic_min.clip import ClipConfig
from stic_min.formats.tensors import write_tensors
from stic_min.images import CLIP_MEAN, CLIP_STD, make_tiles
from stic_min.llava import LLaVA, LlavaConfig
from stic_min.loader import load_llava
from stic_min.mistral import DecoderConfig, attention
from stic_min.runtime import console, flags, process
from stic_min.text import IMAGE, INFUSED, TEMPLATES, Tokenizer, with_image
from stic_min.toy import captions as toy_captions
from stic_min.toy import vqa as toy_vqa
from stic_min.toy import world
from stic_min.toy.files import write_json
from stic_min.training import rate

STEPS = 4000
VOCABULARY = 900
MAX_POSITIONS = 512
VISION = ClipConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3,
                    image_size=world.SIDE, patch_size=world.CELL)  # fmt: skip
DECODER = DecoderConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=VOCABULARY, rms_norm_eps=1e-5, rope_theta=10000.0,
                        max_positions=MAX_POSITIONS)  # fmt: skip
TEMPLATE = TEMPLATES["mistral_instruct"]
# Some records are in Vicuna's template, which the base knows but does not use: the release trains a Mistral
# checkpoint in it (row F of the README's table).
OTHER_TEMPLATE, OTHER_SHARE = TEMPLATES["vicuna_v1"], 0.1


# ---------------------------------------------------------------- 1. words


def train_tokenizer(path):
    rng = random.Random(0)
    lines = []
    for scene in world.scenes("train", 3000):
        lines += [line for turn in world.record(scene, rng)[1] for text in turn for line in text.split("\n")]
    prompts = [prompt for kind in world.PROMPTS.values() for prompt in kind]
    ascii_characters = " ".join(map(chr, range(33, 127)))
    lines += 50 * [*prompts, *world.NUMBERS, *INFUSED.split("\n"), "[INST] [/INST]", ascii_characters]
    lines += 50 * [OTHER_TEMPLATE.system, OTHER_TEMPLATE.turn]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCABULARY,
        character_coverage=1.0, pad_id=-1, num_threads=1, minloglevel=2,
        user_defined_symbols=["\u2581[INST]", "\u2581[/INST]"],  # \u2581: sentencepiece's space
    )  # fmt: skip
    path.write_bytes(model.getvalue())


# ---------------------------------------------------------------- 2. the ViT


def normalized_pixels(scenes):
    """Pictures of the scenes (N, 3, side, side), normalized for CLIP."""
    return torch.cat([make_tiles(world.paint(s, i), "pad", world.SIDE).pixels for i, s in enumerate(scenes)])


class CellHeads(nn.Module):
    """Patch features (N, 9, C) -> four logits (N, 9, n): color and shape (last class: none), cell, place."""

    def __init__(self):
        super().__init__()
        sizes = len(world.COLORS) + 1, len(world.SHAPES) + 1, len(world.CELLS), len(world.PLACES)
        self.heads = nn.ModuleList(nn.Linear(VISION.hidden_size, n) for n in sizes)

    def forward(self, x):
        return [head(x) for head in self.heads]


def cell_labels(scenes):
    """(N, 9, 4) int64: the classes that `CellHeads` predicts."""
    colors, shapes, places = list(world.COLORS), list(world.SHAPES), list(world.PLACES)
    labels = []
    for scene in scenes:
        for cell in range(9):
            color, shape = scene.cells.get(cell, "none none").split()
            color = colors.index(color) if color in colors else len(colors)
            shape = shapes.index(shape) if shape in shapes else len(shapes)
            labels.append((color, shape, cell, places.index(scene.place)))
    return torch.tensor(labels).view(len(scenes), 9, 4)


def train_vision(tower, pixels, scenes, epochs=8, batch=128, lr=2e-3):
    """Trains the tower to predict each cell's contents. pixels (N, 3, side, side); returns the last loss."""
    heads = CellHeads()
    labels = cell_labels(scenes)
    batch = min(batch, len(pixels))
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    steps = epochs * (len(pixels) // batch)
    order = torch.cat([torch.randperm(len(pixels))[: len(pixels) // batch * batch] for _ in range(epochs)])
    progress = console.Progress("ViT, steps", steps)
    for step, index in enumerate(order.split(batch)):
        optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
        losses = [
            F.cross_entropy(logits.flatten(0, 1), labels[index, :, i].flatten())
            for i, logits in enumerate(heads(tower(pixels[index])))
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.add()
    return sum(losses).item()


@torch.no_grad()
def vision_features(llava, pixels):
    """(N, 9, Cv): the ViT's features of each picture."""
    return torch.cat([llava.vision_tower(part) for part in pixels.split(500)])


# ---------------------------------------------------------------- 3. projector and decoder


class Padded:
    """`attend` for B right-padded sequences of L tokens each, given flat: one causal call for all of them."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, layer, q, k, v):  # (B * L, H, D)
        q, k, v = (x.unflatten(0, (self.sequences, -1)) for x in (q, k, v))
        return attention(q, k, v, is_causal=True).flatten(0, 1)


def encode(record, scene, tokenizer, template=TEMPLATE):
    """A record -> (ids, scored, scene or None).

    The picture takes 9 IMAGE ids. scored[t]: whether ids[t] is in an answer. scene: None without a picture.
    """
    has_picture, turns = record
    users = [with_image(user) if has_picture and i == 0 else user for i, (user, _) in enumerate(turns)]
    ids, scored = [], []
    for i, (prompt, (_, answer)) in enumerate(zip(template.turns(users), turns)):
        prompt_ids = []
        for token in tokenizer.encode_prompt(prompt, first=i == 0):
            prompt_ids += [IMAGE] * VISION.patches**2 if token == IMAGE else [token]
        answer_ids = tokenizer.encode_response(answer)
        ids += prompt_ids + answer_ids
        scored += [False] * len(prompt_ids) + [True] * len(answer_ids)
    return ids, scored, scene if has_picture else None


def batches(scenes, tokenizer, steps, size, rng, make_record):
    """`steps` batches of records of similar length: (ids (B, L), scored (B, L), the pictures' scenes).

    make_record(scene, rng, progress) returns a random record; progress: from 0 to 1, through training.
    """
    pool = []
    for step in range(steps):
        if not pool:
            records = []
            for _ in range(min(50, steps - step) * size):
                i = rng.randrange(len(scenes))
                template = OTHER_TEMPLATE if rng.random() < OTHER_SHARE else TEMPLATE
                record = make_record(scenes[i], rng, step / steps)
                records.append(encode(record, i, tokenizer, template))
            records.sort(key=lambda record: len(record[0]))
            pool = [records[i : i + size] for i in range(0, len(records), size)]
            rng.shuffle(pool)
        batch = pool.pop()
        longest = max(len(ids) for ids, _, _ in batch)
        pad = lambda lists, value: torch.tensor([row + [value] * (longest - len(row)) for row in lists])
        ids, scored, pictured = zip(*batch)
        yield pad(ids, 0), pad(scored, False), [scene for scene in pictured if scene is not None]


def train_decoder(llava, features, scenes, steps, rng, make_record, size=32, lr=2e-3):
    """Trains projector and decoder. features (N, 9, Cv): the ViT's, per scene; returns the last loss.

    The decoder's matrices are trained by Muon, which learns to see with every seed; AdamW needed more steps,
    and with some seeds far more.
    """
    parameters = [p for n, p in llava.named_parameters() if not n.startswith("vision_tower.")]
    matrices = [p for p in llava.model.layers.parameters() if p.dim() == 2]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    progress = console.Progress("decoder, steps", steps)
    data = batches(scenes, llava.tokenizer, steps, size, rng, make_record)
    for step, (ids, scored, pictured) in enumerate(data):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
            optimizer.zero_grad()
        x = llava.model.embed_tokens(ids.clamp_min(0).flatten())  # (B * L, C)
        images = llava.mm_projector(features[pictured]).flatten(0, 1)
        x = x.masked_scatter((ids == IMAGE).flatten()[:, None], images)
        positions = torch.arange(ids.shape[1]).repeat(len(ids))
        x = llava.model(x, positions, Padded(len(ids))).unflatten(0, ids.shape)[:, :-1]  # (B, L - 1, C)
        loss = F.cross_entropy(llava.lm_head(x[scored[:, 1:]]), ids[:, 1:][scored[:, 1:]])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        progress.add()
    return loss.item()


# ---------------------------------------------------------------- the folder


def new_llava(tokenizer):
    """Random weights, scaled so that every part of the decoder's residual stream starts at a similar size."""
    llava = LLaVA(LlavaConfig(DECODER, VISION, "pad", None, TEMPLATE.name, MAX_POSITIONS), tokenizer)
    for name, p in llava.named_parameters():
        std = p[0].numel() ** -0.5 if p.dim() > 1 else 0.0  # biases and the class embedding start at 0
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(p)
            continue
        if name.startswith("vision_tower."):
            std = min(std, 0.02) if "embedding" in name else 0.7 * std
        elif "embed_tokens" in name:
            std = 0.5
        elif "mm_projector.0" in name:
            std *= 0.15  # the ViT's features are large
        elif "o_proj" in name or "down_proj" in name:
            std *= 0.35  # each of the 8 sublayers adds to the residual stream
        nn.init.normal_(p, std=std)
    return llava


def write_llava(llava, folder):
    """LLaVA's layout: config.json, bf16 weights including the ViT's, and the ViT's configuration in `clip/`.

    The ViT's last layer is not stored: hidden state -2 comes before it.
    """
    config, vision = asdict(llava.config.decoder), asdict(llava.config.vision)
    config["max_position_embeddings"] = config.pop("max_positions")
    tokenizer = {"tokenizer_model_max_length": MAX_POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", config | tokenizer | {
        "architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral",
        "torch_dtype": "bfloat16", "hidden_act": "silu", "tie_word_embeddings": False,
        "image_aspect_ratio": "pad", "mm_vision_tower": "clip", "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    })  # fmt: skip
    (folder / "clip").mkdir(exist_ok=True)
    clip = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"} | vision
    write_json(folder / "clip/config.json", clip)
    write_json(folder / "clip/preprocessor_config.json", {
        "crop_size": world.SIDE, "size": world.SIDE, "do_resize": True, "do_center_crop": True,
        "do_normalize": True, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    })  # fmt: skip
    prefixes = {"vision_tower.": "model.vision_tower.vision_tower.vision_model.",
                "mm_projector.": "model.mm_projector."}  # fmt: skip
    weights = {}
    for name, p in llava.named_parameters():
        for ours, published in prefixes.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
        weights[name] = p.detach().bfloat16().contiguous()
    write_tensors(weights, folder / "model.safetensors")


def responses(llava, users, pictures, **sampling):
    """The model's responses to user texts about one picture each."""
    prompts = [TEMPLATE.prompt(with_image(user)) for user in users]
    texts = []
    for i in range(0, len(prompts), 100):
        texts += llava.generate(prompts[i : i + 100], pictures[i : i + 100], max_new_tokens=64, **sampling)
    return texts


def dev_scores(llava, count=400):
    """The base model's scores: greedy captions by kind of prompt, and questions asked directly."""
    llava.eval()
    scenes = world.scenes("dev", count)
    rng = random.Random(0)
    pictures = [[world.paint(scene, f"dev {i}")] for i, scene in enumerate(scenes)]
    scores = {}

    def answers(users, pictures):
        texts = responses(llava, users, pictures)
        return [{"question_id": str(i), "text": text} for i, text in enumerate(texts)]

    vocabulary = world.all_objects()
    for kind in ("short", "good"):
        prompts = [rng.choice(world.PROMPTS[kind]) for _ in scenes]
        questions = [world.caption_facts(scene) | {"question_id": str(i), "vocabulary": vocabulary}
                     for i, scene in enumerate(scenes)]  # fmt: skip
        scores[f"captions, {kind} prompts"] = toy_captions.score(questions, answers(prompts, pictures))
    questions, texts, question_pictures = [], [], []
    for scene, picture in zip(scenes, pictures):
        for kind in world.QUESTIONS:
            text, answer = world.ask(scene, kind, rng)
            questions.append({"question_id": str(len(questions)), "type": kind, "answer": answer})
            texts.append(text)
            question_pictures.append(picture)
    scores["questions"] = toy_vqa.score(questions, answers(texts, question_pictures))
    return scores


def pretrain(out, seed=0, trust=0.0, steps=STEPS, num_scenes=world.TRAINED_ON):
    """Trains a base model and writes it to the folder `out`."""
    begin = time.monotonic()
    if (out / "config.json").exists():
        raise InputError(f"{out} contains a model; choose another --out, or delete the folder")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    train_tokenizer(out / "tokenizer.model")
    llava = new_llava(Tokenizer(out / "tokenizer.model"))
    scenes = world.scenes("train", num_scenes)
    pixels = normalized_pixels(scenes)
    vision_loss = train_vision(llava.vision_tower, pixels, scenes)
    features = vision_features(llava, pixels)
    make_record = functools.partial(world.record, trust=trust)
    decoder_loss = train_decoder(llava, features, scenes, steps, random.Random(seed), make_record)
    write_llava(llava, out)
    minutes = round((time.monotonic() - begin) / 60, 1)
    scores = dev_scores(load_llava(out))
    how = f"--seed {seed} --trust {trust:g} --scenes {num_scenes} --steps {steps}"
    write_json(out / "pretrain.json", {
        "command": f"python -m stic_min.toy.pretrain --out {out.name} {how}",
        "seed": seed, "minutes": minutes, "cores": torch.get_num_threads(), "torch": torch.__version__,
        "vit_loss": vision_loss, "decoder_loss": decoder_loss, "dev": scores,
    })  # fmt: skip
    parameters = sum(p.numel() for p in llava.parameters())
    print(f"{out}: {parameters:,} parameters in {minutes} minutes; scores on dev scenes are in pretrain.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder for the checkpoint")
    parser.add_argument("--seed", type=flags.seed_value, default=0,
                        help="random seed for weights, records and their order")
    parser.add_argument("--trust", type=flags.probability, default=0.0, metavar="P",
                        help="share of descriptions in its training prompts that hallucinate, with answers "
                             "that follow them rather than the picture")  # fmt: skip
    parser.add_argument("--scenes", type=flags.positive, metavar="N", default=world.TRAINED_ON,
                        help="number of scenes (and pictures) in the training data")
    parser.add_argument("--steps", type=flags.positive, metavar="N", default=STEPS,
                        help="number of training steps of the decoder, 32 records each")
    args = parser.parse_args()
    pretrain(Path(args.out), args.seed, args.trust, args.steps, args.scenes)


if __name__ == "__main__":
    process.run(main)
