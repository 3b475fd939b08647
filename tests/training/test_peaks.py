"""The denominator of model FLOPs utilisation: datasheets by the driver's name of a card, and a measured figure that says so."""

import pytest
import torch

from overtok_megatron.training import peaks
from overtok_megatron.training.peaks import datasheet, peak_flops

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A10", 125.0, 31.2),
        ("NVIDIA A10G", 70.0, 35.0),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_cards_are_known_by_the_name_that_the_driver_gives(name: str, bfloat16: float, float32: float) -> None:
    assert datasheet(name, torch.bfloat16) == bfloat16 * 1e12
    assert datasheet(name, torch.float32) == float32 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A1000",
    ],
)
def test_another_card_with_a_similar_name_gets_no_figure(name: str) -> None:
    assert datasheet(name, torch.bfloat16) is None


def test_a_known_card_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak = peak_flops(CUDA, torch.bfloat16)
    assert (peak.flops, peak.source) == (989.4e12, "datasheet of NVIDIA H100 80GB HBM3, dense bfloat16")


def test_an_unknown_card_is_measured_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(peaks, "measured", lambda device, dtype: 3e12)
    peak = peak_flops(CUDA, torch.float32)
    assert (peak.flops, peak.source) == (3e12, "measured float32 product: no datasheet figure for Tesla T4")


def test_a_cpu_is_measured() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak.source == "measured float32 product on this CPU"
    assert 1e8 < peak.flops < 1e14
