"""The published laws against the values published with them."""

import math

import pytest

from megatron_mm1.config.derived import padded_vocab_size
from megatron_mm1.config.laws import law_parameters, peak_learning_rate, swiglu_ffn_size


@pytest.mark.parametrize(
    ("num_parameters", "published"),
    [
        (9.4e6, 6.6e-4),
        (85e6, 2.6e-4),
        (302e6, 1.5e-4),
        (1.2e9, 8.6e-5),
        (2.9e9, 5.9e-5),
        (6.4e9, 4.2e-5),
        (30e9, 2.2e-5),
    ],
)
def test_learning_rate_law_gives_the_published_rates_to_their_two_digits(
    num_parameters: float, published: float
) -> None:
    assert float(f"{peak_learning_rate(num_parameters):.1e}") == published


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "published"),
    [(3, 512, "9.4e+06"), (12, 768, "8.5e+07"), (24, 1024, "3.0e+08"), (24, 2048, "1.2e+09"), (26, 3072, "2.9e+09")],
)
def test_law_counts_twelve_l_d_squared(num_layers: int, hidden_size: int, published: str) -> None:
    assert f"{law_parameters(num_layers, hidden_size):.1e}" == published


@pytest.mark.parametrize(("log_of_size", "log_of_rate"), [(0, -0.5535), (10, -4.7675)])
def test_learning_rate_law_has_the_published_coefficients(log_of_size: int, log_of_rate: float) -> None:
    """To all their digits, of which rates of two digits show two or three."""
    assert math.log(peak_learning_rate(math.exp(log_of_size))) == pytest.approx(log_of_rate, abs=1e-6)


@pytest.mark.parametrize("num_parameters", [0, -1])
def test_learning_rate_of_nothing_is_refused(num_parameters: int) -> None:
    with pytest.raises(ValueError, match=f"positive, not {num_parameters}"):
        peak_learning_rate(num_parameters)


@pytest.mark.parametrize(("hidden_size", "ffn"), [(512, 1536), (768, 2048), (1024, 2816), (2048, 5632), (4096, 11008)])
def test_swiglu_width_is_eight_thirds_rounded_up(hidden_size: int, ffn: int) -> None:
    """4096 -> 11008 is Llama 7B's published width."""
    assert swiglu_ffn_size(hidden_size) == ffn


def test_swiglu_width_is_the_next_multiple_asked_for() -> None:
    assert swiglu_ffn_size(4096, multiple=64) == 171 * 64


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8, 16])
def test_padded_vocabulary_is_the_same_in_every_power_of_two_layout(tensor_parallel: int) -> None:
    assert padded_vocab_size(32001, tensor_parallel) == 32128


def test_padded_vocabulary_divides_by_any_tensor_parallel_size() -> None:
    assert padded_vocab_size(32000, 7) % 7 == 0
