"""Sampling: what may be drawn and how often, by what the draw is determined, and what is reported."""

import pytest
import torch
from torch import Tensor

from afd_ray.engine import sampling
from afd_ray.engine.sampling import sample, uniform
from afd_ray.engine.sequence import Sequence
from afd_ray.request import Request, SamplingParams

DRAWS = 4000
UNIFORM_1_2 = 0.7774369184800847
LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, 1.5]


def at(position: int, params: SamplingParams) -> Sequence:
    return Sequence(Request("r", (0,) * position, params))


def after(prompt: list[int], output: list[int], params: SamplingParams) -> Sequence:
    return Sequence(Request("r", tuple(prompt), params), output)


def frequencies(logits: list[float], params: SamplingParams) -> Tensor:
    """How often each token is drawn, over many positions of one seed."""
    rows = [at(position, params) for position in range(1, DRAWS + 1)]
    tokens = [each.token_id for each in sample(torch.tensor([logits]).expand(DRAWS, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / DRAWS


def assert_drawn_like(logits: list[float], params: SamplingParams, expected: Tensor) -> None:
    """Within 4.5 standard deviations of each probability; a probability of 0 is never drawn."""
    drawn = frequencies(logits, params)
    bound = 4.5 * (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((drawn - expected).abs() <= bound + 1e-9).all()), f"drawn {drawn.tolist()}, expected {expected.tolist()}"


def only(kept: list[int], temperature: float = 1.0) -> Tensor:
    """The softmax of LOGITS over these tokens alone."""
    masked = torch.full((len(LOGITS),), -torch.inf)
    masked[kept] = torch.tensor(LOGITS)[kept] / temperature
    return masked.softmax(-1)


# The probabilities of LOGITS, most likely first: token 0: 0.42, 5: 0.25, 1: 0.15, 2: 0.09, 3: 0.06, 4: 0.02.
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(seed=1), only([0, 1, 2, 3, 4, 5])),
        (SamplingParams(seed=2, temperature=0.5), only([0, 1, 2, 3, 4, 5], 0.5)),
        (SamplingParams(seed=3, temperature=5.0), only([0, 1, 2, 3, 4, 5], 5.0)),
        (SamplingParams(seed=4, top_k=1), only([0])),
        (SamplingParams(seed=5, top_k=3), only([0, 1, 5])),
        (SamplingParams(seed=6, top_k=100), only([0, 1, 2, 3, 4, 5])),
        (SamplingParams(seed=7, top_p=0.01), only([0])),
        (SamplingParams(seed=8, top_p=0.6), only([0, 5])),
        (SamplingParams(seed=9, top_p=0.7), only([0, 1, 5])),
        (SamplingParams(seed=10, min_p=0.3), only([0, 1, 5])),
        (SamplingParams(seed=11, min_p=1.0), only([0])),
        (SamplingParams(seed=12, top_k=2, top_p=0.7), only([0, 5])),
        (SamplingParams(seed=13, top_k=2, top_p=0.6), only([0])),
        (SamplingParams(seed=14, temperature=0.5, top_p=0.7), only([0, 5], 0.5)),
    ],
    ids=[
        "plain",
        "cold",
        "hot",
        "top_k=1",
        "top_k=3",
        "top_k=100",
        "top_p=0.01",
        "top_p=0.6",
        "top_p=0.7",
        "min_p=0.3",
        "min_p=1",
        "k-then-p",
        "k-then-less-p",
        "cold-then-p",
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, expected: Tensor) -> None:
    assert_drawn_like(LOGITS, params, expected)


def test_draws_over_a_vocabulary_of_several_blocks() -> None:
    logits = torch.full((150,), -20.0)
    likely = torch.tensor([0, 63, 64, 100, 128, 149])
    logits[likely] = torch.tensor(LOGITS)
    assert_drawn_like(logits.tolist(), SamplingParams(seed=3), logits.softmax(-1))


def test_equal_probabilities_are_cut_at_the_lowest_ids_and_top_k_keeps_ties() -> None:
    assert_drawn_like([0.0] * 4, SamplingParams(seed=1, top_p=0.5), torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert_drawn_like([1.0, 0.0, 0.0], SamplingParams(seed=1, top_k=2), torch.tensor([1.0, 0.0, 0.0]).softmax(-1))


def test_top_p_beyond_its_first_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = frequencies(LOGITS, SamplingParams(seed=1, top_p=0.95))
    monkeypatch.setattr(sampling, "TOP_P_CANDIDATES", 2)
    assert torch.equal(frequencies(LOGITS, SamplingParams(seed=1, top_p=0.95)), expected)
    assert int((expected > 0).sum()) == 5


def test_greedy_takes_the_lowest_id_of_equal_ones() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(temperature=1e-7),
    ):
        assert sample(logits, [at(3, params)])[0].token_id == 1


@pytest.mark.parametrize(
    ("params", "changed"),
    [
        # Prompt 0 1, output 1 3 3.
        (SamplingParams(temperature=0.0, repetition_penalty=2.0), [1.0, -2.0, 3.0, 2.0]),
        (SamplingParams(temperature=0.0, presence_penalty=0.5), [2.0, -1.5, 3.0, 3.5]),
        (SamplingParams(temperature=0.0, frequency_penalty=0.5), [2.0, -1.5, 3.0, 3.0]),
        (SamplingParams(temperature=0.0, presence_penalty=-1.0, frequency_penalty=-0.5), [2.0, 0.5, 3.0, 6.0]),
        (SamplingParams(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5), [1.0, -2.5, 3.0, 1.5]),
    ],
    ids=["repetition", "presence", "frequency", "rewards", "both"],
)
def test_penalties_change_the_logits_of_tokens_seen(params: SamplingParams, changed: list[float]) -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 4.0]])
    before = logits.clone()
    sequence = after([0, 1], [1, 3, 3], params)
    assert sampling._penalise(logits, [sequence]).tolist() == [changed]
    assert sample(logits, [sequence])[0].token_id == changed.index(max(changed))
    assert torch.equal(logits, before)


def test_an_output_penalty_spares_the_prompt() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert sample(torch.tensor([[2.0, 1.0]]), [after([0], [], params)])[0].token_id == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=100.0, logprobs=2)
    result = sample(torch.tensor([LOGITS]), [after([0], [], params)])[0]
    raw = torch.tensor(LOGITS).log_softmax(-1)
    assert result.token_id == 5
    assert result.logprob == pytest.approx(float(raw[5]))
    assert [token for token, _ in result.top_logprobs] == [0, 5]
    assert [value for _, value in result.top_logprobs] == pytest.approx([float(raw[0]), float(raw[5])])


def test_rows_report_as_many_logprobs_as_each_asked_for() -> None:
    asked = [None, 0, 3, 20]
    rows = [at(3, SamplingParams(temperature=0.0, logprobs=count)) for count in asked]
    results = sample(torch.tensor([LOGITS] * 4), rows)
    assert [result.logprob is None for result in results] == [True, False, False, False]
    assert [len(result.top_logprobs) for result in results] == [0, 0, 3, 6]


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=20),
    SamplingParams(seed=3, top_p=0.9, logprobs=2),
    SamplingParams(seed=4, min_p=0.05, presence_penalty=1.0),
    SamplingParams(seed=5, top_k=50, top_p=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, logprobs=1, frequency_penalty=1.0),
]


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    logits = torch.randn(len(MIXED) * 3, 500, generator=torch.Generator().manual_seed(0))
    rows = [after([1, 2, 3], [4] * i, params) for i in range(3) for params in MIXED]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(seed=11)
    resumed, folded = after([1], [2, 3], params), after([7, 8, 9], [], params)
    assert sample(logits, [resumed]) == sample(logits, [folded])
    others = [at(4, params), at(3, SamplingParams(seed=12)), at(3, SamplingParams(seed=-11))]
    assert all(sample(logits, [other]) != sample(logits, [folded]) for other in others)


def test_uniform_is_the_same_in_every_process_and_uniform() -> None:
    assert (uniform(0, 0), uniform(-1, 5)) == (uniform(0, 0), uniform(2**64 - 1, 5))
    assert uniform(1, 2) == UNIFORM_1_2
    for numbers in ([uniform(7, i) for i in range(4000)], [uniform(i, 7) for i in range(4000)]):
        counts = torch.histc(torch.tensor(numbers), bins=20, min=0.0, max=1.0)
        chi_square = float(((counts - 200) ** 2 / 200).sum())
        assert 6 < chi_square < 44, "19 degrees of freedom, 99.8% either side"
        assert all(0.0 <= number < 1.0 for number in numbers)
    steps = torch.tensor([uniform(7, i) for i in range(4001)]) - 0.5
    assert abs(float((steps[1:] * steps[:-1]).mean()) * 12) < 0.07, "neighbouring positions are not correlated"


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(seed=1, top_p=0.9, logprobs=1)], ids=["greedy", "drawn"]
)
def test_a_row_that_is_not_finite_is_an_error_of_its_own(bad: float, params: SamplingParams) -> None:
    logits = torch.tensor([LOGITS] * 3)
    logits[1, 2] = bad
    rows = [at(3, params)] * 3
    first, broken, last = sample(logits, rows)
    assert (broken.token_id, broken.error) == (None, "logits of request r are not finite at position 3")
    assert first == last == sample(logits[:1], rows[:1])[0]
    assert first.error is None


def test_a_draw_without_a_seed_is_an_error_of_its_own() -> None:
    unseeded, seeded = sample(torch.tensor([LOGITS] * 2), [at(3, SamplingParams()), at(3, SamplingParams(seed=0))])
    assert unseeded.error == "seed of request r must be set before sampling, got None"
    assert seeded.token_id is not None


def test_extreme_temperatures_and_logits_stay_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [0.0, 30.0, -30.0]])
    for temperature in (1e-5, 100.0):
        results = sample(logits, [at(3, SamplingParams(seed=1, temperature=temperature))] * 2)
        assert [result.error for result in results] == [None, None]
        assert results[0].token_id == 0
