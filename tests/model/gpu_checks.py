"""Checks that need a GPU; test_gpu.py runs each in a process that sees the machine's GPUs.

  python tests/model/gpu_checks.py                      runs all of them on cuda
  python tests/model/gpu_checks.py graphs --device cpu  rehearses one of them
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "model")]

import test_lora  # noqa: E402
import tiny  # noqa: E402

from stic_min import sampler, slots  # noqa: E402
from stic_min.cache import Decode, KVCache  # noqa: E402
from stic_min.images import open_image  # noqa: E402
from stic_min.loader import load_llava  # noqa: E402
from stic_min.mistral import DecoderConfig  # noqa: E402

# (in, out) of the seven linears of both 7B models: q, o; k, v of Mistral; gate, up and down of both
SHAPES = (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 11008), (11008, 4096)


def graphs(device, folder):
    """Decoding steps replayed as CUDA graphs sample the same tokens as eager ones; rows without a seed are
    greedy at any temperature."""
    images = [open_image(path) for path in sorted((folder / "images").iterdir())]
    prompts = [f"[INST] <image>\nWhat is this, number {i}? [/INST]" for i in range(len(images))]
    for name in ("llava-v1.5-tiny", "llava-v1.6-tiny"):
        llava = load_llava(folder / name, device=device)
        for how in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}):
            seeds = [None, *range(1, len(images))]  # the first one is greedy
            rows = prompts, [[image] for image in images], seeds
            replayed = sampler.sample(llava, *rows, max_new_tokens=80, **how)
            with mock.patch.object(slots, "GRAPHED", set()):
                eager = sampler.sample(llava, *rows, max_new_tokens=80, **how)
            assert [s.ids for s in replayed] == [s.ids for s in eager]
            assert sum(len(s.ids) for s in eager) > 100
            if how["temperature"] == 0:
                greedy = eager[0].ids
            assert replayed[0].ids == greedy


def small_updates(device, folder):
    """LoRA's update is added before the sum is rounded to bf16."""
    layer = test_lora.layer(4096, 4096, dtype=torch.bfloat16).to(device)
    x = torch.randn(512, 4096, device=device).bfloat16()
    for size in test_lora.SIZES[:3]:
        slope = test_lora.slope(layer, x, test_lora.B_of_size(layer, x, size), type(layer).forward)
        assert 0.9 < slope < 1.1, (size, slope)


@torch.no_grad()
def theta_0(device, folder):
    """With B = 0, LoRA on and LoRA off agree bit for bit."""
    for inputs, outputs in SHAPES:
        layer = test_lora.layer(inputs, outputs, dtype=torch.bfloat16).to(device)
        for tokens in (1, 7, 1130):
            x = torch.randn(tokens, inputs, device=device).bfloat16()
            layer.enabled = True
            theta = layer(x)
            layer.enabled = False
            assert torch.equal(theta, layer(x)), (inputs, outputs, tokens)


def decode_attention(device, folder):
    """One token per slot over a cache with rows of different lengths, against an explicit softmax in fp32."""
    torch.manual_seed(0)
    heads, shared, D, rows, longest = 32, 8, 128, 5, 384
    config = DecoderConfig(heads * D, 64, 1, heads, shared, 32, 1e-5, 1e4, 512)
    cache = KVCache(config, rows, device, torch.bfloat16)
    cache.reserve(longest)
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.normal_()
    positions = torch.tensor([0, 5, 100, 255, 380], device=device)
    q = torch.randn(rows, heads, D, device=device).bfloat16()
    k, v = (torch.randn(rows, shared, D, device=device).bfloat16() for _ in range(2))
    y = Decode(cache, positions, longest)(0, q, k, v).float()
    for b, position in enumerate(positions.tolist()):
        keys, values = (t[0][b, : position + 1].float().repeat_interleave(heads // shared, 1)
                        for t in (cache.keys, cache.values))  # (S, H, D)
        weights = (torch.einsum("hd,shd->hs", q[b].float(), keys) / D**0.5).softmax(-1)
        torch.testing.assert_close(y[b], torch.einsum("hs,shd->hd", weights, values), rtol=0, atol=2e-2)
        assert torch.equal(cache.keys[0][b, position], k[b])


@torch.no_grad()
def sampled_logits(device, folder):
    """Logits for sampling are not rounded to bf16 on the way."""
    llava = load_llava(folder / "llava-v1.6-tiny", device=device, dtype=torch.bfloat16)
    x = torch.randn(64, llava.config.decoder.hidden_size, device=device).bfloat16()
    exact = F.linear(x.double(), llava.lm_head.weight.double())
    error = (slots.fp32_logits(llava, x) - exact).abs().max() / exact.abs().max()
    assert error < (1e-5 if torch.device(device).type == "cuda" else 1e-2), error


def run_main(script, *args):
    command = mock.patch.object(sys, "argv", [script, *map(str, args)])
    with command, contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main()


def commands(device, folder):
    """The four commands, in the default dtype on a GPU."""
    at, images = ["--model", folder / "llava-v1.6-tiny", "--device", device], ["--images", folder / "images"]
    few, train = ["--max-new-tokens", 8], [*at, *images, "--lr", 1e-3, "--batch-size", 4, "--lora-r", 4]
    stage1, pairs, descriptions = (folder / name for name in ("stage1", "pairs.jsonl", "descriptions.jsonl"))
    records = ["--describe", folder / "instructions.json", "--adapter", stage1]
    stage2 = ["--instructions", folder / "instructions.json", "--descriptions", descriptions]
    stage2 += ["--adapter", stage1]
    benchmark = ["--adapter", folder / "stage2", "--data", folder / "scienceqa"]
    benchmark += ["--out", folder / "results", "--dar"]
    for script, *args in (
        ["generate_pairs", *at, *images, *few, "--out", pairs],
        ["train_stage1", *train, "--pairs", pairs, "--out", stage1],  # ln 2 is checked before step 1
        ["generate_pairs", *at, *images, *few, *records, "--out", descriptions],
        ["train_stage2", *train[:-2], *stage2, "--out", folder / "stage2"],
        ["evaluate", "scienceqa", *at, *few, *benchmark],
    ):
        run_main(script, *args)
    assert (folder / "results" / "scienceqa-stage2-dar.scores.json").is_file()


def neighbours(device, folder):
    """SPIN, SIMA, POVID and triangular consistency, in the default dtype on a GPU."""
    at = ["--model", folder / "llava-v1.6-tiny", "--device", device, "--images", folder / "images"]
    instructions, few = ["--instructions", folder / "instructions.json"], ["--max-new-tokens", 8]
    train = [*at, "--lr", 1e-3, "--batch-size", 4, "--lora-r", 4, "--epochs", 1]
    run = lambda method, *args: run_main(f"stic_min.neighbours.{method}", *args)
    out = lambda name: ["--out", folder / name]

    pairs = ["--pairs", folder / "spin.jsonl"]
    run("spin", "pairs", *at, *few, *instructions, *out("spin.jsonl"))
    run("spin", "train", *train, *pairs, *out("spin"))
    run("sima", "train", *train, *pairs, "--rejected-score", "argmax", *out("sima"))
    run("povid", "stage2", *train[:-2], *pairs, *out("povid"))
    assert (folder / "povid" / "adapter_config.json").is_file()

    run("sima", "answers", *at, *few, *instructions, *out("answers.jsonl"))
    answers = ["--answers", folder / "answers.jsonl"]
    run("sima", "critique", *at, *few, *answers, "--both-orders", *out("critiques.jsonl"))
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    greedy, sampled = ({record[kind] for record in records} for kind in ("greedy", "sampled"))
    assert len(records) == 8 and all(greedy) and all(sampled)
    critiques = (folder / "critiques.jsonl").read_text().splitlines()
    assert len(critiques) == 8 and (folder / "sima" / "adapter_config.json").is_file()

    triplets = [
        {"id": str(i), "image": path.name, "question": "What is it?", "answer": "The sun."}
        for i, path in enumerate(sorted((folder / "images").iterdir()))
    ]  # fmt: skip
    (folder / "triplets.jsonl").write_text("".join(json.dumps(t) + "\n" for t in triplets))
    run("triangular", "score", *at, "--triplets", folder / "triplets.jsonl", *out("triplet-scores.jsonl"))
    run("triangular", "select", "--scores", folder / "triplet-scores.jsonl", *out("update.json"))
    run("triangular", "train", *train, "--instructions", folder / "update.json", *out("triangular"))
    assert (folder / "triangular" / "adapter_config.json").is_file()


CHECKS = {check.__name__: check
          for check in (graphs, small_updates, theta_0, decode_attention, sampled_logits, commands, neighbours)}


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("check", nargs="*", help=f"any of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    args = parser.parse_args()
    for name in args.check or CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_all(Path(folder))
            CHECKS[name](args.device, Path(folder))
        print(f"{name} passed on {args.device}")


if __name__ == "__main__":
    main()
