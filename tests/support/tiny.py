"""A tiny world to try everything on: `python tests/support/tiny.py DIR` writes it, the same bytes on every run.

Two LLaVA checkpoints with random weights, their CLIP tower, images, instructions and ScienceQA problems in the
published layouts. The published names are spelled out here, not taken from stic_min, so that they
check the loader independently.
"""
import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

SIDE, PATCH = 56, 14                                    # a tile is 4 x 4 = 16 patches
VOCAB, HIDDEN, MLP, HEADS, LAYERS = 600, 32, 64, 4, 2   # the decoder
WIDTH, VISION_MLP, VISION_LAYERS = 32, 64, 3            # the tower; hidden state -2 needs two of its three layers

# file, size, mode, and the scene: background, then shapes in percent of width and height (disc: its box)
PICTURES = [
    ("scene_01.jpg", (300, 200), "RGB", "skyblue, box green 0 70 100 100, disc gold 75 7 93 33, box red 25 45 60 85,"
     "box sienna 39 62 47 85, poly maroon 20 45 42 18 65 45, box white 29 52 35 62, box white 50 52 56 62"),
    ("scene_02.png", (200, 280), "RGB", "lightcyan, box royalblue 0 65 100 100, poly sienna 15 62 85 62 70 75 30 75,"
     "box black 48 22 51 62, poly white 53 24 82 57 53 57, line black 20 15 26 11 32 15 38 11 44 15"),
    ("scene_03.png", (240, 180), "L", "midnightblue, disc ivory 64 8 86 37, poly gray 0 99 25 40 52 78 75 52 100 99"),
    ("scene_04.png", (180, 260), "RGBA", "azure, disc olivedrab -35 80 65 150, disc orange 12 4 88 56, line black 32 50"
     " 42 68, line black 68 50 58 68, box peru 42 68 58 77, disc white 28 4 72 56, disc orange 38 4 62 56"),
    ("scene_05.jpg", (300, 120), "RGB", "palegreen, box gray 0 65 100 100, box blue 15 45 85 74, poly blue 29 46 37 16"
     " 63 16 75 46, poly white 35 44 40 22 60 22 67 44, disc black 23 60 35 90, disc black 65 60 77 90"),
    ("scene_06.png", (224, 224), "RGB", "beige, box green 48 40 52 75, disc pink 37 2 63 28, disc pink 22 14 48 40,"
     "disc pink 52 14 78 40, disc pink 28 31 54 57, disc pink 46 31 72 57, disc gold 40 20 60 40, box tan 33 72 67 96"),
    ("scene_07.png", (48, 40), "RGB", "purple, disc yellow 13 6 87 94, box black 35 30 41 42, box black 57 30 63 42,"
     "poly black 34 58 43 74 57 74 66 58"),
    ("scene_08.jpg", (120, 300), "RGB", "azure, box lime 0 85 100 100, box brown 42 40 58 92, disc darkgreen 4 8 96 50,"
     "disc red 22 20 34 25, disc red 56 16 68 21, disc red 42 29 54 34, disc red 66 34 78 39, disc red 22 38 34 43"),
]
# instructions: number of the image or None, then human and gpt in turn
TALKS = [
    (1, "<image>\nDescribe the image concisely.", "A red house with a brown door stands under a yellow sun."),
    (2, "What colour is the sail of the boat?\n<image>", "The sail is white."),         # LLaVA has both orders
    (3, "<image>\nIs it day or night?", "It is night.", "How many mountains are there?", "There are two mountains."),
    (None, "Name three primary colours.", "Red, yellow and blue."),
    (4, "<image>\nWrite a short story.", "An orange balloon drifts above a hill. Two friends wave from the basket."),
    (5, "<image>\nWhat is the blue car doing?\nAnswer the question using a single word or phrase.", "Driving"),
    (6, "<image>\nWhat is in the pot?", "A pink flower.", "What is at its centre?", "A disc.", "The pot?", "Tan."),
    (7, "<image>\nHow does the face feel?", "It looks happy: it smiles."),
    (None, "What is 12 + 30?", "12 + 30 = 42.", "And 42 - 2?", "42 - 2 = 40."),
    (8, "<image>\nHow many apples?\nA. 3\nB. 5\nAnswer with the option's letter from the given choices directly.", "B"),
]
# ScienceQA: id, number of the image or None, question, choices, answer, hint, subject, grade
PROBLEMS = [
    ("4", 1, "Which part of the house lets people in?", ["the roof", "the door"], 1, "", "natural", 2),
    ("11", None, "Which word is a noun?", ["run", "quickly", "table"], 2, "A noun names a thing.", "language", 3),
    ("18", 3, "What is in the sky?", ["sun", "moon", "cloud", "bird"], 1, "It is  night.", "natural", 5),   # two blanks
    ("25", 5, "Which force slows the car?", ["friction", "lift"], 0, "", "natural", 8),
    ("37", None, "Which ocean is the largest?", ["Pacific", "Atlantic", "Arctic", "Indian"], 0, "", "social", 7),
    ("52", 8, "What makes its own food?", ["tree", "ladder", "sky"], 0, "Plants use light to do so.", "natural", 10),
]
# more text for the tokenizer: words of the prompts, so that these are not split into single letters
PHRASES = """A chat between a curious human and an artificial intelligence assistant. USER: ... ASSISTANT: ...
The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ... ASSISTANT: ...
[INST] ... [/INST] ... [INST] Image description: ... [/INST] Illustrate the details of the picture. Summarize the
visual content presented. Explain what is depicted in the photograph. Outline the key elements captured in the image.
    Please provide a detailed description of the image, focusing on the following. Identify the main subjects.
    Describe the setting of the image. Is it indoors or outdoors? Are there any specific elements, such as lighting?
    Describe the dominant colors and the overall composition. Point out any details that might be relevant."""


def train_tokenizer(path):
    """Writes a sentencepiece BPE model with Llama's settings (ids 0 unk, 1 bos, 2 eos), always the same bytes."""
    lines = PHRASES.split("\n") + [" ".join(map(chr, range(32, 127)))]
    lines += [line for _, *turns in TALKS for turn in turns for line in turn.replace("<image>", "").split("\n") if line]
    lines += [line for _, _, question, choices, *_ in PROBLEMS for line in (question, *choices)]
    model = io.BytesIO()        # writing to memory keeps the path out of the file
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, allow_whitespace_only_pieces=True, character_coverage=1.0, num_threads=1, minloglevel=3)
    assert sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size() == VOCAB
    Path(path).write_bytes(model.getvalue())


class Weights(dict):
    """Name -> tensor, sampled from one generator: the order of the calls determines every number."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name, std, *shape, mean=0.0, bias=0.0, suffix=".weight"):
        self[name + suffix] = mean + std * torch.randn(shape, generator=self.generator)
        if bias:
            self.add(name, bias, shape[0], suffix=".bias")

    def add_decoder(self, kv):
        """The decoder and the projector; kv: width of the keys. Logits have a standard deviation of about 1."""
        self.add("model.embed_tokens", 0.05, VOCAB, HIDDEN)
        for layer in (f"model.layers.{i}." for i in range(LAYERS)):
            for name, std, rows in ("q", 0.25, HIDDEN), ("k", 0.25, kv), ("v", 0.1, kv), ("o", 0.1, HIDDEN):
                self.add(f"{layer}self_attn.{name}_proj", std, rows, HIDDEN)
            for name, rows, columns in ("gate", MLP, HIDDEN), ("up", MLP, HIDDEN), ("down", HIDDEN, MLP):
                self.add(f"{layer}mlp.{name}_proj", 0.1, rows, columns)
            self.add(layer + "input_layernorm", 0.1, HIDDEN, mean=1.0)
            self.add(layer + "post_attention_layernorm", 0.1, HIDDEN, mean=1.0)
        self.add("model.norm", 0.1, HIDDEN, mean=1.0)
        self.add("lm_head", 0.2, VOCAB, HIDDEN)
        self.add("model.mm_projector.0", 0.1, HIDDEN, WIDTH, bias=0.05)         # 1 is the GELU between the two
        self.add("model.mm_projector.2", 0.1, HIDDEN, HIDDEN, bias=0.02)

    def add_vision(self, prefix):
        """The whole tower, with the last layer and post_layernorm, which hidden state -2 does not need."""
        self.add(prefix + "embeddings.class_embedding", 0.2, WIDTH, suffix="")
        self.add(prefix + "embeddings.patch_embedding", 0.05, WIDTH, 3, PATCH, PATCH)
        self.add(prefix + "embeddings.position_embedding", 0.2, (SIDE // PATCH) ** 2 + 1, WIDTH)
        for layer in (f"{prefix}encoder.layers.{i}." for i in range(VISION_LAYERS)):
            for name, std in (("q_proj", 0.25), ("k_proj", 0.25), ("v_proj", 0.15), ("out_proj", 0.15)):
                self.add(layer + "self_attn." + name, std, WIDTH, WIDTH, bias=0.1)
            self.add(layer + "mlp.fc1", 0.2, VISION_MLP, WIDTH, bias=0.1)
            self.add(layer + "mlp.fc2", 0.2, WIDTH, VISION_MLP, bias=0.1)
            self.add(layer + "layer_norm1", 0.1, WIDTH, mean=1.0, bias=0.05)
            self.add(layer + "layer_norm2", 0.1, WIDTH, mean=1.0, bias=0.05)
        self.add(prefix + "pre_layrnorm", 0.1, WIDTH, mean=1.0, bias=0.05)      # CLIP's own spelling
        self.add(prefix + "post_layernorm", 0.1, WIDTH, mean=1.0, bias=0.05)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_clip(root):
    """root/clip-tiny: the tower that both checkpoints name, published like CLIP, with parts of the rest of CLIP."""
    weights = Weights(seed=1)
    weights.add_vision("vision_model.")
    weights["vision_model.embeddings.position_ids"] = torch.arange((SIDE // PATCH) ** 2 + 1)[None]
    weights["logit_scale"] = torch.tensor(4.605)
    weights.add("text_model.embeddings.token_embedding", 0.05, 64, 16)
    weights.add("text_model.final_layer_norm", 0.1, 16, mean=1.0, bias=0.05)
    weights.add("text_projection", 0.05, 16, 16)
    weights.add("visual_projection", 0.05, 16, WIDTH)
    folder = Path(root) / "clip-tiny"
    write_json(folder / "config.json", dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=16, vision_config=dict(layer_norm_eps=1e-5,
            model_type="clip_vision_model", hidden_act="quick_gelu", hidden_size=WIDTH, intermediate_size=VISION_MLP,
            num_hidden_layers=VISION_LAYERS, num_attention_heads=4, image_size=SIDE, patch_size=PATCH)))
    write_json(folder / "preprocessor_config.json", dict(
        crop_size=SIDE, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=SIDE,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_texts(folder, tokenizer, **config):
    """The JSON files and tokenizer of a checkpoint; `tokenizer` and `config` are where the two differ."""
    write_json(folder / "tokenizer_config.json", dict(
        add_bos_token=True, add_eos_token=False, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=2048, padding_side="right", tokenizer_class="LlamaTokenizer", **tokenizer))
    write_json(folder / "config.json", dict(
        bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02,
        intermediate_size=MLP, max_position_embeddings=4096, mm_hidden_size=WIDTH, mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False, mm_use_im_start_end=False, mm_vision_select_feature="patch", use_mm_proj=True,
        mm_vision_select_layer=-2, mm_vision_tower="clip-tiny", num_attention_heads=HEADS, num_hidden_layers=LAYERS,
        rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=True, vocab_size=VOCAB, **config))
    train_tokenizer(folder / "tokenizer.model")


def write_v16(root):
    """root/llava-v1.6-tiny: bfloat16, anyres, vision weights inside, and two shards with the boundary in layer 1."""
    folder = Path(root) / "llava-v1.6-tiny"
    write_texts(folder, dict(legacy=True, pad_token="<unk>"), architectures=["LlavaMistralForCausalLM"],
                model_type="llava_mistral", torch_dtype="bfloat16", num_key_value_heads=2, rope_theta=1e6,
                sliding_window=None, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
                image_grid_pinpoints=[[w * SIDE, h * SIDE] for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
                tokenizer_model_max_length=2048, tokenizer_padding_side="right", unfreeze_mm_vision_tower=True)
    weights = Weights(seed=2)
    weights.add_decoder(kv=2 * HIDDEN // HEADS)
    weights.add("model.image_newline", 0.15, HIDDEN, suffix="")
    weights.add_vision("model.vision_tower.vision_tower.vision_model.")     # not the numbers of clip-tiny
    first = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.self_attn.q", "model.layers.1.self_attn.k")
    where = {name: f"model-0000{1 if name.startswith(first) else 2}-of-00002.safetensors" for name in sorted(weights)}
    for file in set(where.values()):
        save_file({n: w.bfloat16() for n, w in weights.items() if where[n] == file}, folder / file, {"format": "pt"})
    size = sum(2 * w.numel() for w in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def write_v15(root):
    """root/llava-v1.5-tiny: float16, one file, square padded images, the tower of clip-tiny."""
    folder = Path(root) / "llava-v1.5-tiny"
    write_texts(folder, dict(legacy=False, pad_token=None), architectures=["LlavaLlamaForCausalLM"],
                model_type="llava_llama", torch_dtype="float16", num_key_value_heads=HEADS, pad_token_id=0,
                rope_scaling=None,          # and no rope_theta, as published: it is Llama's 1e4
                image_aspect_ratio="pad", unfreeze_mm_vision_tower=False)
    weights = Weights(seed=3)
    weights.add_decoder(kv=HIDDEN)
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def paint(number):
    """Image `number` (from 1)."""
    _, size, mode, scene = PICTURES[number - 1]
    background, *shapes = scene.split(",")
    image = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(image)
    for kind, colour, *numbers in map(str.split, shapes):
        at = [float(n) * size[i % 2] / 100 for i, n in enumerate(numbers)]
        {"box": pen.rectangle, "disc": pen.ellipse, "poly": pen.polygon, "line": pen.line}[kind](at, fill=colour)
    if mode == "RGBA":          # dropping this alpha and compositing with it give different images
        image.putalpha(Image.linear_gradient("L").resize(size))
    return image.convert(mode)


def draw_pictures(root):
    """root/images/scene_01.jpg and so on."""
    (Path(root) / "images").mkdir(parents=True, exist_ok=True)
    for i, (file, *_) in enumerate(PICTURES, start=1):
        paint(i).save(Path(root) / "images" / file)


def write_instructions(root):
    """root/instructions.json: LLaVA's format; text-only records have no "image"."""
    records = [{"id": f"{i:012}", **({"image": PICTURES[picture - 1][0]} if picture else {}),
                "conversations": [{"from": ("human", "gpt")[k % 2], "value": turn} for k, turn in enumerate(turns)]}
               for i, (picture, *turns) in enumerate(TALKS, start=1)]
    write_json(Path(root) / "instructions.json", records)


def write_scienceqa(root):
    """root/scienceqa: problems.json, pid_splits.json and images/test/{id}/image.png."""
    folder, problems = Path(root) / "scienceqa", {}
    for pid, picture, question, choices, answer, hint, subject, grade in PROBLEMS:
        problems[pid] = dict(question=question, choices=choices, answer=answer, hint=hint, task="closed choice",
                             image="image.png" if picture else None, grade=f"grade{grade}", split="test",
                             subject=f"{subject} science", topic="", category="", skill="", lecture="", solution="")
        if picture:
            (folder / "images/test" / pid).mkdir(parents=True, exist_ok=True)
            paint(picture).save(folder / "images/test" / pid / "image.png")
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})


def write_all(root):
    """All of it."""
    for write in (write_clip, write_v16, write_v15, draw_pictures, write_instructions, write_scienceqa):
        write(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the checkpoints and data the tests run on.")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to write to, created if missing")
    args = parser.parse_args()
    write_all(args.dir)
    print("wrote", *sorted(args.dir.iterdir()), sep="\n  ")
