"""The demo model's tokenizer, template, training pieces and bundled files."""

import json
from pathlib import Path
from random import Random

import jinja2
import pytest
import torch
from tokenizers import Tokenizer

import afd_ray.demo
from afd_ray.demo.corpus import Batch, batches, collate, example
from afd_ray.demo.evaluate import Reply, accuracy, answer
from afd_ray.demo.forward import losses
from afd_ray.demo.muon import orthogonalised
from afd_ray.demo.questions import Question, fresh_questions
from afd_ray.demo.tokenizer import CHAT_TEMPLATE, SPECIALS, chat_prompt, encode, write_tokenizer
from afd_ray.demo.train import STAGES, Stage, begin, rate
from afd_ray.demo.weights import CONFIG, load, save
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import Step3Model

BUNDLED = Path(afd_ray.demo.__file__).parent / "model"
MIX = STAGES[-1].mix


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def random_model() -> Step3Model:
    return begin(seed=0).eval()


@pytest.mark.parametrize("text", ["", " two  spaces ", "line\nend\r\n\t\0", "naïve ☃ 東京 🙂", "".join(map(chr, range(0x250)))])
def test_text_round_trips_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_random_characters_round_trip(tokenizer: Tokenizer) -> None:
    rng = Random(0)
    valid = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for _ in range(50):
        text = "".join(map(chr, rng.choices(valid, k=20)))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_byte_has_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert len({tokenizer.id_to_token(byte) for byte in range(256)}) == 256
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size


def test_marks_are_single_tokens_and_not_text(tokenizer: Tokenizer) -> None:
    for mark, token_id in SPECIALS.items():
        assert tokenizer.encode(f"a{mark}b").ids == [97, token_id, 98]
    assert tokenizer.decode([97, SPECIALS["<|end|>"]]) == "a"


def render(messages: list[dict[str, str]], prompt: bool = True) -> str:
    return jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=prompt)


def test_the_template_renders_what_training_showed(tokenizer: Tokenizer) -> None:
    question = "What is 12 plus 7?"
    assert tokenizer.encode(render([{"role": "user", "content": question}])).ids == chat_prompt(question)


def test_the_template_takes_system_messages_turns_and_unknown_roles() -> None:
    messages = [
        {"role": "developer", "content": "Be brief. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Go on"},
    ]
    expected = "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Yes<|end|><|user|>Go on<|end|>"
    assert render(messages, prompt=False) == expected
    assert render(messages) == expected + "<|assistant|>"


def example_loss(model: Step3Model, token_ids: list[int], is_answer: list[bool]) -> float:
    each = torch.nn.functional.cross_entropy(model(torch.tensor(token_ids[:-1])), torch.tensor(token_ids[1:]), reduction="none")
    return float(each[torch.tensor(is_answer[1:])].sum())


@torch.no_grad()
def test_the_training_forward_equals_the_reference(random_model: Step3Model) -> None:
    rng = Random(1)
    examples = [example(rng, frozenset(), MIX) for _ in range(30)]
    batch: Batch = collate(examples)
    assert len(batch.groups) > 1
    expected = sum(example_loss(random_model, *item) for item in examples) / int(batch.is_answer.sum())
    assert losses(random_model, batch, 0.01).answer.item() == pytest.approx(expected, rel=1e-4)


def test_only_answers_and_their_end_are_marked_in_questions() -> None:
    rng = Random(2)
    for item in (example(rng, frozenset(), MIX._replace(drills=0.0)) for _ in range(200)):
        assert item.token_ids[-1] == SPECIALS["<|end|>"]
        assert item.is_answer[-1]
        assert not item.is_answer[0]
        user = [i for i, token in enumerate(item.token_ids) if token == SPECIALS["<|user|>"]]
        assert not any(item.is_answer[i] for i in user)


def test_the_learning_rate_warms_up_and_falls_to_almost_nothing() -> None:
    last = Stage("", steps=200, examples_per_worker=1, mix=MIX, flat_steps=100, falling_steps=100)
    rates = [rate(step, last) for step in range(last.steps)]
    rise, fall = rates[: last.flat_steps], rates[last.flat_steps :]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] <= 0.01


def test_a_seed_gives_the_same_batches_and_the_same_start() -> None:
    first, second = (next(batches("0 1", MIX, 8)) for _ in range(2))
    assert torch.equal(first.token_ids, second.token_ids)
    assert not torch.equal(first.token_ids[:64], next(batches("0 0", MIX, 8)).token_ids[:64])
    assert torch.equal(begin(3).attention.lm_head.weight, begin(3).attention.lm_head.weight)


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(x))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_weights_are_the_same_after_saving_and_loading(random_model: Step3Model, tmp_path: Path) -> None:
    save(random_model, tmp_path)
    assert ModelConfig.from_directory(tmp_path) == CONFIG
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in random_model.state_dict().items())


def test_accuracy_is_exact_match_of_the_stripped_answer() -> None:
    question = Question("What is 1 plus 2?", "3", "arithmetic")
    replies = [Reply(question, " 3"), Reply(question, "33"), Reply(Question("Repeat this: ab", "ab", "copying"), "ab")]
    assert accuracy(replies) == {"arithmetic": 0.5, "copying": 1.0, "overall": pytest.approx(2 / 3)}


def test_the_bundled_files_stay_under_20_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } == set(files)
    assert sum(files.values()) < 20_000_000


def test_the_bundled_files_are_those_the_code_writes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (BUNDLED / path.name).read_text()
    assert json.loads((BUNDLED / "config.json").read_text()) == CONFIG.to_dict()


@pytest.mark.parametrize("plain", [False, True])
def test_the_bundled_model_answers(plain: bool) -> None:
    model = load(BUNDLED)
    replies = [Reply(item, answer(model, item.question, plain)) for item in fresh_questions(11, 24)]
    assert accuracy(replies)["overall"] >= 0.9


def test_bytes_of_a_prompt_are_its_tokens() -> None:
    assert encode("é") == [0xC3, 0xA9]
