"""Choosing tokens from logits that are split over tensor-parallel ranks: never more than the candidates are gathered.

All ranks decide on the same gathered numbers, so they choose the same. Of each row and rank a greedy choice gathers the
likeliest token and its logit; sampling gathers the probability mass and then an id, before that `top_k` gathers its k
values, and `top_p` as many of the likeliest as have the mass (64, twice as many, ..).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mm1.inference.requests import Sampling

_CANDIDATES = 64


@dataclass(frozen=True)
class VocabularyPart:
    """A rank's part of the vocabulary.

    Attributes:
        group: the tensor-parallel ranks.
        start: the token of its first logit.
        allowed: [V / T] bool, tokens that may be chosen.
    """

    group: ProcessGroup
    start: int
    allowed: Tensor

    def gather(self, numbers: Tensor) -> Tensor:
        """[T, ..] the numbers of each rank."""
        if self.group.size() == 1:
            return numbers[None]
        parts = [torch.empty_like(numbers) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, numbers.contiguous(), group=self.group)
        return torch.stack(parts)


def choose_tokens(
    logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], *, part: VocabularyPart
) -> Tensor:
    """One token for each row.

    Args:
        logits: [n, V / T] float32, this rank's part.
        samplings: how each row chooses.
        uniforms: a random number of each row, 0 <= u < 1; greedy rows do not use theirs.

    Returns:
        [n] int64, on every tensor-parallel rank.
    """
    logits = logits.masked_fill(~part.allowed, -torch.inf)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not sampled:
        return _likeliest(logits, part)
    chosen = _sample(
        logits[sampled], [samplings[row] for row in sampled], [uniforms[row] for row in sampled], part=part
    )
    if len(sampled) == len(samplings):
        return chosen
    tokens = _likeliest(logits, part)
    tokens[sampled] = chosen
    return tokens


def log_probabilities(logits: Tensor, tokens: Tensor, *, part: VocabularyPart) -> Tensor:
    """[n] float64: of one token for each row of logits [n, V / T], in the distribution over the whole vocabulary."""
    local = tokens - part.start
    here = (local >= 0) & (local < logits.shape[1])
    own = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double().masked_fill(~here, -torch.inf)
    greatest, mass = _mass(logits)
    gathered = part.gather(torch.stack((greatest, mass, own)))  # [T, 3, n]
    return gathered[:, 2].amax(0) - _log_mass(gathered[:, 0], gathered[:, 1])


def _likeliest(logits: Tensor, part: VocabularyPart) -> Tensor:
    places = logits.argmax(dim=1)  # the first of equals
    values = logits.gather(1, places[:, None])[:, 0].double()
    gathered = part.gather(torch.stack((values, (places + part.start).double())))  # [T, 2, n]
    rank = gathered[:, 0].argmax(dim=0)
    return gathered[:, 1].gather(0, rank[None])[0].long()


def _sample(
    logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], *, part: VocabularyPart
) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    logits = logits / column([sampling.temperature for sampling in samplings]).float()
    top_k = [sampling.top_k or 0 for sampling in samplings]
    if any(top_k):
        logits = _without(logits, _kth_value(logits, top_k, part))
    top_p = column([sampling.top_p for sampling in samplings])
    if bool((top_p < 1).any()):
        logits = _without(logits, _value_at_mass(logits, top_p, part))
    return _inverse_distribution(logits, column(uniforms), part)


def _without(logits: Tensor, threshold: Tensor) -> Tensor:
    """Without what is less likely than `threshold` [n]."""
    return logits.masked_fill(logits < threshold[:, None], -torch.inf)


def _kth_value(logits: Tensor, top_k: Sequence[int], part: VocabularyPart) -> Tensor:
    """[n] the k-th greatest logit of each row, -inf where k is 0."""
    values = _greatest(logits, max(top_k), part)
    last = torch.tensor([min(k, values.shape[1]) - 1 for k in top_k], device=logits.device)
    found = values.gather(1, last.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(last < 0, -torch.inf)


def _value_at_mass(logits: Tensor, top_p: Tensor, part: VocabularyPart) -> Tensor:
    """[n] the logit down to which the greatest together have probability `top_p` [n, 1]; -inf where it is 1."""
    gathered = part.gather(torch.stack(_mass(logits)))
    log_mass = _log_mass(gathered[:, 0], gathered[:, 1])[:, None]
    count, size = _CANDIDATES, logits.shape[1] * part.group.size()
    while True:
        values = _greatest(logits, count, part)
        reached = (values.double() - log_mass).exp().cumsum(dim=1) >= top_p  # [n, count]
        enough = reached.any(dim=1) | (top_p[:, 0] == 1)
        if bool(enough.all()) or count >= size:
            break
        count *= 2
    first = reached.int().argmax(dim=1)
    found = values.gather(1, first[:, None])[:, 0]
    return found.masked_fill(~reached.any(dim=1) | (top_p[:, 0] == 1), -torch.inf)


def _greatest(logits: Tensor, count: int, part: VocabularyPart) -> Tensor:
    """[n, count or fewer] the greatest logits of the whole vocabulary, in falling order."""
    own = logits.topk(min(count, logits.shape[1]), dim=1).values
    if part.group.size() == 1:
        return own
    together = part.gather(own).transpose(0, 1).flatten(1)
    return together.topk(min(count, together.shape[1]), dim=1).values


def _mass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n] float64: the greatest logit of each row, and the sum of exponentials relative to it."""
    greatest = logits.amax(dim=1)
    relative = logits - greatest.masked_fill(greatest == -torch.inf, 0.0)[:, None]
    return greatest.double(), relative.exp().sum(dim=1, dtype=torch.float64)


def _log_mass(greatest: Tensor, mass: Tensor) -> Tensor:
    """[n] the logarithm of the sum of exponentials of all ranks' logits, from what `_mass` has of each [T, n]."""
    return (mass.log() + greatest).logsumexp(dim=0)


def _inverse_distribution(logits: Tensor, uniforms: Tensor, part: VocabularyPart) -> Tensor:
    """[n] the tokens at which the distribution, summed up in the order of ids, exceeds `uniforms` [n, 1]."""
    greatest, mass = _mass(logits)
    gathered = part.gather(torch.stack((greatest, mass)))  # [T, 2, n]
    masses = gathered[:, 1] * (gathered[:, 0] - gathered[:, 0].amax(0)).exp()
    ends = masses.cumsum(dim=0)
    targets = uniforms[:, 0] * ends[-1]
    # Rounding must not lead beyond the last rank that has any mass.
    rank = torch.minimum((ends <= targets).sum(dim=0), (ends < ends[-1]).sum(dim=0))
    ours = rank == part.group.rank()
    tokens = torch.full_like(rank, -1)
    if bool(ours.any()):
        before = ends[part.group.rank()] - masses[part.group.rank()]
        share = ((targets - before) / masses[part.group.rank()])[ours].clamp(0, 1)
        summed = (logits[ours] - greatest[ours, None].float()).exp().double().cumsum(dim=1)
        total = summed[:, -1]
        inside = torch.minimum(share * total, total.nextafter(torch.zeros_like(total)))
        tokens[ours] = part.start + torch.searchsorted(summed, inside[:, None], right=True)[:, 0]
    return part.gather(tokens).amax(dim=0)
