import pytest
import torch

from penstock.kernels.update.sort import MOST_COUNTED, sort_words


def check(words):
    ordered, order = sort_words(words)
    expected = torch.sort(words, stable=True)
    assert torch.equal(ordered, expected.values)
    assert torch.equal(order.long(), expected.indices)


@pytest.mark.parametrize("num", [0, 1, 63, 1000])
def test_equal_words_stay_in_order(num, device):
    generator = torch.Generator().manual_seed(num)
    words = torch.randint(-2, 40, (num,), generator=generator).int()
    words[num // 2 : num // 2 + 3] = 2**31 - 1
    check(words.to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("num", [MOST_COUNTED - 1, MOST_COUNTED, MOST_COUNTED + 1, 1 << 21])
def test_many_words(num, device):
    check(torch.randint(-5, num // 3, (num,), device=device).int())
