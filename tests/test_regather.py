"""A half for another shard equals the one read from the files, and reads only what was not held."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd_ray.kernels import native
from afd_ray.kernels.packed import PackedFFNLayer, packed_ffn
from afd_ray.kernels.regather import lack, regather
from afd_ray.membership.epoch import Epoch
from afd_ray.models import checkpoint as checkpoint_module
from afd_ray.models.checkpoint import Checkpoint, load_ffn, read_ffn, write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.step3 import FFNHalf, FFNShard, Routed, Slice

CONFIG = replace(PRESETS["step3-tiny"], share_q_dim=64, head_dim=32, hidden_size=64, dtype=torch.bfloat16)
Pack = Callable[[FFNHalf], FFNHalf]

HELD = FFNShard((1, 3, 4), Slice(0, 2), Slice(1, 4), first_id=2)
WANTED = {
    "the same": HELD,
    "the same elsewhere": HELD._replace(first_id=7, at_home=True),
    "fewer": HELD._replace(experts=(3,)),
    "more": HELD._replace(experts=(0, 1, 3, 4, 7)),
    "others, other dense part": HELD._replace(experts=(2, 4, 5), dense=Slice(0, 1)),
    "another slice": HELD._replace(routed=Slice(1, 2)),
    "another slice and dense part": HELD._replace(routed=Slice(0, 1), dense=Slice(0, 1)),
}
MISSING = {
    "more": (0, 7),
    "others, other dense part": (2, 5),
    "another slice": (1, 3, 4),
    "another slice and dense part": (1, 3, 4),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, CONFIG, random_tensors(CONFIG, seed=0))
    return Checkpoint.open(directory)


def plain(half: FFNHalf) -> FFNHalf:
    return half


@pytest.mark.parametrize("pack", [plain, packed_ffn])
@pytest.mark.parametrize("name", WANTED)
def test_equal_to_a_half_read_from_the_files(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, pack: Pack
) -> None:
    if pack is packed_ffn and not native.available():
        pytest.skip("no kernels for this CPU")
    held, wanted = pack(load_ffn(checkpoint, HELD)), WANTED[name]
    read: set[tuple[str, tuple[int, ...] | None]] = set()
    original = checkpoint_module._read
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_module,
            "_read",
            lambda file, part, *how: (read.add((part.parameter, part.experts)), original(file, part, *how))[1],
        )
        half = regather(held, wanted, lambda shard, dense: read_ffn(checkpoint, shard, CONFIG.dtype, dense=dense))
    reference = pack(load_ffn(checkpoint, wanted))
    ours, theirs = dict(half.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    missing = MISSING.get(name, ())
    assert lack(HELD, wanted).experts == missing
    assert {experts for _, experts in read if experts is not None} == ({missing} if missing else set())
    assert any(experts is None for _, experts in read) == (wanted.dense != HELD.dense)
    assert isinstance(half.layers[0], PackedFFNLayer) == (pack is packed_ffn)
    assert half.shard == wanted
    hidden, ids = torch.randn(9, CONFIG.hidden_size).bfloat16(), torch.randint(wanted.first_id + 5, (9, 3))
    for layer in range(CONFIG.num_hidden_layers):
        routed = Routed(hidden, ids, torch.rand(9, 3).bfloat16()) if CONFIG.is_moe(layer) else Routed(hidden, None, None)
        assert torch.equal(half(layer, routed), reference(layer, routed))


def test_what_is_equal_is_shared_and_what_is_served_stays_as_it_is(checkpoint: Checkpoint) -> None:
    held = load_ffn(checkpoint, HELD)
    before = {name: tensor.clone() for name, tensor in held.named_parameters()}
    half = regather(held, WANTED["fewer"], lambda shard, dense: read_ffn(checkpoint, shard, CONFIG.dtype, dense=dense))
    addresses = {tensor.data_ptr() for tensor in held.parameters()}
    shared = [name for name, tensor in half.named_parameters() if tensor.data_ptr() in addresses]
    assert shared == [name for name, _ in half.named_parameters() if ".moe." not in name]
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.named_parameters())


def test_from_shape_to_shape_only_the_experts_that_must_move_do() -> None:
    def moved(old: Epoch, new: Epoch) -> list[int]:
        pairs = zip(old.ffn_ranks, new.ffn_ranks, strict=False)
        return [len(lack(old.shard(a, CONFIG), new.shard(b, CONFIG)).experts) for a, b in pairs]

    assert moved(Epoch(1, 1, 1, 1, 1), Epoch(2, 1, 1, 2, 1)) == [0]
    assert moved(Epoch(1, 1, 1, 2, 1), Epoch(2, 1, 1, 1, 1)) == [4]
    assert moved(Epoch(1, 1, 1, 4, 1), Epoch(2, 1, 1, 3, 1)) == [0, 1, 2]
