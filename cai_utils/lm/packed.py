"""Training in packed passes (`packing`) where a model allows it: each token is read once, without
padding to speak of, and heads see only the places that are read. Loss and gradient of a step are
those of plain rows; only the order of sums differs."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import MethodType

import torch

from cai_utils.lm import models, packing, training
from cai_utils.lm.architectures import head_of, inner_model

# Tokens of a pass at most, unless an example is longer: more gain nothing on a CPU, and memory
# grows with them.
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
# Numbers of the head's table times tokens that exist at once, in float32.
LOGITS = 2**24


def allowed(model, longest):
    """Whether `model` can be trained in packed passes on rows of at most `longest` tokens: its
    layers allow it, its head reads their states alone, and no weights are sharded."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true")
                  for name in ("FSDP", "DEEPSPEED"))
    unknown = not hasattr(model.get_input_embeddings(), "num_embeddings")
    if sharded or unknown or getattr(model.config.get_text_config(), "router_aux_loss_coef", 0):
        return False  # a mixture of experts has a loss of its own, over all tokens
    plain = _reads_states(model) if hasattr(model, "score") else head_of(model)[1]
    return plain and packing.can_pack(model.base_model, longest)


@torch.no_grad()
def _reads_states(model):
    """Whether a score model's scores are those of its head at the last hidden state."""
    known = min(5, model.get_input_embeddings().num_embeddings)
    ids = [i for i in range(known) if i != model.config.pad_token_id][:4]
    ids = torch.tensor([ids], device=model.device)
    was_training = model.training
    model.eval()
    want = model(input_ids=ids, use_cache=False).logits[0]
    found = model.score(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1])
    model.train(was_training)
    return torch.allclose(want, found)


class PackedTrainer(training.LengthBatchedTrainer):
    """A mixin for trl's trainers whose step is a few packed passes, where `tokens` is set; else
    everything is trl's.

    A subclass has `examples(data)`: the Example of each row of {column: values}; `places(data,
    picked, starts, examples)`: what its loss reads of the rows `picked`, whose examples begin at
    the flat places `starts`, among it `at`, and how many terms that loss has; and `pass_loss(model,
    batch, scale)`: the sum of these terms times `scale`.
    """

    tokens = None

    @classmethod
    def tokens_of_pass(cls, model, data, rows):
        sizes = list(map(len, cls.examples(data)))
        if not allowed(model, max(sizes)):
            return None
        most = PASS_TOKENS.get(model.device.type, PASS_TOKENS["cuda"])
        return max(max(sizes), min(most, rows * max(sizes)))  # few rows were asked for: memory

    def pack(self, tokens):
        """Train in packed passes of `tokens` tokens."""
        self.tokens = tokens
        self.data_collator = self.passes
        _read_places(inner_model(self.model))

    def passes(self, rows):
        """A process's rows of a step -> {"passes": [batch], "count": terms of the loss}."""
        data = {name: [row[name] for row in rows] for name in rows[0]}
        examples, batches, count = self.examples(data), [], 0
        for part in packing.packed_rows(list(map(len, examples)), self.tokens):
            batch, starts = packing.pack([[examples[i] for i in row] for row in part])
            read, terms = self.places(data, [i for row in part for i in row], starts, examples)
            batches.append(batch | read)
            count += terms
        return {"passes": batches, "count": torch.tensor(count)}

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs, loss = self._prepare_inputs(inputs), 0.0
        # Gradients are averaged over processes, which may have different numbers of terms.
        scale = 1 / self.accelerator.reduce(inputs["count"].float(), "mean")
        for left, batch in zip(range(len(inputs["passes"]))[::-1], inputs["passes"], strict=True):
            with self.accelerator.no_sync(model) if left else nullcontext():
                with self.compute_loss_context_manager():
                    part = self.pass_loss(model, batch, scale)
                self.accelerator.backward(part)
            loss += part.detach()
        return self.finite(loss)

    def floating_point_ops(self, inputs):
        return 0 if self.tokens else super().floating_point_ops(inputs)


def _read_places(model):
    """Let `model.forward`, called with `at`, read a packed pass: a score model gives the scores
    (N,) at the places `at`, a causal LM what `token_loss` does of their states and `targets`."""
    plain, small = model.forward, models.is_small(model)

    def forward(self, *args, at=None, targets=None, scale=None, owner=None, **kwargs):
        if at is None:
            return plain(*args, **kwargs)
        names = ("input_ids", "position_ids")
        states = packing.read(self.base_model, *(kwargs[n] for n in names), owner, at)
        if targets is None:
            with torch.autocast(states.device.type, enabled=False):  # one column costs nothing
                return self.score(states.to(self.score.weight.dtype)).squeeze(-1).float()
        head, device = self.get_output_embeddings(), states.device.type
        low = torch.is_autocast_enabled(device) and not small
        dtype = torch.get_autocast_dtype(device) if low else head.weight.dtype
        with torch.autocast(device, enabled=False):
            return _TokenLoss.apply(states, head.weight, head.bias, targets, scale, dtype)

    model.forward = MethodType(forward, model)


class _TokenLoss(torch.autograd.Function):
    """The sum of -log p(target) over tokens, times `scale`; and, without a gradient, the sums of
    the distributions' entropies and of how often the target is the likeliest token.

    Logits exist for a few tokens at a time, and never twice: their gradient is made with them.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, scale, dtype):
        table = weight.to(dtype)
        grads = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
                 if need else None
                 for x, need in zip((states, weight, bias), ctx.needs_input_grad, strict=False)]
        sums = states.new_zeros(3, dtype=torch.float32)
        size = max(1, LOGITS // len(weight))
        for i in range(0, len(states), size):
            part, target = states[i : i + size].to(dtype), targets[i : i + size, None]
            logits = torch.nn.functional.linear(part, table, bias if bias is None else
                                                bias.to(dtype)).float()
            total = logits.logsumexp(-1, keepdim=True)
            p = (logits - total).exp_()
            sums += torch.stack([(total - logits.gather(1, target)).sum(),
                                 total.sum() - torch.linalg.vecdot(p, logits).sum(),
                                 (logits.argmax(-1, keepdim=True) == target).sum()])
            p.scatter_add_(1, target, torch.full_like(total, -1.0)).mul_(scale)
            if grads[2] is not None:
                grads[2] += p.sum(0)
            p = p.to(dtype)
            if grads[0] is not None:
                grads[0][i : i + size] = p @ table
            if grads[1] is not None:
                grads[1] += p.T @ part
        ctx.grads = [g if g is None else g.to(x.dtype)
                     for g, x in zip(grads, (states, weight, bias), strict=True)]
        ctx.mark_non_differentiable(stats := sums[1:].clone())
        return sums[0] * scale, stats

    @staticmethod
    def backward(ctx, upstream, _):
        grads, ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(upstream) for g in grads), None, None, None
