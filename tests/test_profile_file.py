"""Files of stage times: what is none is told in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from afd_ray.simulation.serving import Profile

ATTENTION = {"rows": 1, "context_tokens": 10, "us": 5.0}
FFN = {"rows": 1, "us": 7.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": []}, "attention: Tuple should have at least 1 item"),
        ({"ffn": None}, "ffn: Input should be a valid"),
        ({"attention": [ATTENTION | {"us": -1}]}, "attention.0.us: Input should be greater than 0"),
        ({"attention": [ATTENTION | {"rows": 0}]}, "attention.0.rows: Input should be greater than 0"),
        ({"attention": [ATTENTION, ATTENTION | {"spread": 1}]}, "attention.1.spread: Input should be less than 1"),
        ({"ffn": [FFN | {"spread": "x"}]}, "ffn.0.spread: Input should be a valid number"),
        ({"ffn": [FFN | {"us": float("nan")}]}, "ffn.0.us: Input should be a finite number"),
        (
            {"ffn": [FFN | {"by_layer": [1]}, FFN | {"by_layer": [1, 1]}]},
            "ffn: by_layer must be as long at every point, got 1 and 2",
        ),
        ({"bytes_per_row": 0}, "bytes_per_row: Input should be greater than 0"),
        ({"transfers": []}, "transfers: Extra inputs are not permitted"),
        ({"alone": {"ranks": 2, "ffn": [{"rows": 1}]}}, "alone.ffn.0.us: Field required"),
    ],
)
def test_what_is_no_profile_is_told_in_one_line(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"attention": [ATTENTION], "ffn": [FFN]}))
    assert Profile.read(path).attention_us(1) == (5.0, 0.0)
    path.write_text(json.dumps({"attention": [ATTENTION], "ffn": [FFN]} | changes))
    with pytest.raises(ValueError, match="is no profile of stage times") as caught:
        Profile.read(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_what_is_no_object_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no profile of stage times"):
        Profile.read(path)
