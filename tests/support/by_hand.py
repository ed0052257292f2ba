"""The training loop written out for tests: AdamW as in Table 4, one sample at a time."""


import torch
from chain import assert_same_parameters, tensors

from stic_min import data
from stic_min.batch import collate
from stic_min.formats.adapters import PREFIX
from stic_min.loss import token_logps


def train_by_hand(llava, losses, lr, projector_lr):
    """AdamW as in Table 4 on LoRA and the projector, a step for each function in `losses` -> norms of the gradients."""
    lora_weights = [p.requires_grad_() for name, p in llava.named_parameters() if ".lora_" in name]
    projector = [p.requires_grad_() for p in llava.mm_projector.parameters()]
    groups, norms = [{"params": lora_weights}, {"params": projector}], []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for share, loss in zip((1, 1, 0.5), losses, strict=True):  # one step of warm-up, then a cosine over two
        optimizer.zero_grad()
        loss().backward()
        norms.append(torch.nn.utils.clip_grad_norm_([*lora_weights, *projector], 1.0).item())
        for group, peak in zip(optimizer.param_groups, (lr, projector_lr)):
            group["lr"] = peak * share
        optimizer.step()
    return norms


def logps_by_hand(llava, item):
    """Sums of log p, one for each scored row of one sample."""
    batch = collate([item.example], [data.load_tiles(item, llava)], llava.config)
    return token_logps(llava(batch), batch.labels).sum(-1)


def assert_trained_like(llava, folder, **rates):
    named = {f"model.{name}" if "lora" not in name else f"{PREFIX}{name}.weight": p
             for name, p in llava.named_parameters() if p.requires_grad}
    assert_same_parameters(tensors(folder), named, **rates)
