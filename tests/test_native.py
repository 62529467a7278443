"""Kernels of our own: products and attention against plain formulas, rows that never see each other, other machines."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory import native
from accessory.model import Cache
from accessory.model.pointwise import rms_norm, swiglu
from accessory.model.rope import Rope, rotate
from accessory.native import building

here = pytest.mark.skipif(not native.available(), reason="this processor does not multiply bf16, or there is no g++")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@here
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (100, 34), (130, 768), (5, 1), (3, 7), (192, 130)])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 16, 100])
def test_a_product_is_the_plain_one_rounded_once(outputs: int, inputs: int, rows: int) -> None:
    torch.manual_seed(0)
    weight, x, bias = drawn(outputs, inputs), drawn(rows, inputs), drawn(outputs)
    packed, exact = native.Packed(weight), x.double() @ weight.double().T
    size = (x.double().abs() @ weight.double().abs().T) * 2**-20  # what fp32 sums may lose
    for y, expected in ((packed(x), exact), (packed(x, bias), exact + bias.double())):
        assert y.dtype == torch.bfloat16
        assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + size).all()


@here
def test_a_row_of_a_product_is_the_same_alone_and_among_others() -> None:
    torch.manual_seed(0)
    packed, x = native.Packed(drawn(200, 96)), drawn(3, 41, 96)
    whole = packed(x)
    assert whole.shape == (3, 41, 200)
    assert all(torch.equal(packed(x[:, at]), whole[:, at]) for at in range(41))
    assert torch.equal(packed(x.transpose(0, 1)).transpose(0, 1), whole)
    assert torch.equal(packed(torch.cat([x, x], -1)[..., :96]), whole)


@here
def test_no_rows_give_no_rows_and_other_numbers_are_refused() -> None:
    packed = native.Packed(drawn(20, 32))
    assert packed(drawn(0, 32)).shape == (0, 20) and packed(drawn(32)).shape == (20,)
    with pytest.raises(AssertionError, match="no kernel for"):
        packed(torch.zeros(2, 32))
    with pytest.raises(AssertionError, match="no kernel for"):
        packed.float()(torch.zeros(2, 32))


@here
def test_a_place_beyond_the_cache_is_refused_before_a_kernel_sees_it() -> None:
    cache = Cache(1, rows=2, size=16, kv_heads=2, head_dim=32, device="cpu", dtype=torch.bfloat16)
    assert cache.by_row
    for rows, positions in ((None, [[16]]), (None, [[1], [1], [1]]), (torch.tensor([2]), [[1]])):
        with pytest.raises(AssertionError, match="of 16 positions"):
            cache.place(rows, torch.tensor(positions))


def plain(q: Tensor, keys: Tensor, values: Tensor, last: int, window: int | None) -> Tensor:
    """One query [H, D] over keys and values [G, S, D], in doubles."""
    first = 0 if window is None else max(0, last - window + 1)
    each = len(q) // len(keys)
    k, v = (x[:, first : last + 1].double().repeat_interleave(each, 0) for x in (keys, values))
    p = ((k @ q.double().unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5).softmax(-1)
    return (p.unsqueeze(1) @ v).flatten()


@here
@pytest.mark.parametrize(
    ("width", "heads", "groups", "window"), [(64, 12, 12, None), (128, 8, 2, None), (32, 4, 1, 7), (96, 6, 3, 100)]
)
def test_attention_over_rows_is_the_formula(width: int, heads: int, groups: int, window: int | None) -> None:
    torch.manual_seed(0)
    q, keys, values = drawn(5, 1, heads, width), drawn(8, groups, 301, width), drawn(8, groups, 301, width)
    positions, rows = torch.tensor([[0], [5], [299], [-1], [63]]), torch.tensor([7, 0, 3, 3, 1])
    y = native.attend(q, keys, values, positions, rows, window)
    assert y.shape == (5, 1, heads * width) and not y[3].any()
    for at in (0, 1, 2, 4):
        expected = plain(q[at, 0], keys[rows[at]], values[rows[at]], int(positions[at]), window)
        assert (y[at, 0].double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    alone = native.attend(q[2:3], keys, values, positions[2:3], rows[2:3], window)
    assert torch.equal(alone, y[2:3])
    assert torch.equal(native.attend(q[:1], keys[7:], values[7:], positions[:1], None, window), y[:1])


@here
@pytest.mark.parametrize(
    ("width", "heads", "groups", "window"), [(64, 4, 4, None), (128, 8, 2, 37), (32, 4, 1, 7), (96, 3, 3, None)]
)
@pytest.mark.parametrize("length", [9, 12, 100, 131])
def test_attention_of_many_tokens_is_the_formula(width: int, heads: int, groups: int, window, length: int) -> None:
    torch.manual_seed(0)
    q, keys, values = drawn(3, length, heads, width), drawn(5, groups, 180, width), drawn(5, groups, 180, width)
    starts, rows = torch.tensor([0, 17, 40]), torch.tensor([4, 0, 2])
    positions = starts[:, None] + torch.arange(length)
    positions[1, 5:] = -1
    keys[:, :, 172:] = values[:, :, 172:] = float("nan")  # what lies behind is not even multiplied by nothing
    if window is not None and length < 20:
        keys[2, :, : 40 - window] = values[2, :, : 40 - window] = float("nan")  # nor what lies before
    y = native.attend(q, keys, values, positions, rows, window)
    assert y.shape == (3, length, heads * width) and not y[1, 5:].any()
    for at in range(3):
        for token in range(5 if at == 1 else length):
            expected = plain(q[at, token], keys[rows[at]], values[rows[at]], int(positions[at, token]), window)
            assert (y[at, token].double() - expected).abs().max() <= 2**-7 * expected.abs().max()


@here
def test_a_few_tokens_of_a_row_see_what_each_would_see_alone() -> None:
    torch.manual_seed(0)
    q, keys, values = drawn(2, 3, 4, 64), drawn(4, 2, 50, 64), drawn(4, 2, 50, 64)
    positions, rows = torch.tensor([[10, 11, 12], [40, 41, -1]]), torch.tensor([2, 0])
    y = native.attend(q, keys, values, positions, rows)
    for at in range(3):
        alone = native.attend(q[:, at : at + 1], keys, values, positions[:, at : at + 1], rows)
        assert torch.equal(alone, y[:, at : at + 1])


@here
def test_what_is_no_number_stays_so_in_its_row_alone() -> None:
    torch.manual_seed(0)
    q, keys, values = drawn(2, 1, 2, 32), drawn(2, 2, 40, 32), drawn(2, 2, 40, 32)
    keys[0, 1, 3, 0] = float("nan")
    values[1, :, 30:] = float("inf")  # behind what is read
    y = native.attend(q, keys, values, torch.tensor([[20], [20]]))
    assert y[0, 0, 32:].isnan().all() and y[0, 0, :32].isfinite().all() and y[1].isfinite().all()


@here
def test_scores_that_lie_far_apart_overflow_nowhere() -> None:
    q = torch.full((1, 1, 1, 32), 100.0).bfloat16()
    keys = torch.stack([torch.full((32,), sign * 100.0) for sign in (-1.0, 1.0, 0.0)])[None, None].bfloat16()
    values = torch.stack([torch.full((32,), number) for number in (1.0, 2.0, 3.0)])[None, None].bfloat16()
    assert native.attend(q, keys, values, torch.tensor([[2]])).eq(2.0).all()


@here
def test_heads_of_other_widths_are_left_to_torch() -> None:
    assert native.attends(drawn(1, 1, 8, 64)) and not native.attends(drawn(1, 1, 8, 80))
    assert not native.attends(torch.zeros(1, 1, 8, 64))


@here
def test_what_is_stored_lies_at_its_positions_and_padding_in_the_last_slot() -> None:
    torch.manual_seed(0)
    joined = drawn(2, 3, 5 * 32)
    k, v = (part.unflatten(-1, (2, 32)) for part in joined.split([64, 64, 32], -1)[:2])
    positions, rows = torch.tensor([[4, 5, 6], [0, 1, -1]]), torch.tensor([3, 1])
    for places in (rows, None):
        keys, values = drawn(4, 2, 9, 32), drawn(4, 2, 9, 32)
        expected = []
        for tensor, new in ((keys.clone(), k), (values.clone(), v)):
            tensor[(torch.arange(2) if places is None else places)[:, None], :, positions] = new
            expected.append(tensor)
        native.store(k, v, keys, values, positions, places)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


@here
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 600)])
def test_norm_gate_and_rotation_are_the_models_formulas(shape: tuple[int, int], monkeypatch) -> None:
    torch.manual_seed(0)
    x, weight, both = drawn(*shape, 96) * 3, drawn(96), drawn(*shape, 160) * 4
    gate, up = both.split(80, -1)
    heads, turns = drawn(*shape, 160)[..., 32:].unflatten(-1, (4, 32)), Rope(32, 10000.0)(torch.arange(shape[1])[None])
    with torch.inference_mode():
        ours = rms_norm(x, weight, 1e-5), swiglu(gate, up), rotate(heads, turns)
        monkeypatch.setattr(native, "serves", lambda x: False)
        plain = rms_norm(x, weight, 1e-5), swiglu(gate, up), rotate(heads, turns)
    for one, other in zip(ours, plain, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        far = (one.float() - other.float()).abs() > 2**-7 * other.float().abs()  # another rounding, then another one
        assert not far.any()
        assert (one != other).float().mean() < 0.01


@here
def test_a_gate_far_out_is_open_or_shut_and_no_number_stays_none() -> None:
    gate = torch.tensor([300.0, -300.0, float("nan"), 0.0] * 4).bfloat16()
    y = native.swiglu(gate[None], torch.ones(1, 16).bfloat16())[0]
    assert y[0] == 300 and y[1].abs() < 1e-30 and y[2].isnan() and y[3] == 0
    assert native.norm(gate[None], torch.ones(16).bfloat16(), 1e-5).isnan().all()


@here
@pytest.mark.parametrize("rows", [(1, 3), (2, 700)])
def test_gradients_are_those_of_the_formulas_in_fp32(rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight, gate, up = drawn(*rows, 96) * 3, drawn(96), drawn(*rows, 96) * 4, drawn(*rows, 96)
    heads, turns = drawn(*rows, 3, 32), Rope(32, 10000.0)(torch.arange(rows[1])[None])
    cases = [
        (lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight)),
        (swiglu, (gate, up)),
        (lambda heads: rotate(heads, turns), (heads,)),
    ]
    for formula, given in cases:
        ours, exact = (
            [t.detach().to(dtype).requires_grad_() for t in given] for dtype in (torch.bfloat16, torch.float32)
        )
        dy = drawn(*formula(*exact).shape)
        formula(*ours).backward(dy)
        formula(*exact).backward(dy.float())
        for one, other in zip(ours, exact, strict=True):
            wrong = (one.grad.float() - other.grad).abs()
            assert one.grad.dtype == torch.bfloat16
            assert (wrong <= 2**-8 * other.grad.abs() + 2**-18 * other.grad.abs().max()).all()


@here
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_reaches_either_input_where_the_other_one_is_frozen(which: int) -> None:
    torch.manual_seed(0)
    for formula, given in (
        (lambda x, weight: rms_norm(x, weight, 1e-5), (drawn(4, 32), drawn(32))),
        (swiglu, (drawn(4, 32), drawn(4, 32))),
    ):
        both = [t.clone().requires_grad_() for t in given]
        formula(*both).sum().backward()
        one = [t.clone().requires_grad_(at == which) for at, t in enumerate(given)]
        formula(*one).sum().backward()
        assert torch.equal(one[which].grad, both[which].grad) and one[1 - which].grad is None


@here
def test_they_are_called_for_bf16_in_whole_registers_alone() -> None:
    x = drawn(2, 32)
    assert native.serves(x) and not native.serves(x.float()) and not native.serves(x[:, :10])


@pytest.mark.parametrize("numbers", [3, 5 << 20])
def test_memory_in_huge_pages_is_zero_and_writable(numbers: int) -> None:
    tensor = native.zeros((2, numbers), dtype=torch.bfloat16)
    assert tensor.shape == (2, numbers) and not tensor.any()
    tensor[1, -1] = 2
    assert tensor.sum() == 2


def test_what_is_widened_keeps_its_numbers_and_may_go_meanwhile() -> None:
    kept, gone = (native.zeros([9 << 20], dtype=torch.int32) for _ in range(2))
    kept.copy_(torch.arange(9 << 20))
    for tensor in (gone, kept, torch.zeros(3)):
        native.widen(tensor)
    del gone, tensor
    native.widened()
    assert torch.equal(kept, torch.arange(9 << 20))


def test_where_there_is_no_room_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*how: int, **more: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        native.zeros([1 << 50], dtype=torch.float32)
    assert not native.zeros([1 << 20], dtype=torch.float32).any()


def test_processors_are_told_apart() -> None:
    able = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
    assert building.suits(able) == (building.platform.machine() == "x86_64")
    assert not building.suits(able - {"avx512_bf16"}) and not building.suits(able | {"amx_bf16"})


def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **environment: str) -> object:
    """What a fresh process would open, with an empty cache."""
    monkeypatch.setattr(building, "suits", lambda flags: True)
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    return building.library.__wrapped__()


def test_without_a_compiler_a_line_says_so_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tried(monkeypatch, tmp_path, CXX="no-such-compiler") is None
    assert "no kernels of our own, torch's are slower here: no-such-compiler: got no such compiler" in caplog.text


def test_what_does_not_compile_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels.cpp").write_text("this is not C++\n")
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    assert tried(monkeypatch, tmp_path / "cache") is None
    assert "no kernels of our own" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "accessory").write_text("in the way\n")
    assert tried(monkeypatch, tmp_path) is None
    assert "no kernels of our own" in caplog.text


def test_without_a_home_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tried(monkeypatch, tmp_path, XDG_CACHE_HOME="") is None
    assert "Could not determine home directory" in caplog.text


@here
def test_what_another_system_left_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    building.built(building.SOURCES).write_bytes(b"not a library")
    assert tried(monkeypatch, tmp_path) is not None


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tried(monkeypatch, tmp_path, ACCESSORY_NATIVE="0") is None


@here
def test_they_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = building.built(building.SOURCES)
    assert made.parent == tmp_path / "accessory" / "native" and list(made.parent.iterdir()) == [made]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert building.built(building.SOURCES) == made


@here
def test_they_run_on_torchs_threads() -> None:
    """A second OpenMP library would have threads of its own, which wait beside torch's."""
    code = """
import torch
from accessory import native
w = torch.randn(64, 64).bfloat16()
(w @ w, native.Packed(w)(w))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
