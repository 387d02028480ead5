"""What the serving benchmark makes of the times at which tokens arrived."""

import pytest

from benchmarks.peers.protocol import Answer, EngineError
from benchmarks.serving import Load, Row, decode_rate, ratios, row

LOAD = Load(requests=2, context=8, tokens=3)


def row_of(engine: str, tokens_per_s: float) -> Row:
    return Row(engine, LOAD, tokens_per_s, None, {}, {})


def test_tokens_per_second_count_the_prefill() -> None:
    figures = row("x", LOAD, Answer([[1.0, 1.5, 2.0], [1.0, 1.5, 3.0]]))
    assert figures.tokens_per_s == 2.0


def test_ttft_is_the_first_token_and_tpot_the_gaps() -> None:
    figures = row("x", LOAD, Answer([[1.0, 1.5, 2.0], [1.0, 1.5, 3.5]]))
    assert figures.ttft_ms == {"p50": 1000.0, "p95": 1000.0, "p99": 1000.0}
    assert figures.tpot_ms == {"p50": 500.0, "p95": 2000.0, "p99": 2000.0}


def test_an_answer_with_a_token_missing_is_refused() -> None:
    with pytest.raises(EngineError, match="must answer 2 x 3 tokens"):
        row("x", LOAD, Answer([[1.0, 1.5, 2.0], [1.0, 1.5]]))


def test_the_decode_rate_begins_with_the_last_first_token() -> None:
    assert decode_rate([[1.0, 3.0, 4.0], [2.0, 3.0, 4.0]]) == 2.0


def test_there_is_no_decode_rate_when_prefill_took_most_of_the_row() -> None:
    assert decode_rate([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 10.0]]) is None


def test_ratios_are_to_the_better_vllm() -> None:
    rows = [row_of("afd", 120.0), row_of("vllm-eager", 60.0), row_of("vllm-compiled", 100.0)]
    assert ratios(rows) == {"afd": 1.2, "vllm-eager": 0.6, "vllm-compiled": 1.0}


def test_without_vllm_there_are_no_ratios() -> None:
    assert ratios([row_of("afd", 120.0)]) == {}


def test_every_engine_gets_the_same_prompts_and_every_load_others() -> None:
    assert LOAD.job() == LOAD.job()
    assert LOAD.job().prompts != LOAD._replace(requests=3).job().prompts[:2]
