"""The formulas of PPO for language models, as pure functions on tensors.

Shapes: B episodes, T response tokens. Episodes are ragged: `mask` (float) is 1 on an episode's
tokens, which come first, and 0 after them. "N+ details" is Huang et al. 2024, "The N+
Implementation Details of RLHF with PPO" (arXiv 2403.17031).
"""

from __future__ import annotations

import torch


def masked_mean(x, mask):
    """Mean of `x` where `mask` is 1; both of one shape, any shape. Returns a scalar tensor."""
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask, shift_mean=True):
    """`x` scaled to unit variance over mask (and mean 0 if `shift_mean`, else its mean is kept).

    x, mask: (B, T) -> (B, T), 0 outside the mask. The variance is the unbiased one, over all tokens
    of the batch (N+ details, "reward whitening", "advantage whitening").
    """
    n = mask.sum()
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask) * n / (n - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def kl_estimators(logp, logq):
    """Per-token estimates of KL(p || q) from samples of p (Schulman 2020, "Approximating KL").

    logp, logq: any one shape, log-probabilities of the sampled token. Returns (k1, k2, k3) in nats,
    of that shape: k1 = log p/q (unbiased), k2 = (log p/q)^2 / 2 (biased, low variance),
    k3 = q/p - 1 - log q/p (unbiased, never negative).
    """
    log_ratio = logq - logp
    return -log_ratio, log_ratio**2 / 2, torch.expm1(log_ratio) - log_ratio


def token_rewards(logp, ref_logp, scores, mask, kl_coef):
    """-kl_coef * log(pi / ref) on every token, plus the score on the last one (N+ details, 4.1).

    logp, ref_logp, mask: (B, T); scores: (B,); kl_coef: float -> (B, T), 0 outside the mask.
    """
    rewards = -kl_coef * kl_estimators(logp, ref_logp)[0] * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores), device=rewards.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    rewards, values, mask: (B, T); values[:, t] is the value before token t. After the last token
    the value is 0. Returns (advantages, returns), both (B, T), 0 outside the mask, with
    returns = advantages + values: the targets of the value model.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

    logp (with gradient), old_logp, advantages, mask: one shape, any shape. Returns (loss, the
    fraction of tokens where the clipped branch is the one that counts), scalar tensors.
    """
    ratio = torch.exp(logp - old_logp)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(logp.dtype), mask).detach()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, with values kept within `clip` of the old ones (N+ details, 4.1).

    values (with gradient), old_values, returns, mask: one shape, any shape. `clip` None: no
    clipping. Returns (loss, fraction of tokens where the clipped branch counts), scalar tensors.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return masked_mean(plain, mask) / 2, torch.zeros((), device=values.device)
    kept = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    clipped = (kept - returns) ** 2
    loss = masked_mean(torch.maximum(plain, clipped), mask) / 2
    return loss, masked_mean((clipped > plain).to(values.dtype), mask).detach()


def adapt_kl_coef(kl_coef, kl, target, episodes, horizon=10_000):
    """The next KL coefficient of a proportional controller (Ziegler et al. 2019, section 2.2).

    kl and target: nats per response; the error is clipped to +-0.2; `horizon` in episodes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
