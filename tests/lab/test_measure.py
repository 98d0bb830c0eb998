"""Each meter against a case that can be worked out by hand."""

import time

import pytest
import torch
from torch import nn

from minivid.lab import measure

KB = 1024  # a 16 x 16 float32 tensor


def test_flops_of_a_matrix_product_are_two_per_multiply_add():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert measure.flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_flops_count_only_what_ran():
    a = torch.zeros(8, 8)
    assert measure.flops(lambda: [a @ a for _ in range(3)]) == 3 * measure.flops(lambda: a @ a)


def test_flops_see_the_fused_attention_and_its_backward_pass():
    q, k, v = torch.randn(2, 3, 8, 4, requires_grad=True), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    forward = 4 * 2 * 3 * 8 * 6 * 4  # two products of 8 x 6 x 4 multiply-adds a head
    attend = torch.nn.functional.scaled_dot_product_attention
    assert measure.flops(lambda: attend(q.detach(), k, v)) == forward
    assert measure.flops(lambda: (q @ k.mT).softmax(-1) @ v) == forward
    assert measure.flops(lambda: attend(q, k, v).sum().backward()) == 3.5 * forward  # scores once more, then four products


def test_tied_parameters_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert measure.parameters(nn.Sequential(first, second)) == 16


def test_stored_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    half = torch.zeros(10, dtype=torch.float16)
    assert measure.stored_bytes(tmp_path / "a") == 5
    assert measure.stored_bytes(tmp_path) == 8
    assert measure.stored_bytes(b"12") == 2
    assert measure.stored_bytes({"x": half, "y": [half, half.numpy()]}) == 20 + 20
    assert measure.stored_bytes(nn.Linear(3, 2)) == 4 * (6 + 2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        measure.stored_bytes(tmp_path / "c")
    with pytest.raises(TypeError, match="not object"):
        measure.stored_bytes(object())


def test_peak_of_a_chain_is_two_tensors():
    x, w = torch.zeros(16, 16), torch.zeros(16, 16)

    def chain():
        y = x
        for _ in range(5):  # while the new y is made only the old y is alive
            y = y @ w
        return y

    assert measure.peak(chain) == 2 * KB


def test_peak_keeps_what_is_kept():
    x = torch.zeros(16, 16)
    assert measure.peak(lambda: [x @ x for _ in range(5)]) == 5 * KB


def test_peak_ignores_views_and_in_place_work():
    x = torch.zeros(16, 16)

    def views():
        y = x + 1
        z = y.t().reshape(256)
        y.mul_(2), y[:3].add_(1)
        return y, z

    assert measure.peak(lambda: x.view(4, 64).t()) == 0
    assert measure.peak(lambda: x.mul_(2)) == 0
    assert measure.peak(views) == 2 * KB  # y, and the copy that reshape has to make of y.t()


def test_lives_say_what_was_alive_while_what_ran():
    x, w = torch.zeros(16, 16), torch.zeros(16, 16)

    def work():
        a = x @ w  # 1
        b = a + 1  # 2
        del a
        c = b[:4] * 2  # 3 is the view, 4 the product
        return b.mul_(2), c  # 5

    found = measure.lives(work)
    assert [(one.op, one.shape, one.bytes, one.born, one.died) for one in found] == [
        ("mm", (16, 16), KB, 1, 2), ("add", (16, 16), KB, 2, 5), ("mul", (4, 16), KB // 4, 4, 5)]  # fmt: skip
    assert measure.live_bytes(found) == [KB, 2 * KB, KB, 1.25 * KB, 1.25 * KB]
    assert measure.live_bytes([]) == [] and measure.lives(lambda: x.mul_(2)) == []


def test_the_highest_of_the_live_bytes_is_the_peak():
    model, x = nn.TransformerEncoderLayer(16, 2, 64, 0.0, batch_first=True), torch.randn(2, 9, 16)
    for fn in (lambda: model(x), lambda: torch.autograd.grad(model(x).sum(), model.parameters())):
        assert max(measure.live_bytes(measure.lives(fn))) == measure.peak(fn) > 0


def test_the_profiler_of_torch_sees_the_same_peak_and_what_is_inside_kernels():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False), torch.randn(500, 64)
    assert measure.allocated(lambda: model(x)) == measure.peak(lambda: model(x)) == 4 * 500 * 512
    assert measure.allocated(lambda: x.view(-1)) == 0
    q = torch.randn(1, 1, 64, 8)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert measure.allocated(attend) > measure.peak(attend) == 4 * 64 * (8 + 1)


def test_peak_sees_the_backward_pass():
    w = nn.Parameter(torch.ones(16, 16))

    def forward():
        y = w * 2
        return (y * y).sum()

    assert measure.peak(forward) == 2 * KB + 4  # y, y * y, then the sum while y * y still lives
    assert measure.peak(lambda: forward().backward()) >= 3 * KB  # y is kept, and two gradients meet


def test_saved_bytes_leave_weights_out():
    layer = nn.Linear(16, 16, bias=False)
    x = torch.ones(16, 16)
    assert measure.saved_for_backward(lambda: layer(x)) == KB  # x, for the weight's gradient
    layer.weight.requires_grad_(False)
    assert measure.saved_for_backward(lambda: layer(x)) == 0
    assert measure.saved_for_backward(lambda: layer(layer(x.clone().requires_grad_()))) == 0


def test_saved_storages_count_once():
    w = nn.Parameter(torch.ones(16, 16))
    x = torch.ones(16, 16)
    assert measure.saved_for_backward(lambda: (x @ w, x.t() @ w, x[:4] @ w)) == KB


def test_ratio_on_one_thread_counts_work_and_not_waiting():
    a = torch.randn(200, 200)
    work = lambda: [a @ a for _ in range(30)]
    waits = measure.ratio(lambda: [time.sleep(0.2), work()], work, repeats=5)
    assert waits.threads == 1 and 0.4 < waits.median < 2.5  # some 30 if the wait counted


def test_ratio_of_equal_work_is_about_one_and_of_more_work_is_more():
    a = torch.ones(128, 128)
    same = measure.ratio(lambda: a @ a, lambda: a @ a, repeats=9)
    more = measure.ratio(lambda: [a @ a for _ in range(20)], lambda: a @ a, repeats=9)
    assert len(same.runs) == 9 and same.low <= same.median <= same.high
    assert more.median > 2 * same.median
    assert "9 runs" in str(same)
    with pytest.raises(ValueError, match="at least 5"):
        measure.ratio(lambda: None, lambda: None, repeats=2)
