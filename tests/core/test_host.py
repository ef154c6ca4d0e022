"""Host-side stores."""

from __future__ import annotations

import os

import pytest
import torch

from tightfit.core.host import is_mapped, to_host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_store_holds_the_values_outside_the_allocator(dtype):
    values = torch.arange(12).reshape(3, 4).to(dtype)
    home = to_host(values)
    assert is_mapped(home)
    assert not is_mapped(values)
    assert torch.equal(home, values)
    assert home.shape == values.shape
    home[0, 0] = 7
    assert values[0, 0] == 0


def test_no_file_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = to_host(torch.ones(5))
    assert not list(tmp_path.iterdir())
    assert home.sum() == 5


@pytest.mark.parametrize("call", ["os.posix_fallocate", "torch.from_file"])
def test_without_room_it_is_an_ordinary_copy(call, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(call, fail)
    home = to_host(torch.ones(5))
    assert not is_mapped(home)
    assert home.sum() == 5
    assert not list(tmp_path.iterdir())


def test_tensors_without_values_stay():
    meta = torch.empty(3, device="meta")
    assert to_host(meta).is_meta
    assert to_host(torch.empty(0, 4)).shape == (0, 4)
