"""Engines beside each other: the protocol between a benchmark and an engine's process, and the peers that are written here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from afd_ray.models.checkpoint import Checkpoint, load_model
from benchmarks.peers.environments import without_torch
from benchmarks.peers.plain_torch import StaticBatch
from benchmarks.peers.process import Engine, Launch
from benchmarks.peers.protocol import Answer, EngineError, Job

CHATTY = """
from benchmarks.peers.protocol import Answer, Pipe
pipe = Pipe()
print("a library that prints")
pipe.serve(lambda job: Answer([[float(len(prompt))] * job.max_tokens for prompt in job.prompts]))
"""
REFUSING = "from benchmarks.peers.protocol import Pipe; Pipe().refuse('no such processor')"


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(Launch([sys.executable, "-c", request.param], {}))
    yield engine
    engine.close()


@pytest.mark.parametrize("engine", [CHATTY], indirect=True)
def test_an_engine_answers_each_job_whatever_it_prints(engine: Engine) -> None:
    engine.await_ready()
    assert engine.generate(Job([[1, 2, 3]], max_tokens=2)) == Answer([[3.0, 3.0]])
    assert engine.generate(Job([[1], [2]], max_tokens=1)) == Answer([[1.0], [1.0]])


@pytest.mark.parametrize("engine", [REFUSING], indirect=True)
def test_an_engine_that_cannot_run_says_why(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"^no such processor$"):
        engine.await_ready()


@pytest.mark.parametrize("engine", ["raise SystemExit(1)"], indirect=True)
def test_an_engine_that_ended_is_an_error(engine: Engine) -> None:
    with pytest.raises(EngineError, match="has ended"):
        engine.await_ready()


@torch.inference_mode()
def test_plain_torch_decodes_as_the_reference(tiny_directory: Path) -> None:
    model = load_model(Checkpoint.open(tiny_directory))
    prompts = [[5, 17, 3, 9], [250, 1, 44, 8]]
    batch = StaticBatch(model, prompts, max_tokens=6)
    steps = [torch.stack([batch.prefill(index) for index in range(len(prompts))])]
    while len(steps) < 6:
        steps.append(batch.decode(steps[-1]))
    assert torch.stack(steps, dim=1).tolist() == [model.generate_greedy(prompt, 6) for prompt in prompts]


def test_a_peer_never_chooses_its_torch() -> None:
    wanted = [Requirement(text) for text in ("numpy", "torch==2.13.0+cpu", "torchvision", "torchaudio", "torchcodec>=0.14")]
    assert without_torch(wanted) == ["numpy"]
