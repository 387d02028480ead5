"""A backend without an engine, and a byte-level tokenizer, for the tests of the HTTP interface."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import BPE

from actors.http.app import Options, create_app
from actors.http.backend import ModelCard
from afd_ray.metrics import Sample
from afd_ray.request import FinishReason, Request, TokenOutput
from afd_ray.text import Tokenizer

VOCAB_SIZE = 300
MAX_CONTEXT = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message.role not in ('system', 'user', 'assistant') %}\n"
    "        {{ raise_exception('unknown role ' + message.role) }}\n"
    "    {% endif %}\n"
    "{{ message.role[0] }}:{{ message.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def write_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level vocabulary: 256 bytes, then 'ab' and ' the' as merges, then special <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    merges = [("a", "b"), ("\u0120", "t"), ("\u0120t", "h"), ("\u0120th", "e")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = HuggingFaceTokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_ids(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """One token a byte, so that a test can split characters and stop strings anywhere."""
    ids = {tokenizer.token_bytes(index): index for index in range(256)}
    return [ids[bytes([byte])] for byte in text]


class FakeBackend:
    """Answers every request with `reply` (token ids), then the end token; `gate` lets one token pass at a time when it is given."""

    def __init__(self, tokenizer: Tokenizer | None, reply: list[int], *, end: int = 0) -> None:
        self.model = ModelCard("fake", MAX_CONTEXT, VOCAB_SIZE, tokenizer, created=1_700_000_000)
        self.reply = reply
        self.end = end
        self.is_ready = True
        self.stopping = False
        self.gate: asyncio.Semaphore | None = None
        self.failure: Exception | None = None
        self.fail_choice: int | None = None
        self.fail_after = 0
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.changed = asyncio.Event()

    def ready(self) -> bool:
        return self.is_ready

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        self.requests.append(request)
        self.live.add(request.id)
        self.changed.set()
        finished = False
        try:
            for output in self._outputs(request):
                if self._fails(request, output):
                    raise self.failure or RuntimeError("planted")
                if self.gate is not None:
                    await self.gate.acquire()
                finished = output.finish_reason is not None
                yield output
        finally:
            self.live.discard(request.id)
            if not finished:
                self.aborted.append(request.id)
            self.changed.set()

    def _fails(self, request: Request, output: TokenOutput) -> bool:
        if self.failure is None or (self.fail_choice is not None and not request.id.endswith(f"-{self.fail_choice}")):
            return False
        self.fail_after -= 1
        return self.fail_after < 0

    def _outputs(self, request: Request) -> list[TokenOutput]:
        params = request.params
        ids = [*self.reply, self.end][: params.max_tokens]
        outputs = []
        for position, token_id in enumerate(ids):
            last = position == len(ids) - 1
            reason: FinishReason | None = ("stop" if position == len(self.reply) else "length") if last else None
            alternatives = [(token_id, -0.5), ((token_id + 1) % 256, -1.5), ((token_id + 2) % 256, float("-inf"))]
            top = tuple(alternatives[: params.logprobs or 0])
            logprob = None if params.logprobs is None else -0.5
            outputs.append(TokenOutput(request.id, token_id, logprob, top, reason))
        return outputs

    async def until(self, condition: Any) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def status(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("tpot_ms", "ttft_ms", "last_resize"))
        actors: dict[str, Any] = {"attention": [], "ffn": [], "placement_groups": [], "stages_us": {}}
        return {"state": "ready", "epoch": 1, "model": self.model.name} | actors | nothing

    async def scale(self, wanted: dict[str, Any]) -> dict[str, Any]:
        outcome = "rolled_back" if wanted.get("cancel") else "committed"
        return {"outcome": outcome, "reason": None, "pause_ms": 1.0, "total_s": 2.0, "to": wanted}

    async def decisions(self, after: int) -> dict[str, Any]:
        return {"policy": "balance", "decisions": [{"number": after + 1}]}

    async def measured(self) -> dict[str, Any]:
        return {"epoch": 1, "facts": {}, "attention": {}}

    async def rebalance(self) -> dict[str, Any]:
        return {"epoch": 2, "experts": [[0, 1], [1, 2]]}

    async def trace(self, steps: int) -> dict[str, Any]:
        return {"traceEvents": [], "steps": steps}

    async def metrics(self) -> list[Sample]:
        return [Sample("afd_requests_running", {"actor": "attention-0"}, float(len(self.live)))]


def connected(backend: FakeBackend, options: Options | None = None) -> httpx.AsyncClient:
    """A client of the HTTP interface in this process."""
    transport = httpx.ASGITransport(create_app(backend, options), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://ingress")
