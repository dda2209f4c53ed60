"""Choosing tokens: the sets and the distribution of transformers' warpers, the same whatever the vocabulary's split."""

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_mm1.errors import UserError
from megatron_mm1.inference.requests import GREEDY, Sampling
from megatron_mm1.inference.sampling import VocabularyPart, choose_tokens, log_probabilities

VOCABULARY = 300


@pytest.fixture
def whole(groups) -> VocabularyPart:
    """One rank's part: everything."""
    return VocabularyPart(groups.tp, 0, torch.ones(VOCABULARY, dtype=torch.bool))


def logits(rows: int, *, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def probabilities(one: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers samples from."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, one[None])
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0].double().softmax(dim=-1)


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=5),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=4.0, top_p=0.97),  # more candidates than are gathered at first
    Sampling(temperature=2.0, top_k=40, top_p=0.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_numbers_spread_evenly_give_transformers_distribution(whole, sampling):
    """u from 0 to 1 in equal steps visits each token in proportion to its probability."""
    steps = 4000
    one = logits(1)[0]
    uniforms = [(number + 0.5) / steps for number in range(steps)]
    chosen = choose_tokens(one.expand(steps, -1), [sampling] * steps, uniforms, part=whole)
    expected = probabilities(one, sampling)
    counts = Counter(chosen.tolist())
    found = torch.tensor([counts[token] / steps for token in range(VOCABULARY)], dtype=torch.float64)
    assert (found - expected).abs().max() <= 1.01 / steps
    assert found[expected == 0].sum() == 0


def test_each_row_chooses_as_its_own_sampling_says(whole):
    rows = logits(len(SAMPLINGS) + 1)
    samplings = [GREEDY, *SAMPLINGS]
    uniforms = [0.3 + 0.1 * number for number in range(len(samplings))]
    together = choose_tokens(rows, samplings, uniforms, part=whole)
    alone = [
        choose_tokens(rows[n : n + 1], [samplings[n]], [uniforms[n]], part=whole)[0] for n in range(len(samplings))
    ]
    assert together.tolist() == [int(token) for token in alone]


def test_of_equally_likely_tokens_the_lowest_is_taken(whole):
    rows = torch.zeros(1, VOCABULARY)
    rows[0, [7, 200]] = 3.0
    assert choose_tokens(rows, [GREEDY], [0.0], part=whole).tolist() == [7]


@pytest.mark.parametrize("sampling", [GREEDY, *SAMPLINGS], ids=str)
@pytest.mark.parametrize("uniform", [0.0, 0.37, 1 - 2**-53])
def test_what_is_not_allowed_is_never_chosen(groups, sampling, uniform):
    rows = logits(8)
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[[5, 17, 290]] = True
    part = VocabularyPart(groups.tp, 0, allowed)
    chosen = choose_tokens(rows, [sampling] * 8, [uniform] * 8, part=part)
    assert set(chosen.tolist()) <= {5, 17, 290}


def test_log_probabilities_are_of_the_whole_vocabulary(whole):
    rows, tokens = logits(5), torch.tensor([0, 299, 17, 17, 4])
    found = log_probabilities(rows, tokens, part=whole)
    expected = rows.double().log_softmax(dim=-1)[torch.arange(5), tokens]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(temperature=-1.0), "temperature is -1: give 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_k=0), "top_k is 0: give 1 or more"),
        (dict(top_p=0.0), "top_p is 0: give more than 0"),
        (dict(top_p=1.5), "top_p is 1.5"),
    ],
)
def test_values_that_mean_nothing_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
