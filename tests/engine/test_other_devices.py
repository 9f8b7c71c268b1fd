"""Accelerators that are not NVIDIA's: torch's row kernels, and no product that adds to a wider sum."""

import pytest
import torch

from chunked_ce import ChunkOptions, checks, devices
from chunked_ce.plan import predict_memory
from chunked_ce.rows import backend, torch_rows

SHAPE = {"num_tokens": 4096, "vocab_size": 32768, "hidden_size": 256, "dtype": torch.bfloat16}


@pytest.fixture
def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rocm(dtype, rocm):
    """It calls its devices "cuda"."""
    device = torch.device("cuda")
    assert backend.row_kernels("auto", device, dtype) is torch_rows
    assert not devices.adds_in_product("cuda", torch.float32, dtype)
    with pytest.raises(ValueError, match=r"options\.backend='triton' cannot run here: .*(ROCm|float64)"):
        checks.check_backend(ChunkOptions(backend="triton"), device, dtype)


def test_memory_on_rocm(monkeypatch):
    """The law counts the rows in flight, and a product that waits to be added."""
    options = ChunkOptions(chunk_size=512)
    on_nvidia = predict_memory(**SHAPE, options=options, device_type="cuda").forward
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    on_rocm = predict_memory(**SHAPE, options=options, device_type="cuda").forward
    assert on_rocm["rows"] > on_nvidia["rows"] and on_rocm["products"] > on_nvidia["products"]


@pytest.mark.parametrize("device_type", ["xpu", "mps", "hpu", "privateuseone"])
def test_other_accelerators(device_type):
    device = torch.device(device_type)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.row_kernels("auto", device, dtype) is torch_rows
        assert not devices.adds_in_product(device_type, torch.float32, dtype)
    with pytest.raises(ValueError, match=f"runs on CUDA devices .*, not on '{device_type}'"):
        checks.check_backend(ChunkOptions(backend="triton"), device, torch.bfloat16)
    law = predict_memory(**SHAPE, options=ChunkOptions(chunk_size=512), device_type=device_type).forward
    assert law["rows"] > 0 and law["products"] > 0


@pytest.mark.parametrize(("capability", "has_bf16"), [((7, 5), False), ((8, 0), True)])
def test_older_devices_of_nvidia(capability, has_bf16, monkeypatch):
    """Before sm_80 cuBLAS refuses products of bf16 with an output in fp32."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(devices, "_least_capability", lambda: capability)
    assert devices.adds_in_product("cuda", torch.float32, torch.bfloat16) == has_bf16
    assert devices.adds_in_product("cuda", torch.float32, torch.float16)
