"""The losses against values computed by hand. Every literal is derived in the comment next to it."""

import math

import pytest
import torch
from torch.nn import functional as F

from stic_min.loss import argmax_logps, dpo_loss, sft_loss, stic_loss, token_logps

LN2 = math.log(2)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- token_logps, Eq. 3.1


def test_token_logps_by_hand():
    # Two tokens in the vocabulary. Logits (0, ln 3) are probabilities (1/4, 3/4); (ln 4, 0) are (4/5, 1/5).
    # Labels [1, 1, 0]: position 0 predicts label 1 with 3/4, position 1 predicts label 0 with 4/5; nothing
    # predicts the first label, and the last logits predict nothing.
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [7.0, -7.0]]])
    logps = token_logps(logits, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(logps, torch.tensor([[0.0, math.log(3 / 4), math.log(4 / 5)]]))


def test_token_logps_is_zero_where_the_label_is_ignored():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [7.0, -7.0]]])
    logps = token_logps(logits, torch.tensor([[1, -100, 0]]))
    torch.testing.assert_close(logps, torch.tensor([[0.0, 0.0, math.log(4 / 5)]]))


def test_token_logps_is_log_softmax_at_the_next_label():
    # The slow version, which is its definition.
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    labels[0, 2] = labels[2, 5:] = -100
    for b in range(3):
        for j in range(7):
            expected = 0.0
            if j > 0 and labels[b, j] != -100:
                expected = F.log_softmax(logits[b, j - 1], dim=-1)[labels[b, j]].item()
            assert token_logps(logits, labels)[b, j].item() == pytest.approx(expected, abs=1e-6)


def test_token_logps_computes_in_float32_whatever_the_logits_are():
    logits, labels = torch.randn(1, 5, 9).bfloat16(), torch.randint(9, (1, 5))
    logps = token_logps(logits, labels)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, token_logps(logits.float(), labels))


def test_token_logps_gradient_by_hand():
    # d log p(label) / d logits = one-hot - probabilities: (1/4, 3/4) with label 1 gives (-1/4, +1/4).
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]], requires_grad=True)
    token_logps(logits, torch.tensor([[0, 1]])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.25, 0.25], [0.0, 0.0]]]))


# ---------------------------------------------------------------- argmax_logps, the release's rejected score


def test_argmax_logps_by_hand():
    # Three tokens. Logits (ln 2, ln 5, ln 1) are probabilities (2/8, 5/8, 1/8); (ln 6, ln 3, ln 1) are (6/10, 3/10,
    # 1/10). Label 2 after the first: the top token is 1, not the label, so log 5/8. Label 0 after the second: the top
    # token is the label, so the second best counts, log 3/10. The third label is ignored, the first predicted by none.
    rows = [[2.0, 5.0, 1.0], [6.0, 3.0, 1.0], [1.0, 1.0, 9.0], [1.0, 2.0, 3.0]]
    logits = torch.tensor([rows]).log().requires_grad_()
    logps = argmax_logps(logits, torch.tensor([[0, 2, 0, -100]]))
    torch.testing.assert_close(logps, torch.tensor([[0.0, math.log(5 / 8), math.log(3 / 10), 0.0]]))
    # d log p / d logits = one-hot of the token that counts - probabilities.
    logps.sum().backward()
    expected = [[-2 / 8, 3 / 8, -1 / 8], [-6 / 10, 7 / 10, -1 / 10], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(logits.grad, torch.tensor([expected]))


def test_argmax_logps_does_not_score_the_text():
    # The slow version. Labels matter only where they are the most probable token.
    logits, labels = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    labels[0, 2] = labels[2, 5:] = -100
    labels[1, 4] = logits[1, 3].argmax()
    actual = argmax_logps(logits, labels)
    for b in range(3):
        for j in range(7):
            best = logits[b, j - 1].log_softmax(-1).sort(descending=True)
            counted = j > 0 and labels[b, j] != -100
            expected = best.values[int(best.indices[0] == labels[b, j])].item() if counted else 0.0
            assert actual[b, j].item() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- dpo_loss, Eq. 3.3


def test_dpo_is_ln_2_when_policy_and_reference_agree():
    logp_w, logp_l = t(-12.5, -3.0), t(-40.0, -2.0)
    torch.testing.assert_close(dpo_loss(logp_w, logp_l, logp_w, logp_l, beta=0.1), t(LN2, LN2))


def test_dpo_by_hand():
    # Log-ratios: w = -10 - (-12) = 2, l = -20 - (-19) = -1. beta * (2 - (-1)) = 0.5 * 3 = 1.5.
    # log(1 + e^-1.5) = log(1 + 0.22313016) = log(1.22313016) = 0.20141328.
    loss = dpo_loss(t(-10.0), t(-20.0), t(-12.0), t(-19.0), beta=0.5)
    assert loss.item() == pytest.approx(0.20141328, abs=1e-8)


def test_dpo_of_an_exact_odds_ratio():
    # beta * margin = ln 3, so p(w beats l) = 3 / 4 and the loss is -ln(3 / 4).
    loss = dpo_loss(t(math.log(3)), t(0.0), t(0.0), t(0.0), beta=1.0)
    assert loss.item() == pytest.approx(-math.log(3 / 4))


def test_swapping_chosen_and_rejected_negates_the_margin():
    # l(m) - l(-m) = log(1 + e^-m) - log(1 + e^m) = -m. Here m = 0.1 * ((-5 + 6) - (-9 + 7)) = 0.3.
    logp_w, logp_l, ref_w, ref_l = t(-5.0), t(-9.0), t(-6.0), t(-7.0)
    forward = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta=0.1)
    swapped = dpo_loss(logp_l, logp_w, ref_l, ref_w, beta=0.1)
    assert (forward - swapped).item() == pytest.approx(-0.3)


def test_dpo_gradient_by_hand():
    # d l(beta m) / d logp_w = -beta * sigmoid(-beta m). With beta m = ln 3, sigmoid(-ln 3) = 1 / 4:
    # beta = 2, so -0.5 for logp_w, +0.5 for logp_l. The reference gets the opposite signs.
    values = [x.requires_grad_() for x in (t(math.log(3) / 2), t(0.0), t(0.0), t(0.0))]
    dpo_loss(*values, beta=2.0).sum().backward()
    assert [round(v.grad.item(), 9) for v in values] == [-0.5, 0.5, 0.5, -0.5]


def test_dpo_stays_finite_far_from_the_reference():
    # log(1 + e^1000) is 1000, not an overflow; log(1 + e^-1000) is 0.
    assert dpo_loss(t(-1000.0), t(0.0), t(0.0), t(0.0), beta=1.0).item() == 1000.0
    assert dpo_loss(t(0.0), t(-1000.0), t(0.0), t(0.0), beta=1.0).item() == 0.0


# ---------------------------------------------------------------- stic_loss, Eq. 4.1


def test_stic_by_hand():
    # The DPO term of test_dpo_by_hand, and -alpha * logp_w = 10 / 1024 = 0.009765625.
    loss = stic_loss(t(-10.0), t(-20.0), t(-12.0), t(-19.0), beta=0.5, alpha=1 / 1024)
    assert loss.item() == pytest.approx(0.20141328 + 0.009765625, abs=1e-8)


def test_alpha_zero_is_plain_dpo():
    values = t(-10.0, -1.0), t(-20.0, -2.0), t(-12.0, -0.5), t(-19.0, -3.0)
    assert torch.equal(stic_loss(*values, beta=0.1, alpha=0.0), dpo_loss(*values, beta=0.1))


def test_stic_gradient_by_hand():
    # As in the DPO gradient, and alpha adds -alpha to d / d logp_w: -0.5 - 0.25 = -0.75; logp_l is untouched.
    values = [x.requires_grad_() for x in (t(math.log(3) / 2), t(0.0), t(0.0), t(0.0))]
    stic_loss(*values, beta=2.0, alpha=0.25).sum().backward()
    assert [round(v.grad.item(), 9) for v in values] == [-0.75, 0.5, 0.5, -0.5]


def test_each_pair_has_its_own_loss():
    values = [torch.randn(5, dtype=torch.float64) for _ in range(4)]
    together = stic_loss(*values, beta=0.3, alpha=0.1)
    assert together.shape == (5,)
    for i in range(5):
        alone = stic_loss(*(v[i : i + 1] for v in values), beta=0.3, alpha=0.1)
        torch.testing.assert_close(alone, together[i : i + 1])


# ---------------------------------------------------------------- sft_loss, Algorithm 2


def test_sft_by_hand():
    # As in test_token_logps_by_hand: -ln(3/4) - ln(4/5) = ln(5/3) over two tokens; nothing predicts the first
    # label.
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [7.0, -7.0]]])
    nll, tokens = sft_loss(logits, torch.tensor([[1, 1, 0]]))
    assert nll.item() == pytest.approx(math.log(5 / 3), abs=1e-6) and tokens.item() == 2


def test_sft_sums_and_counts_only_supervised_tokens():
    # Micro-batches add up: the sums of two parts are the sum of the whole, whatever their lengths.
    logits, labels = torch.randn(4, 6, 8), torch.randint(8, (4, 6))
    labels[0, :3] = labels[1, 4:] = labels[3] = -100
    nll, tokens = sft_loss(logits, labels)
    parts = [sft_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert tokens.item() == 3 + 3 + 5 + 0
    assert nll.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-6)
    assert parts[3][0].item() == 0.0 and parts[3][1].item() == 0


def test_sft_gradient_by_hand():
    # d -log p / d logits = probabilities - one-hot: (1/4, 3/4) with label 0 gives (-3/4, +3/4).
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]], requires_grad=True)
    sft_loss(logits, torch.tensor([[1, 0]]))[0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.75, 0.75], [0.0, 0.0]]]))
