"""The training loop written out: AdamW as in the paper's Table 4, and log p of one sample at a time."""

import torch
from chain import assert_same_parameters, tensors

from stic_min import data
from stic_min.batch import collate
from stic_min.formats.adapters import PREFIX
from stic_min.loss import token_logps


def train_by_hand(llava, losses, lr, projector_lr):
    """A step of AdamW on LoRA and the projector for each function in `losses` -> the gradients' norms."""
    lora_weights = [p.requires_grad_() for name, p in llava.named_parameters() if ".lora_" in name]
    projector = [p.requires_grad_() for p in llava.mm_projector.parameters()]
    groups = [{"params": lora_weights}, {"params": projector}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    norms = []
    for factor, loss in zip((1, 1, 0.5), losses, strict=True):  # one step of warm-up, then a cosine over two
        optimizer.zero_grad()
        loss().backward()
        norms.append(torch.nn.utils.clip_grad_norm_([*lora_weights, *projector], 1.0).item())
        for group, peak in zip(optimizer.param_groups, (lr, projector_lr)):
            group["lr"] = peak * factor
        optimizer.step()
    return norms


def logps_by_hand(llava, item):
    """log p of each response of one sample: of a pair (2,), of an instruction record (1,)."""
    batch = collate([item.example], [data.load_tiles(item, llava)], llava.config)
    return token_logps(llava(batch), batch.labels).sum(-1)


def assert_trained_like(llava, folder, **rates):
    """The trained parameters of `llava` are those that a command wrote to `folder`."""
    trained = {}
    for name, parameter in llava.named_parameters():
        if parameter.requires_grad:
            trained[f"{PREFIX}{name}.weight" if "lora" in name else f"model.{name}"] = parameter
    assert_same_parameters(tensors(folder), trained, **rates)
