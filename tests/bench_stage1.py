"""How long one stage-1 pair takes: [prompt | chosen | rejected] in one row, against the usual two padded sequences.

  python -m tests.bench_stage1 [--device cuda --dtype bfloat16 --width 4096 --layers 32 ...]

The peer is what TRL's DPO and the authors' release do, with transformers and peft: chosen and rejected as a batch of
two, the prompt in both, logits of the whole sequence. Same shapes, same random decoder, LoRA on all linears; reference
forward, policy forward and backward, no optimizer. The two alternate in one process; the median of each is printed.
"""

import argparse
import statistics
import time

import torch

from stic_min import cli, lora
from stic_min.clip import ClipConfig
from stic_min.llava import Example, LLaVA, LlavaConfig, collate
from stic_min.loss import stic_loss, token_logps
from stic_min.mistral import DecoderConfig


def ours(args, device, dtype, prompt, chosen, rejected):
    decoder = DecoderConfig(args.width, args.width * 11 // 4, args.layers, args.width // 64, args.width // 64, 32000,
                            1e-5, 10000.0, 4096)
    tower = ClipConfig(32, 64, 2, 2, 28)  # the picture's features are part of the prompt's tokens here
    with torch.device(device):
        llava = LLaVA(LlavaConfig(decoder, tower, "pad", None, "vicuna_v1", 4096)).requires_grad_(False)
    for parameter in llava.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    llava.to(dtype)
    lora.attach(llava, lora.fresh(llava, args.r, 2 * args.r, 0.0, seed=0))
    batch = collate([Example("pair", [(prompt, False)], [chosen, rejected])], [[]], llava.config, device)

    def step():
        with torch.no_grad(), lora.disabled(llava):
            ref_w, ref_l = token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2).unbind(1)
        w, l = token_logps(llava(batch), batch.labels).sum(-1).view(-1, 2).unbind(1)
        stic_loss(w, l, ref_w, ref_l, 0.1, 1 / 1024).sum().backward()

    return step


def peer(args, device, dtype, prompt, chosen, rejected):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, hidden_size=args.width, intermediate_size=args.width * 11 // 4,
                         num_hidden_layers=args.layers, num_attention_heads=args.width // 64, use_cache=False)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    targets = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=list(lora.TARGETS))
    model = get_peft_model(model, targets).train()
    length = len(prompt) + max(len(chosen), len(rejected))
    ids, labels = torch.zeros(2, length, dtype=torch.int64), torch.full((2, length), -100)
    mask = torch.zeros(2, length, dtype=torch.int64)
    for row, response in enumerate((chosen, rejected)):
        end = len(prompt) + len(response)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + response), 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)

    def logps():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        taken = labels[:, 1:].clamp_min(0)[..., None]
        return (logits.log_softmax(-1).gather(-1, taken)[..., 0] * (labels[:, 1:] != -100)).sum(-1)

    def step():
        with torch.no_grad(), model.disable_adapter():
            ref_w, ref_l = logps()
        w, l = logps()
        stic_loss(w, l, ref_w, ref_l, 0.1, 1 / 1024).backward()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--prompt", type=int, default=626, help="tokens, a padded picture's 576 among them")
    parser.add_argument("--chosen", type=int, default=270, help="tokens")
    parser.add_argument("--rejected", type=int, default=230, help="tokens")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--r", type=int, default=128, help="LoRA's")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(cli.DTYPES), default="float32")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), cli.DTYPES[args.dtype]
    ids = torch.randint(3, 32000, (args.prompt + args.chosen + args.rejected,)).tolist()
    parts = ids[: args.prompt], ids[args.prompt : -args.rejected], ids[-args.rejected :]
    steps = {"stic_min": ours(args, device, dtype, *parts), "transformers + peft": peer(args, device, dtype, *parts)}
    times = {name: [] for name in steps}
    for round in range(args.repeat + 1):  # the first is warm-up
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round:
                times[name].append(time.perf_counter() - begin)
    for name, seconds in times.items():
        print(f"{name:20} {statistics.median(seconds):8.3f} s a pair  (min {min(seconds):.3f}, max {max(seconds):.3f})")
    mine, theirs = (statistics.median(seconds) for seconds in times.values())
    print(f"ratio {theirs / mine:.2f}")


if __name__ == "__main__":
    main()
