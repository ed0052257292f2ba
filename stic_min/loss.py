"""The losses of STIC as pure functions of tensors; `tests/method/test_loss.py` computes them by hand.

Equations are numbered as in the paper (arXiv 2405.19716). `logp_w` and `logp_l` are log p_theta(y_w | v, x)
and log p_theta(y_l | v, x), summed over the response and its end token; `ref_` marks theta_ref.
"""

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # label of a position that is not scored


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(labels[t] | everything before t), the factors of Eq. 3.1.

    logits (B, T, V) and labels (B, T) are both aligned with the input ids: logits[t] predicts labels[t + 1].
    The shift happens here. Returns (B, T) float32: 0 where the label is -100, and at t = 0, which nothing
    predicts.
    """
    logits = logits[:, :-1].float()  # (B, T - 1, V)
    targets = labels[:, 1:]  # (B, T - 1)
    # cross_entropy is -log_softmax at the target, and 0 where the target is ignored.
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return F.pad(-nll.view_as(targets), (1, 0))  # (B, T)


def argmax_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of the model's most probable token at each scored position, or of its second most probable one
    where the first is the label. Shapes, shift and zeros as in `token_logps`.
    """
    # PAPER vs RELEASED (A): the release sums these instead of log p(y_l), whose text is then only context.
    first, second = logits[:, :-1].topk(2).indices.unbind(-1)  # (B, T - 1) each
    targets = labels[:, 1:]
    scored = second.where(first == targets, first).masked_fill(targets == IGNORE, IGNORE)
    return token_logps(logits, F.pad(scored, (1, 0), value=IGNORE))


def dpo_loss(
    logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor, beta: float
) -> Tensor:
    """Eq. 3.3: l(beta * (log-ratio of y_w - log-ratio of y_l)) with l(t) = log(1 + exp(-t)).

    Four (B,) tensors of log-prob sums -> (B,). beta is the paper's lambda.
    """
    return F.softplus(-beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)))


def stic_loss(
    logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor, beta: float, alpha: float
) -> Tensor:
    """Eq. 4.1: dpo_loss - alpha * log p_theta(y_w | v, x). Four (B,) tensors -> (B,).

    alpha multiplies the *summed* log-prob, as Table 4's 1/1024 was used; logp_w carries a gradient into both
    terms.
    """
    return dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta) - alpha * logp_w


def sft_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 2's objective: -log p(y | v, x), summed, and how many tokens it was summed over.

    logits (B, T, V) and labels (B, T) as in `token_logps`. Returns a () float32 and a () int64 tensor; the
    caller divides by the supervised tokens of the *global* batch. (Algorithm 2 prints l(log p); its text and
    the release mean -log p.)
    """
    return -token_logps(logits, labels).sum(), (labels[:, 1:] != IGNORE).sum()
