"""Online RLAIF (paper, section 6.1; the paper itself did not run it): the PM is refreshed with AI
feedback on responses of the current policy, so that it judges the texts that it is optimised on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cai_utils import preference
from cai_utils.data import comparisons
from cai_utils.lm import models


class PMRefresher:
    """The `refresh` of `ppo.train`: samples pairs of responses from the policy, has them labelled,
    trains the PM further, and returns its new folder.

    pm: spec or folder of the first PM; each refresh continues from the PM before it.
    label: pairs {"prompt": messages, "responses": [first, second]} -> comparison rows, for instance
        `lambda pairs: feedback.label(sampler, pairs, constitution)`.
    prompts: rows {"prompt": messages}, of which `n` are drawn anew each time.
    folder: the PM after iteration i is saved in folder/pm-<i>.
    human_rows: comparisons that are mixed in (`comparisons.mix`), so that helpfulness is not
        forgotten; `ai_share` is the fraction of the signal that comes from the AI.
    key: JSON that identifies the run for resuming (the name of the feedback model, of the
        constitution, ...), since functions such as `label` cannot be compared; None: no resuming.
    options: further arguments of `preference.train`.

    ValueError where there are fewer than `n` prompts.
    """

    def __init__(self, pm, label, prompts, folder, *, n=64, human_rows=None, ai_share=0.5, seed=0,
                 temperature=1.0, max_new_tokens=48, key=None, **options):
        self.pm, self.first, self.label, self.folder = pm, pm, label, Path(folder)
        self.prompts = [row["prompt"] if isinstance(row, dict) else row for row in prompts]
        self.n, self.human_rows, self.ai_share, self.seed = n, human_rows, ai_share, seed
        self.sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        self.options = options
        if n > len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts are fewer than the n={n} of a refresh")
        self.key = None if key is None else {
            "key": key, "n": n, "ai_share": ai_share, "seed": seed, **self.sampling, **options,
            "pm": models.resolve(pm, options.get("runs_dir")), "prompts": self.prompts,
            "human_rows": human_rows}

    def resume(self, pm):
        """After a kill: continues from the PM that the last refresh made (None: there was none)."""
        self.pm = self.first if pm is None else pm

    def __call__(self, iteration, sampler):
        """iteration: iterations done; sampler: the policy's. Returns the new PM's folder, or the
        present one where the policy gives no two different responses."""
        draw = np.random.default_rng([self.seed, iteration])
        chosen = [self.prompts[i] for i in draw.permutation(len(self.prompts))[: self.n]]
        seed = int(draw.integers(2**31))
        sampled = sampler.generate(chosen, n=2, seed=seed, progress=False, **self.sampling)
        pairs = [{"prompt": p, "responses": [c.text for c in row]}
                 for p, row in zip(chosen, sampled, strict=True)]
        # Equal or empty responses teach a PM nothing; a policy under training gives both.
        pairs = [p for p in pairs if len({t.strip() for t in p["responses"]} - {""}) == 2]
        if not pairs:
            print(f"online: no two different responses in iteration {iteration}: the PM stays")
            return self.pm
        rows = self.label(pairs)
        if self.human_rows:
            rows = comparisons.mix(self.human_rows, rows, self.seed, ai_share=self.ai_share)
        folder = self.folder / f"pm-{iteration}"
        preference.train(self.pm, rows, folder, seed=self.seed, **self.options)
        self.pm = folder
        return folder
