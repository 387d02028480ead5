"""What members must agree on."""

from dataclasses import replace

import pytest
import torch

from afd_ray.membership.contract import check_same_model, check_same_versions, contract_digest
from afd_ray.membership.epoch import Epoch

EPOCH = Epoch(7, 2, 1, 2, 3)


def test_the_digest_sees_model_epoch_and_wire() -> None:
    digests = {
        contract_digest(1, EPOCH, torch.float32),
        contract_digest(2, EPOCH, torch.float32),
        contract_digest(1, replace(EPOCH, number=8), torch.float32),
        contract_digest(1, replace(EPOCH, attention=3), torch.float32),
        contract_digest(1, EPOCH, torch.bfloat16),
        contract_digest(1, EPOCH, torch.float8_e4m3fn),
    }
    assert len(digests) == 6
    assert contract_digest(1, EPOCH, torch.float32) in digests


def test_the_actor_with_another_checkpoint_is_named() -> None:
    check_same_model({"attention-0": 5, "ffn-1": 5})
    with pytest.raises(ValueError, match=r"most actors loaded 0+5, but not ffn-1 \(0+6\)"):
        check_same_model({"attention-0": 5, "ffn-1": 6, "ffn-2": 5})


def test_the_actor_with_another_version_is_named() -> None:
    same = {"afd-ray": "0.1.0", "torch": "2.13.0"}
    check_same_versions({"attention-0": same, "ffn-1": same})
    with pytest.raises(ValueError, match=r"different versions of torch: most actors run 2.13.0, but not ffn-2 \(2.11.0\)"):
        check_same_versions({"attention-0": same, "ffn-1": same, "ffn-2": {**same, "torch": "2.11.0"}})
    with pytest.raises(ValueError, match=r"different versions of torch: .* \(none\)"):
        check_same_versions({"attention-0": same, "ffn-1": {"afd-ray": "0.1.0"}})
