"""Choosing the next token from logits: a pure function of the logits, the sequence and its seed.

Legend of shapes: S rows, R rows of S that share a feature, V vocabulary. Penalties, temperature, min-p, top-k, top-p apply in that order.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.sequence import Sequence
from afd_ray.request import SamplingParams

# Below it a softmax is an argmax, and the division could overflow.
GREEDY_BELOW_TEMPERATURE = 1e-5
# Top-p looks at this many of the largest probabilities before it sorts them all.
TOP_P_CANDIDATES = 256
DRAW_BLOCK = 64
_MASK_64 = 2**64 - 1


class Sampled(NamedTuple):
    """The token chosen for one row, or the reason why none could be."""

    token_id: int | None
    logprob: float | None = None
    """Of the raw logits: before penalties, temperature and truncation."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


def sample(logits: Tensor, sequences: Many[Sequence]) -> list[Sampled]:
    """One token for each row of logits [S, V] float32; ties of greedy rows go to the lowest id.

    The draw depends on (seed, position) alone, never on the other rows. A row whose logits are not finite, or that draws without
    a seed, gets an error and leaves the others as they are.
    """
    params = [sequence.request.params for sequence in sequences]
    finite = logits.sum(-1).isfinite().tolist()
    if all(map(_is_plain, params)):
        chosen = _largest(logits)
        return [Sampled(token) if ok else _not_finite(s) for token, ok, s in zip(chosen, finite, sequences, strict=True)]
    errors = {row: _row_error(sequence, finite[row]) for row, sequence in enumerate(sequences)}
    good = [row for row, error in errors.items() if error is None]
    tokens = dict(zip(good, _choose(_select(logits, good), [sequences[row] for row in good]), strict=True)) if good else {}
    asking = [row for row in good if params[row].logprobs is not None]
    results = dict(zip(asking, _with_logprobs(logits, asking, params, tokens), strict=True))
    return [errors[row] or results.get(row) or Sampled(tokens[row]) for row in range(len(params))]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: a counter-based generator (SplitMix64's mixing function)."""
    mixed = _mix(_mix(seed & _MASK_64) + (position + 1) * 0x9E3779B97F4A7C15)
    return (mixed >> 16) / 2**48  # 48 bits: times any total it stays below that total


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW_TEMPERATURE


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_plain(params: SamplingParams) -> bool:
    return _is_greedy(params) and params.logprobs is None and not _has_penalty(params)


def _not_finite(sequence: Sequence) -> Sampled:
    return Sampled(None, error=f"logits of request {sequence.id} are not finite at position {len(sequence.token_ids)}")


def _row_error(sequence: Sequence, finite: bool) -> Sampled | None:
    if not finite:
        return _not_finite(sequence)
    if sequence.request.params.seed is None and not _is_greedy(sequence.request.params):
        return Sampled(None, error=f"seed of request {sequence.id} must be set before sampling, got None")
    return None


def _with_logprobs(logits: Tensor, rows: list[int], params: list[SamplingParams], tokens: dict[int, int]) -> list[Sampled]:
    if not rows:
        return []
    logprobs = _select(logits, rows).log_softmax(-1)  # [R, V]
    chosen = logprobs.gather(1, torch.tensor([[tokens[row]] for row in rows])).squeeze(1).tolist()
    counts = [min(params[row].logprobs or 0, logits.shape[1]) for row in rows]
    top = logprobs.topk(max(counts), dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    return [
        Sampled(tokens[row], chosen[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]


def _select(rows_of: Tensor, rows: list[int]) -> Tensor:
    """Ascending rows [R, V] of a tensor [S, V]: itself, not a copy, when they are all."""
    return rows_of if len(rows) == len(rows_of) else rows_of[rows]


def _largest(logits: Tensor) -> list[int]:
    """Each row's token of the largest logit, of equal ones the lowest id. NumPy finds it an order of magnitude sooner than torch."""
    return list(logits.numpy().argmax(-1).tolist())


def _choose(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    params = [sequence.request.params for sequence in sequences]
    logits = _penalise(logits, sequences)
    tokens = _largest(logits)
    drawing = [row for row, each in enumerate(params) if not _is_greedy(each)]
    if drawing:
        draws = [uniform(sequences[row].request.params.seed or 0, len(sequences[row].token_ids)) for row in drawing]
        weights = _weights(_select(logits, drawing), [params[row] for row in drawing])
        for row, token in zip(drawing, _draw(weights, draws), strict=True):
            tokens[row] = token
    return list(map(int, tokens))


def _penalise(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """As vLLM: repetition over prompt and output, presence and frequency over the output."""
    penalties = [(row, *entry) for row, sequence in enumerate(sequences) for entry in _penalties(sequence)]
    if not penalties:
        return logits
    rows, ids, factors, offsets = zip(*penalties, strict=True)
    at = (torch.tensor(rows), torch.tensor(ids))
    values, factor = logits[at], torch.tensor(factors)
    penalised = logits.clone()  # the caller's are reported in logprobs
    penalised[at] = torch.where(values > 0, values / factor, values * factor) - torch.tensor(offsets)
    return penalised


def _penalties(sequence: Sequence) -> Iterator[tuple[int, float, float]]:
    """(token id, factor, offset) of each token that the sequence has seen and penalises."""
    params = sequence.request.params
    if not _has_penalty(params):
        return
    counts = Counter(sequence.output_token_ids)
    for token in set(sequence.token_ids) if params.repetition_penalty != 1.0 else counts:
        offset = params.frequency_penalty * counts[token] + params.presence_penalty if token in counts else 0.0
        yield token, params.repetition_penalty, offset


def _weights(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities [R, V], 0 for the tokens cut off, not normalised."""
    temperature = torch.tensor([each.temperature for each in params], dtype=logits.dtype)[:, None]
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperature).softmax(-1)
    _cut(weights, [each.min_p for each in params], lambda rate: rate > 0.0, _min_p_cut)
    _cut(weights, [each.top_k for each in params], lambda k: 0 < k < logits.shape[1], _top_k_cut)
    _cut(weights, [each.top_p for each in params], lambda mass: mass < 1.0, _top_p_cut)
    return weights


def _cut(weights: Tensor, values: Many[float], applies: Callable[[float], bool], cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Apply a truncation, in place, to the rows that ask for it."""
    rows = [row for row, value in enumerate(values) if applies(value)]
    if rows:
        weights[rows] = cut(_select(weights, rows), torch.tensor([values[row] for row in rows])[:, None])


def _min_p_cut(weights: Tensor, rate: Tensor) -> Tensor:
    return weights.masked_fill(weights < rate * weights.amax(-1, keepdim=True), 0.0)


def _top_k_cut(weights: Tensor, k: Tensor) -> Tensor:
    largest = weights.topk(int(k.max()), dim=-1).values
    return weights.masked_fill(weights < largest.gather(1, k - 1), 0.0)


def _top_p_cut(weights: Tensor, mass: Tensor) -> Tensor:
    """Keep the fewest of the largest whose sum reaches `mass` of the total; of equal ones the lowest ids."""
    target = mass * weights.sum(-1, keepdim=True)  # [R, 1]
    largest = weights.topk(min(TOP_P_CANDIDATES, weights.shape[1]), dim=-1).values
    if bool((largest.cumsum(-1)[:, -1:] < target).any()):
        largest = weights.sort(dim=-1, descending=True).values
    kept = 1 + (largest.cumsum(-1)[:, :-1] < target).sum(-1, keepdim=True)  # [R, 1]
    threshold = largest.gather(1, kept - 1)
    above, equal = weights > threshold, weights == threshold
    equal &= equal.cumsum(-1) <= kept - above.sum(-1, keepdim=True)
    return weights.masked_fill(~(above | equal), 0.0)


def _draw(weights: Tensor, draws: list[float]) -> list[int]:
    """Invert each row's cumulative distribution, first over blocks of tokens and then inside the block drawn.

    In float64, for a float32 sum over a large vocabulary loses the small ones.
    """
    vocab = weights.shape[1]
    whole = vocab // DRAW_BLOCK * DRAW_BLOCK
    sums = weights[:, :whole].reshape(len(weights), whole // DRAW_BLOCK, DRAW_BLOCK).sum(-1, dtype=torch.float64)
    totals = torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)), dim=1).cumsum(-1)
    points = torch.tensor(draws, dtype=torch.float64)[:, None] * totals[:, -1:]
    block = torch.searchsorted(totals, points, right=True)  # [R, 1]
    points = points - torch.where(block > 0, totals.gather(1, (block - 1).clamp_min(0)), 0.0)
    ids = block * DRAW_BLOCK + torch.arange(DRAW_BLOCK)
    inside = weights.gather(1, ids.clamp_max(vocab - 1)).masked_fill(ids >= vocab, 0.0).double().cumsum(-1)
    # Rounding must not carry a point past the last token of its block that has any weight.
    points = torch.minimum(points, inside[:, -1:] * (1 - 2**-48))
    return list(map(int, (block * DRAW_BLOCK + torch.searchsorted(inside, points, right=True)).squeeze(1).tolist()))
