"""tools/image_pins.py: what an image with a torch of its own keeps, and what is installed from the lock."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "image_pins.py"
SPEC = importlib.util.spec_from_file_location("image_pins", TOOL)
assert SPEC and SPEC.loader
image_pins = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(image_pins)

LOCK = ["# Exact versions", "numpy==2.5.5", "torch==2.11.0", "tqdm==4.70.1", image_pins.EXTRAS_HEADER, "pytest==9.2.0"]
REQUIREMENTS = ["numpy>=2.0", "torch>=2.11", "tqdm>=4.67"]
TORCH = {"torch": "2.11.0a0+3f2c1d.nv26.03"}


@pytest.mark.parametrize(
    ("installed", "extras", "pins"),
    [
        ({**TORCH}, False, ["numpy==2.5.5", "tqdm==4.70.1"]),
        ({**TORCH}, True, ["numpy==2.5.5", "tqdm==4.70.1", "pytest==9.2.0"]),
        ({**TORCH, "numpy": "2.1.0", "tqdm": "4.68"}, False, []),
        ({**TORCH, "numpy": "1.26.4", "tqdm": "4.68"}, False, ["numpy==2.5.5"]),
    ],
    ids=["bare", "with extras", "what the image has stays", "too old is replaced"],
)
def test_pins(installed: dict[str, str], extras: bool, pins: list[str]) -> None:
    assert image_pins.missing_pins(LOCK, REQUIREMENTS, installed, extras=extras) == pins


@pytest.mark.parametrize("installed", [{}, {"torch": "2.10.0a0+b4e4ee81d3"}], ids=["none", "too old"])
def test_an_image_whose_torch_does_not_do_is_refused(installed: dict[str, str]) -> None:
    with pytest.raises(image_pins.ImageError, match=r"torch>=2.11 is needed: choose another BASE"):
        image_pins.missing_pins(LOCK, REQUIREMENTS, installed)


def test_the_lock_has_both_parts() -> None:
    lock = (TOOL.parent.parent / "requirements.lock").read_text().splitlines()
    training = {name for name, _ in image_pins.locked(lock, extras=False)}
    everything = {name for name, _ in image_pins.locked(lock, extras=True)}
    assert {"torch", "megatron-core", "sentencepiece"} <= training
    assert {"pytest", "transformers", "moto"} <= everything - training
