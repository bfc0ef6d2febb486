"""What a step of pretraining sees: rates, prompts, pairs."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.pretrain.config import LdmConfig, LoopConfig
from pipeline.pretrain.ldm import LdmObjective, PhaseData
from pipeline.pretrain.loop import rate_factor

NUM = 10


class Reader:
    """A reader's face over pairs 0 to 9; keeps what was read."""

    def __init__(self):
        self.read_pairs = []

    def __len__(self):
        return NUM

    def read(self, numbers, *, draws):
        assert len(numbers) == len(draws)
        self.read_pairs += list(numbers)
        latent = torch.zeros(len(numbers), 4, 8, 8)
        return SimpleNamespace(inputs={"latent": latent}, phrases=tuple(f"p{n}" for n in numbers))


def build(**changes):
    phases = [
        {"size": 64, "num_steps": 5, "batch_size": 4},
        {"size": 64, "num_steps": 5, "batch_size": 6},
    ]
    config = LdmConfig.model_validate(
        {"phases": phases, "learning_rate": 1e-3, "prompts": ["{}", "a {}"], **changes}
    )
    readers = [Reader(), Reader()]
    data = [PhaseData(first, reader, reader) for first, reader in zip((0, 5), readers, strict=True)]
    return LdmObjective(config, data, torch.device("cpu")), readers


def test_rates_rise_stay_and_fall_to_the_last_step():
    config = LoopConfig(learning_rate=1.0, warmup_steps=4, decay_share=0.5)
    rates = [rate_factor(config, step, 20) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(rates[9:12], [1.0, 1.0, 0.9])
    assert rates[-1] == pytest.approx(0.1)


def test_an_epoch_reads_each_pair_once_in_another_order():
    task, (first, second) = build()
    for step in range(10):
        latent, prompts = task.read_step(step)
        assert len(latent) == len(prompts) == (4 if step < 5 else 6)
    for reader, epochs in ((first, 2), (second, 3)):
        read = [reader.read_pairs[NUM * i : NUM * (i + 1)] for i in range(epochs)]
        assert all(sorted(epoch) == list(range(NUM)) for epoch in read)
        assert len({tuple(epoch) for epoch in read}) == epochs


def test_prompts_are_dropped_by_their_share_and_templates_drawn():
    task, _ = build(drop_prompt=0.25)
    written = Counter(p for step in range(100) for p in task.format_prompts(("cat",) * 20, step))
    assert written.keys() == {"", "cat", "a cat"}
    assert written[""] == pytest.approx(500, abs=80)
    assert written["cat"] == pytest.approx(750, abs=90)
    assert task.format_prompts(("cat",) * 20, 3) == task.format_prompts(("cat",) * 20, 3)
    never, _ = build(drop_prompt=0.0)
    assert "" not in never.format_prompts(("cat",) * 200, 0)


def test_validation_without_a_phrase_asks_with_the_empty_prompt():
    task, _ = build()
    asked = []

    def text(prompts):
        asked.append(set(prompts))
        return SimpleNamespace(tokens=torch.zeros(len(prompts), 1, 4))

    def unet(x, timestep, tokens):
        return SimpleNamespace(sample=torch.zeros_like(x))

    model = {"text": text, "unet": unet}
    figures = task.validate(model)
    assert figures["t50"] == pytest.approx(1.0, abs=0.1)  # predicting nothing
    task.validate(model, empty=True)
    assert asked == [{f"p{n}" for n in range(NUM)}, {""}]
