"""The catalogue: names, sources, and what a wrong name is answered."""

from collections.abc import Callable

import pytest

from afd_ray.planning import catalogue
from afd_ray.planning.accelerators import Figure


def test_the_catalogue_holds_these_accelerators() -> None:
    assert set(catalogue.hardware().accelerators) == {"h800", "h20", "a800", "910b", "l20", "l4", "a100", "h100", "h200", "b200"}


def test_every_figure_has_a_source_that_is_spelled_out() -> None:
    hardware = catalogue.hardware()
    records = [*hardware.accelerators.values(), hardware.achieved]
    used = {value.source for record in records for _, value in record if isinstance(value, Figure)}
    assert used <= set(hardware.sources)
    assert set(hardware.sources) <= used
    assert all(shape.source for shape in catalogue.models().values())


def test_names_are_found_in_any_case() -> None:
    assert catalogue.accelerator("H800") is catalogue.accelerator("h800")


@pytest.mark.parametrize(
    ("lookup", "name", "expected"),
    [(catalogue.model, "step4", "did you mean step3"), (catalogue.accelerator, "h200x", "did you mean h200")],
)
def test_an_unknown_name_is_answered_with_the_nearest(lookup: Callable[[str], object], name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        lookup(name)


def test_without_8_bit_products_bf16_is_used() -> None:
    assert catalogue.accelerator("a800").flops == catalogue.accelerator("a800").bf16_flops == 312e12
    assert catalogue.accelerator("h20").flops == 296e12


def test_a_given_price_replaces_the_catalogues() -> None:
    h20 = catalogue.accelerator("h20")
    assert h20.at_price(1.6).usd_per_flop == 2 * h20.usd_per_flop
