"""The networks of PPO: policy and value model read at response tokens only, and how they are
loaded. B: rows, L: tokens of a row (prompt and response, or several episodes), N: response tokens
of a batch, flat; `packing.pack` makes such batches.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from cai_utils import preference
from cai_utils.lm import models, training
from cai_utils.lm.architectures import has_plain_layers, head_of
from cai_utils.lm.packing import equal_and_told_apart


def _precise(x):
    """float32 instead of bf16; float64, in which the tests take gradients, stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# When a shared prefix gets a pass of its own, which reads all weights again: it must save so many
# weights x tokens (a quarter of that gained nothing on a CPU, backward included), and this fraction
# of a batch's tokens.
PREFIX_WORK = 4e9
PREFIX_FRACTION = 0.1


def response_states(base, ids, at, positions=None, share_prefix=True, least_work=PREFIX_WORK):
    """Hidden states (N, H) of a causal base model at the flat places `at` (N,) of ids (B, L).

    With positions (B, L), which begin again with each episode, rows hold several episodes that do
    not see each other. Without, the prefix that all rows share, as the system prompt of a chat
    template, passes once: its keys and values serve every row, and the rows' gradients add up
    there. Only the order of sums changes, and the peak of memory, by up to one set of gradients:
    most weights' are complete only after the prefix's backward pass. Where that saves less than
    `least_work`, or without `share_prefix`, rows pass whole.
    """
    if positions is not None:
        hidden = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, at)
    rows, width = ids.shape
    shared = 0
    if share_prefix and rows > 1 and len(at):
        first = int((at % width).min())  # hidden states are wanted from there on
        alike = (ids[:, :first] == ids[:1, :first]).all(0)
        shared = int(alike.long().cumprod(0).sum())
    saved = (rows - 1) * shared
    work = saved * sum(p.numel() for p in base.parameters())
    if not saved or work < least_work or (least_work and saved < PREFIX_FRACTION * ids.numel()):
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state
    else:
        cache = base(input_ids=ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(rows)
        hidden = base(input_ids=ids[:, shared:], past_key_values=cache,
                      use_cache=True).last_hidden_state
        at = at // width * (width - shared) + at % width - shared
    return hidden.flatten(0, 1).index_select(0, at)


def can_share_prefix(base, device):
    """Whether `response_states` may pass a shared prefix once: not where a model keeps something
    else than keys and values of every token."""
    ids = torch.arange(6, device=device)[None].repeat(2, 1)
    ids[1, 3:] = ids[1, 3:].flip(0)
    at = torch.arange(12, device=device).view(2, 6)[:, 3:].flatten()
    return has_plain_layers(base.config) and equal_and_told_apart(
        lambda: response_states(base, ids, at, share_prefix=False),
        lambda: response_states(base, ids, at, least_work=0),
        lambda: response_states(base, ids[:, 3:], torch.arange(6, device=device),
                                share_prefix=False))


def can_pack(base, device):
    """Whether episodes in one row, separated by their positions alone, do not see each other:
    transformers masks attention so; models that carry a state along a row do not."""
    ids = torch.arange(8, device=device).repeat(2).view(4, 4).flip(1)
    at, positions = torch.arange(16, device=device), torch.arange(4, device=device).repeat(2, 2)
    return has_plain_layers(base.config) and equal_and_told_apart(
        lambda: response_states(base, ids, at, share_prefix=False),
        lambda: response_states(base, ids.view(2, 8), at, positions),
        lambda: response_states(base, ids.view(2, 8), at, share_prefix=False))


class ResponseLogprobs(nn.Module):
    """A causal LM that gives log-probabilities of the response tokens alone: its head never sees
    prompt or padding. Right padding needs no attention mask, since attention is causal."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature
        # A small model's head stays in its weights' dtype under bf16: it costs little, and a CPU
        # would make a new bf16 kernel for each batch's number of states.
        self.precise_head = models.is_small(model)
        # Some architectures scale or cap their logits: then theirs are taken.
        self.plain_head = head_of(model)[1]
        self.shares_prefix = self.plain_head and can_share_prefix(model.base_model, model.device)

    def _logits(self, ids, at, positions=None):
        if not self.plain_head:
            whole = self.model(input_ids=ids, position_ids=positions, use_cache=False)
            return whole.logits.flatten(0, 1)[at]
        states = response_states(self.model.base_model, ids, at, positions, self.shares_prefix)
        head = self.model.get_output_embeddings()
        if not self.precise_head:
            return head(states)
        with torch.autocast(states.device.type, enabled=False):
            return head(states.to(head.weight.dtype))

    def forward(self, ids, at, targets, positions=None, with_entropy=False):
        """ids: (B, L); at: (N,) flat places in (B, L) whose next token is wanted; targets: (N,);
        positions: (B, L) where a row holds several episodes (`pack`).
        Returns log-probabilities (N,) and the distributions' entropies (N,) in nats, or None."""
        logits = _precise(self._logits(ids, at, positions)) / self.temperature
        logp = -nn.functional.cross_entropy(logits, targets, reduction="none")
        if not with_entropy:
            return logp, None
        logs = logits.log_softmax(-1)
        return logp, -(logs.exp() * logs).sum(-1)


class ResponseValues(nn.Module):
    """A PM read at every position: (score - mean) / std, in the unit of the normalised scores."""

    def __init__(self, model):
        super().__init__()
        self.model, self.mean, self.std = model, 0.0, 1.0
        self.shares_prefix = can_share_prefix(model.base_model, model.device)

    def forward(self, ids, at, positions=None):
        """ids, positions: (B, L); at: (N,) flat places in (B, L) -> values (N,)."""
        states = response_states(self.model.base_model, ids, at, positions, self.shares_prefix)
        with torch.autocast(states.device.type, enabled=False):  # one column costs nothing
            rows = self.model.score(states.to(self.model.score.weight.dtype))
        return (_precise(rows.squeeze(-1)) - self.mean) / self.std


class Actor(nn.Module):
    """Policy and value model in one module: what shards weights over devices wraps one module and
    one optimizer, and one pass through it is one round of messages."""

    def __init__(self, policy, value):
        super().__init__()
        self.policy, self.value = policy, value
        # A small model's pass costs more to start than to compute: few dense ones are faster.
        self.packs = models.is_small(policy.model) and all(
            can_pack(net.model.base_model, net.model.device) for net in (policy, value))
        # What FSDP wraps one by one: the layers, by the name that the models give them.
        self._no_split_modules = list(policy.model._no_split_modules or ())

    def forward(self, ids, at, targets, positions=None, with_entropy=False, with_values=True):
        """As the two above -> log-probabilities (N,), entropies (N,) or None, values or None."""
        logp, entropy = self.policy(ids, at, targets, positions, with_entropy)
        return logp, entropy, self.value(ids, at, positions) if with_values else None


def load(policy_spec, pm, *, device, micro_tokens, runs_dir, lora, seed):
    """-> (policy, value model, scorer, tokenizer, adapted): the plain causal LM and score model
    that learn, in eval mode (no dropout: N+ details); `adapted`: with LoRA, the peft models around
    them, else None.

    Float32, as Adam's small steps vanish in bf16; with `lora` the base, which does not learn, has
    the dtype that suits the hardware. ValueError: different tokenizers.
    """
    options = {"dtype": "auto" if lora else "float32", "runs_dir": runs_dir, "device": device}
    policy, tokenizer = models.load(policy_spec, **options)
    scorer = scorer_of(pm, tokenizer, policy_spec, device, micro_tokens, runs_dir)
    if isinstance(scorer, preference.Scorer):
        value_model = copy.deepcopy(scorer.model).to(device).requires_grad_(True)
        value_model = value_model if lora else value_model.float()
    else:
        value_model, _ = models.load(policy_spec, head="score", **options)
        nn.init.zeros_(value_model.score.weight)
    adapted = None
    if lora:
        adapted = _adapted(policy, value_model, lora, seed)
        value_model.score.float()  # it learns: peft leaves it in the dtype of the base
    return policy.eval(), value_model.eval(), scorer, tokenizer, adapted


def _adapted(policy, value_model, lora, seed):
    """The peft models around policy and value model. Where `lora` is for the policy's head alone,
    the value model's own head, its score, is all that learns of it."""
    from peft import get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from peft.utils.error import NoMatchingPeftModuleError

    for_policy = training.lora_config(lora, "CAUSAL_LM")
    training.untie(policy, for_policy)
    for_value = partial(training.lora_config, task_type="SEQ_CLS", modules_to_save=["score"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = get_peft_model(policy, for_policy)
        try:
            return policy, get_peft_model(value_model, for_value(lora))
        except NoMatchingPeftModuleError:
            only = {**lora, "target_modules": DUMMY_TARGET_MODULES, "target_parameters": None}
            return policy, get_peft_model(value_model, for_value(only))


def scorer_of(pm, tokenizer, policy_spec, device, micro_tokens, runs_dir):
    """A PM's folder (or an object with `.score`, as it is) -> what scores conversations.
    ValueError when its tokenizer is not the policy's."""
    if hasattr(pm, "score"):
        scorer = pm
    else:
        scorer = preference.Scorer(pm, batch_tokens=micro_tokens, dtype="float32",
                                   runs_dir=runs_dir)
        scorer.model.to(device)
    if isinstance(scorer, preference.Scorer):
        theirs, ours = ((t.get_vocab(), t.bos_token, t.eos_token)
                        for t in (scorer.tokenizer, tokenizer))
        if theirs != ours:
            raise ValueError(f"the PM {pm} and the policy {policy_spec} have different tokenizers: "
                             "train the PM from a model of the policy's family")
    return scorer


def merged(model, adapted):
    """The policy as a plain model to be saved. The adapter is merged into a copy: unmerging would
    not give back the same bits."""
    return copy.deepcopy(adapted[0]).merge_and_unload() if adapted else model
