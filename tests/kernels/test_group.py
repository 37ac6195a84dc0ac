import pytest
import torch
import triton
import triton.language as tl

from penstock.kernels.update.group import bag_of


@triton.jit
def _bags(out, offsets, num_bags, num_keys, KEYS: tl.constexpr):
    position = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    is_key = position < num_keys
    tl.store(out + position, bag_of(offsets, num_bags, num_keys, position, is_key), mask=is_key)


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [7],
        [3] * 50,
        [0] * 40 + [90],
        [90] + [0] * 40,
        [0, 0, 5, 0, 1, 0, 0, 84, 0],
        [1] * 30 + [200] + [1] * 30,
        *(
            torch.arange(300).mul(rate).frac().mul(3 * rate).int().tolist()
            for rate in (0.7, 2.3, 9.1)
        ),
    ],
    ids=lambda sizes: f"{sum(sizes)} keys in {len(sizes)} bags",
)
def test_bag_of_a_key(sizes, device):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    num_keys = int(offsets[-1])
    out = torch.full((num_keys,), -1, dtype=torch.int32, device=device)
    grid = (triton.cdiv(num_keys, 64),)
    _bags[grid](out, offsets.to(device), len(sizes), num_keys, KEYS=64)
    want = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert torch.equal(out.cpu().long(), want)
