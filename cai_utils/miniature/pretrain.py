"""Pretraining of the miniature's series: tokenizer, packing, training, and the saved folder.

    python -m cai_utils.miniature.pretrain s --tokens 20000000 --out FOLDER

The models are plain `transformers` Llamas; the folder loads with `AutoModelForCausalLM`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cai_utils import dialogue
from cai_utils.experiment import fingerprint, resume
from cai_utils.experiment.files import read_json, write_json
from cai_utils.experiment.writing import explained
from cai_utils.lm import models as lm_models
from cai_utils.miniature import corpus, world

SIZES = {  # width, layers, learning rate: 0.1, 0.6, 2.2, 8.7 million parameters less embeddings
    "xs": (64, 2, 3e-3),
    "s": (128, 3, 2e-3),
    "m": (192, 5, 1.5e-3),
    "l": (320, 7, 1e-3),
}

TOKENS = dict.fromkeys(SIZES, 15_000_000)  # of one cycle, the same text for all

# Cycles of the learning rate, each on new text, from the weights of the one before and with a fresh
# optimizer (warm restarts: Loshchilov & Hutter 2017, arXiv 1608.03983).
CYCLES = {"xs": 1, "s": 1, "m": 2, "l": 2}

# Blocks of two widths: 99 % full, and most documents attend over the narrow one. The wide one has
# room for questions with two examples.
WIDTHS, BATCH_TOKENS, CONTEXT = (192, 384), 1024, 1024
CHUNK = 5000  # documents generated at a time
KEEP_EVERY = 200  # steps between the states that a killed pretraining resumes from
QUOTES = 9000  # documents of repeated words, before all others: 0.3 million tokens
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

_PIECE = (
    r"\n\n(?:Human|Assistant|H|A|CritiqueRequest|Critique|RevisionRequest|Revision|The answer is):"
    r"|\n+| ?\([A-I]\)| ?[A-Za-z]+(?:'[a-z]+)?| ?[0-9]| ?[^\sA-Za-z0-9]"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word with its leading space; text round-trips.

    Words that are not in the world become `<unk>`.
    """
    pieces: set[str] = set()
    for context, text in corpus.documents(seed=1, n=20_000):
        pieces.update(re.findall(_PIECE, context + text))
    words = [*world.THINGS, *world.GOALS, *world.OBJECTS, *world.OTHERS, *world.HARMS,
             *world.DOMAINS]  # fmt: skip
    for templates in (*world.TEMPLATES, world.OPENERS, world.EVASIONS, world.OBJECTIONS,
                      world.INSULTS, world.CHATTER, world.CLOSERS, *(w.split() for w in words)):
        for text in templates:
            pieces.update(re.findall(_PIECE, " " + text.format(g="", o="")))
    pieces.update(corpus.LETTERS)
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *sorted(pieces)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = dialogue.TEMPLATE
    return tokenizer


def encode(tokenizer, documents, context_loss: bool = False) -> list[tuple[list[int], int]]:
    """(token ids from `<s>` to `</s>`, position of the first token in the loss) of each document.

    The loss is on the continuations: contexts are random draws, whose noise only slows small models
    down (LOG.md). With `context_loss` it is on both.
    """
    pairs = list(documents)
    eos = tokenizer.eos_token_id
    whole = tokenizer([a + b for a, b in pairs])["input_ids"]
    contexts = tokenizer([a for a, _ in pairs])["input_ids"]
    return [(ids + [eos], 1 if context_loss else len(context))
            for ids, context in zip(whole, contexts, strict=True)]


def batches(documents: list[tuple[list[int], int]]) -> list[np.ndarray]:
    """Documents -> batches of BATCH_TOKENS slots: int16 [3, blocks, width], see `pack`."""
    out, narrow = [], 0
    for width in WIDTHS:
        blocks = pack([d for d in documents if narrow < len(d[0]) <= width], width)
        n = BATCH_TOKENS // width
        out += [blocks[:, i : i + n] for i in range(0, blocks.shape[1], n)]
        narrow = width
    dropped = sum(len(ids) > WIDTHS[-1] for ids, _ in documents)
    if dropped:
        print(f"pretrain: {dropped} documents exceed {WIDTHS[-1]} tokens, left out")
    return out


def pack(documents: list[tuple[list[int], int]], block: int, chunk: int = 1024) -> np.ndarray:
    """Whole documents -> int16 [3, n, block]: ids, document numbers in the block, 1 in the loss.

    Best fit, longest first, within chunks of documents; 0 is padding. No document may be longer
    than a block.
    """
    full: list[list[tuple[list[int], int]]] = []
    for start in range(0, len(documents), chunk):
        bins: dict[int, list[list]] = {}  # room left -> blocks
        for doc in sorted(documents[start : start + chunk], key=lambda d: -len(d[0])):
            room = min((r for r in bins if r >= len(doc[0])), default=None)
            docs = bins[room].pop() if room is not None else []
            if room is not None and not bins[room]:
                del bins[room]
            left = (block if room is None else room) - len(doc[0])
            bins.setdefault(left, []).append([*docs, doc])
        full += [docs for same in bins.values() for docs in same]
    random.Random(len(full)).shuffle(full)
    out = np.zeros((3, len(full), block), np.int16)
    for row, docs in enumerate(full):
        at = 0
        for number, (ids, first) in enumerate(docs, 1):
            end = at + len(ids)
            out[0, row, at:end], out[1, row, at:end], out[2, row, at + first : end] = ids, number, 1
            at = end
    return out


def _inputs(blocks: np.ndarray) -> dict:
    """Model inputs for packed blocks: each document sees only itself, at its own positions."""
    ids, doc, scored = torch.from_numpy(blocks.astype(np.int64))
    n, width = ids.shape
    index = torch.arange(width)
    starts = torch.ones_like(doc, dtype=torch.bool)
    starts[:, 1:] = doc[:, 1:] != doc[:, :-1]
    position = index - torch.where(starts, index, 0).cummax(1).values
    same = (doc[:, :, None] == doc[:, None, :]) & (index[:, None] >= index[None, :])
    mask = torch.zeros(n, 1, width, width).masked_fill_(
        ~same[:, None], torch.finfo(torch.float32).min
    )
    labels = torch.where(scored > 0, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position, "labels": labels}


def new_model(size: str, tokenizer, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of the series; ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"pretrain: unknown size {size!r}; known: {', '.join(SIZES)}")
    width, layers, _ = SIZES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        initializer_range=width**-0.5 / 2,
    )
    return LlamaForCausalLM(config)


def pretrain(size: str, out: str | os.PathLike, tokens: int | None = None, seed: int = 0,
             context_loss: bool = False, log=None, start: str | os.PathLike | None = None) -> dict:
    """Pretrain one size and write its folder: bf16 weights, tokenizer, curve, provenance.

    tokens: size of the corpus in tokens, each of which is seen once. start: folder of this size
    that an earlier cycle made with another seed; its curve and token count are continued. `log` is
    called with a dict at every evaluation. The folder appears whole or not at all. A killed run
    goes on from a checkpoint in <out>.partial and ends with the same weights. Returns the
    provenance, with `curve` (list of rows). ValueError for a `start` of another size or world;
    FloatingPointError when the loss is not finite.
    """
    out, began = Path(out), time.time()
    tokenizer = build_tokenizer()
    data, count = _training_data(tokenizer, tokens or TOKENS[size], seed, context_loss)
    made_in = time.time() - began
    heldout = batches(encode(tokenizer, corpus.documents(seed=999_999, n=800)))
    if start is None:
        # Copying first: alone it is learned in some hundred steps, in the mixture late (LOG.md).
        data = batches(encode(tokenizer, corpus.quotes(seed + 5, QUOTES))) + data
        model, before, curve = new_model(size, tokenizer, seed), {"tokens": 0, "cycles": 0}, []
    else:
        model, before, curve = _last_cycle(Path(start), size)
    lr, steps = SIZES[size][2], len(data)
    optimizer, schedule = _optimizer(model, lr, steps)
    key = {"size": size, "seed": seed, "context_loss": context_loss, "steps": steps, "lr": lr,
           "widths": list(WIDTHS), "batch": BATCH_TOKENS, "corpus": corpus.corpus_hash(),
           "before": before["tokens"], "hardware": lm_models.hardware()}
    progress = _Progress(
        resume.Checkpoints(out.with_name(out.name + ".partial"), key, f"pretrain {size}"),
        {"model": model, "optimizer": optimizer, "schedule": schedule},
        began, [curve, 0.0, 0, before["tokens"], 0])
    if progress.resume():
        print(f"pretrain {size}: resumes at step {progress.counts[-1]}", flush=True)
    print(f"pretrain {size}: {count:,} tokens, {steps} steps, data in {made_in:.0f} s", flush=True)
    _train(size, data, heldout, progress, log)
    curve, _, _, seen, _ = progress.counts
    info = {
        "size": size,
        "tokens": seen,
        "seed": seed,
        "learning_rate": lr,
        "cycles": before.get("cycles", 1) + 1,
        "steps": before.get("steps", 0) + steps,
        "batch_tokens": BATCH_TOKENS,
        "seconds": before.get("seconds", 0) + round(time.time() - progress.began),
        "corpus_hash": corpus.corpus_hash(),
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "embed" not in n),
        "torch": torch.__version__,
        "curve": curve,
    }
    _save(model, tokenizer, info, out)
    progress.saved.clear()
    return info


def _training_data(tokenizer, tokens, seed, context_loss) -> tuple[list[np.ndarray], int]:
    """Shuffled batches of at least `tokens` tokens of the corpus, and how many tokens they hold."""
    made: list[tuple[list[int], int]] = []
    count, chunk = 0, 0
    while count < tokens:  # in chunks: the texts of the whole corpus would take too much memory
        part = encode(tokenizer, corpus.documents(seed * 1000 + 10 + chunk, CHUNK), context_loss)
        made += [(np.array(ids, np.int16), first) for ids, first in part]  # lists would take 1 GB
        count += sum(len(ids) for ids, _ in part)
        chunk += 1
    data = batches(made)
    random.Random(seed).shuffle(data)
    return data, count


def _last_cycle(folder, size) -> tuple[LlamaForCausalLM, dict, list[dict]]:
    """Model in float32, provenance and curve of a folder that an earlier cycle made."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                             attn_implementation="eager")  # fmt: skip
    note = json.loads((folder / "provenance.json").read_text())
    if note["size"] != size or note["corpus_hash"] != corpus.corpus_hash():
        raise ValueError(f"{folder} holds a {note['size']} of another corpus or size, not "
                         f"this world's {size}: pretrain its first cycle anew")
    return model.train(), note, pd.read_csv(folder / "curve.csv").to_dict("records")


def _optimizer(model, lr, steps):
    """AdamW without weight decay on norms; the rate warms up, then falls as a cosine to 2 %."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95))
    warmup = min(100, steps // 10 + 1)

    def factor(step):
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min((step + 1) / warmup, 0.02 + 0.98 * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class _Progress:
    """What a killed run goes on from: a checkpoint of the parts' states and the counts below.

    counts: curve, sum of losses since its last point, steps since then, tokens seen, steps done.
    """

    saved: resume.Checkpoints
    parts: dict
    began: float
    counts: list

    def resume(self) -> bool:
        folder, state = self.saved.find()
        if folder is None:
            return False
        kept = torch.load(folder / "parts.pt", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(kept[name])
        self.counts = state["counts"]
        self.began -= state["seconds"]  # the time of the killed run counts
        return True

    def keep(self) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.saved.write(self.counts[-1], lambda folder: torch.save(states, folder / "parts.pt"),
                         counts=self.counts, seconds=time.time() - self.began)


def _train(size, data, heldout, progress, log) -> None:
    """One pass over `data` from where `progress` is, with about 25 evaluations."""
    model, optimizer, schedule = progress.parts.values()
    low = lm_models.bf16_pays(model, above=lm_models.BF16_ABOVE)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=low)
    curve, loss_sum, since, seen, first = progress.counts
    began, steps = time.time(), len(data)
    window = max(1, steps // 25)
    for step, blocks in enumerate(data[first:], first):
        batch = _inputs(blocks)
        seen += int((blocks[1] > 0).sum())
        with autocast:
            loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"pretrain {size}: loss is {loss.item()} at step {step}: lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        loss_sum, since = loss_sum + loss.item(), since + 1
        # The last point covers half a window at least: the mean of a few steps is noise.
        left = steps - step - 1
        if ((step + 1) % window == 0 and left >= window // 2) or left == 0:
            held = _held_loss(model, heldout)
            row = {"size": size, "tokens": seen, "train": loss_sum / since, "heldout": held}
            curve.append(row)
            loss_sum, since = 0.0, 0
            minutes = left * (time.time() - began) / (step + 1 - first) / 60
            print(f"pretrain {size}: step {step + 1}/{steps} train {row['train']:.4f} "
                  f"heldout {held:.4f} {minutes:.1f} min left", flush=True)
            if log:
                log({f"pretrain/{size}/{k}": v for k, v in row.items() if k != "size"})
        progress.counts = [curve, loss_sum, since, seen, step + 1]
        if (step + 1) % KEEP_EVERY == 0:
            progress.keep()


def _held_loss(model, heldout) -> float:
    model.eval()
    total = weight = 0.0
    with torch.inference_mode():
        for blocks in heldout:
            batch = _inputs(blocks)
            n = int((batch["labels"][:, 1:] >= 0).sum())
            total, weight = total + model(**batch).loss.item() * n, weight + n
    model.train()
    return total / weight


def _save(model, tokenizer, info, out: Path) -> None:
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with explained(out):
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        pd.DataFrame(info["curve"]).to_csv(part / "curve.csv", index=False)
        note = {k: v for k, v in info.items() if k != "curve"}
        note["weights_sha256"] = fingerprint.file_digest(part / "model.safetensors")
        write_json(part / "provenance.json", note)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)


def series(sizes: list[str], folder: Path, tokens: dict | None = None, log=None) -> None:
    """Pretrain sizes one after the other; a whole folder with this world's hash is kept.

    tokens: {size: tokens} for one cycle each, instead of TOKENS and CYCLES.
    """
    for size in sizes:
        if _made_here(folder / size):
            print(f"pretrain {size}: {folder / size} is up to date")
            continue
        cycles, start = 1 if tokens else CYCLES[size], None
        for cycle in range(cycles):
            out = folder / (size if cycle == cycles - 1 else f".{size}-cycle-{cycle + 1}")
            if not _made_here(out):
                print(f"pretrain {size}: cycle {cycle + 1} of {cycles}", flush=True)
                pretrain(size, out, (tokens or TOKENS)[size], cycle, log=log, start=start)
            start = out
        for between in folder.glob(f".{size}-cycle-*"):
            shutil.rmtree(between)


def _made_here(folder: Path) -> bool:
    note, weights = read_json(folder / "provenance.json"), folder / "model.safetensors"
    if note.get("corpus_hash") != corpus.corpus_hash():
        return False
    # None: a folder from before weights had a checksum.
    whole = weights.is_file() and note.get("weights_sha256") in (
        None, fingerprint.file_digest(weights))
    if not whole:
        resume.set_aside(folder, f"pretrain: {weights} is not what was written")
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default=None, help="folder of the cycle before")
    parser.add_argument("--context-loss", action="store_true")
    args = parser.parse_args()
    random.seed(args.seed)
    pretrain(args.size, args.out, args.tokens, args.seed, args.context_loss, start=args.start)
