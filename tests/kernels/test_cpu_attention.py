"""The C++ twins of paged attention and cache writes against the references, and how twins are built."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from specialize.kernels import cpu, cpu_attention
from specialize.kernels.attention_decode import attention_paged, attention_paged_reference
from specialize.kernels.kv_write import kv_write, kv_write_reference

needs_compiler = pytest.mark.skipif(cpu.find_compiler() is None, reason="no C++ compiler")
HEADS = [(9, 3, 64), (4, 4, 128), (3, 1, 20), (5, 5, 8), (8, 1, 80), (7, 7, 32)]


def make_case(heads, dtype, page_size, query_lens, context_lens, alibi=False, seed=0):
    """Pages in random order, NaN wherever nothing was written."""
    torch.manual_seed(seed)
    num_heads, num_kv_heads, dim = heads
    width = -(-max(context_lens) // page_size) + 1
    table = torch.randperm(len(context_lens) * width + 2)[: len(context_lens) * width].view(-1, width).int()
    shape = (len(context_lens) * width + 2, page_size, num_kv_heads, dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    for pages, length in zip(table.long(), context_lens, strict=True):
        for cache in caches:
            tokens = torch.full((width * page_size, num_kv_heads, dim), float("nan"), dtype=dtype)
            tokens[:length] = torch.randn(length, num_kv_heads, dim).to(dtype)
            cache[pages] = tokens.view(width, page_size, num_kv_heads, dim)
    total = sum(query_lens)
    q = torch.randn(total, num_heads + 2 * num_kv_heads, dim).to(dtype)[:, :num_heads]
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    positional = (q, *caches, table, torch.tensor(context_lens, dtype=torch.int32), starts)
    named = {
        "max_query_len": max(query_lens), "max_context_len": max(context_lens), "softmax_scale": dim**-0.5,
        "num_decodes": next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens)),
        "alibi_slopes": torch.rand(num_heads) if alibi else None,
    }  # fmt: skip
    return positional, named


def worst_row(out: torch.Tensor, truth: torch.Tensor) -> float:
    out, truth = out.double().flatten(1), truth.flatten(1)
    return float(((out - truth).norm(dim=1) / truth.norm(dim=1)).max())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("page_size", "alibi", "window"), [(1, False, 7), (5, True, None), (16, False, None), (64, True, 70)]
)
def test_paged_attention(dtype, heads, page_size, alibi, window):
    query_lens, context_lens = [1, 1, 1, 1, 5, 37, 70], [1, 64, 65, 200, 5, 100, 133]
    positional, named = make_case(heads, dtype, page_size, query_lens, context_lens, alibi)
    named["window"] = window
    q, k, v, *rest = positional
    truth = attention_paged_reference(q.double(), k.double(), v.double(), *rest, **named)
    limit = 2 * worst_row(attention_paged_reference(*positional, **named), truth) + torch.finfo(dtype).eps
    assert worst_row(attention_paged(*positional, **named, backend="cpp"), truth) <= limit


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_alone_and_in_a_batch(dtype):
    query_lens, context_lens = [1] * 9 + [1, 30, 70], [3, 65, 7, 130, 200, 64, 9, 1, 80, 17, 90, 133]
    (q, k, v, table, contexts, starts), named = make_case((9, 3, 64), dtype, 16, query_lens, context_lens)
    together = attention_paged(q, k, v, table, contexts, starts, **named, backend="cpp")
    for b in range(len(query_lens)):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        one = torch.tensor([0, query_lens[b]], dtype=torch.int32)
        mine = named | {"num_decodes": int(query_lens[b] == 1), "max_query_len": query_lens[b]}
        alone = attention_paged(q[rows], k, v, table[b : b + 1], contexts[b : b + 1], one, **mine, backend="cpp")
        assert torch.equal(alone, together[rows])


def grouped_case(heads, dtype, page_size, members, prefixes, own, seed=0):
    """Decodes in groups whose first pages are the same; NaN past contexts. Last comes a chunk."""
    torch.manual_seed(seed)
    prefix_of = [prefix for count, prefix in zip(members, prefixes, strict=True) for _ in range(count)]
    contexts = [prefix + extra for prefix, extra in zip([*prefix_of, 0], own, strict=True)]
    (q, k, v, table, _, starts), named = make_case(
        heads, dtype, page_size, [1] * len(prefix_of) + [own[-1]], contexts, alibi=True, seed=seed
    )
    first = 0
    for count, prefix in zip(members, prefixes, strict=True):
        table[first : first + count, : prefix // page_size] = table[first, : prefix // page_size].clone()
        first += count
    groups = torch.tensor([0, *torch.tensor(members).cumsum(0).tolist()], dtype=torch.int32)
    named |= {
        "num_decodes": len(prefix_of), "prefix_groups": groups, "max_prefix_len": max(prefixes),
        "prefix_lens": torch.tensor(prefix_of, dtype=torch.int32),
    }  # fmt: skip
    return (q, k, v, table, torch.tensor(contexts, dtype=torch.int32), starts), named


def quantised(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages in 8-bit integers, NaN as anything, and the scale of each head."""
    scale = tensor.float().nan_to_num().abs().amax(dim=(0, 1, 3)) / 127
    return (tensor.float() / scale[:, None]).nan_to_num(99).round().clamp(-127, 127).to(torch.int8), scale


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(9, 3, 64), (24, 1, 40), (4, 4, 32)])
@pytest.mark.parametrize("pages", ["same", "int8"])
def test_a_shared_prefix_changes_no_bit(dtype, heads, window, pages):
    members, prefixes = [3, 1, 0, 2, 30], [128, 48, 0, 560, 96]
    own = [5, 70, 1, 9, 600, 3, *range(1, 31), 20]
    (q, k, v, *rest), named = grouped_case(heads, dtype, 16, members, prefixes, own)
    named["window"] = window
    if pages == "int8":
        (k, named["k_scale"]), (v, named["v_scale"]) = quantised(k), quantised(v)
    shared = attention_paged(q, k, v, *rest, **named, backend="cpp")
    separate = attention_paged(q, k, v, *rest, **(named | {"max_prefix_len": 0}), backend="cpp")
    assert torch.equal(shared, separate)
    wide = (q.double(), k if pages == "int8" else k.double(), v if pages == "int8" else v.double())
    truth = attention_paged_reference(*wide, *rest, **named)
    limit = 2 * worst_row(attention_paged_reference(q, k, v, *rest, **named), truth) + torch.finfo(dtype).eps
    assert worst_row(shared, truth) <= limit


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "alibi", "window"), [(5, True, None), (16, False, 70), (64, True, None)])
def test_pages_of_8_bit_integers(dtype, page_size, alibi, window):
    query_lens, context_lens = [1, 1, 1, 5, 37, 270], [1, 65, 700, 5, 100, 300]
    for heads in [(9, 3, 64), (4, 4, 128), (3, 1, 20), (7, 7, 32)]:
        (q, k, v, *rest), named = make_case(heads, dtype, page_size, query_lens, context_lens, alibi)
        (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
        named |= {"window": window, "k_scale": k_scale, "v_scale": v_scale}
        truth = attention_paged_reference(q.double(), k, v, *rest, **named)
        limit = 2 * worst_row(attention_paged_reference(q, k, v, *rest, **named), truth) + torch.finfo(dtype).eps
        assert worst_row(attention_paged(q, k, v, *rest, **named, backend="cpp"), truth) <= limit


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_decodes_in_spans_give_the_same_bits(dtype):
    """With threads to spare, spans of a context are separate items."""
    (q, k, v, table, contexts, starts), named = make_case((6, 2, 32), dtype, 16, [1, 1], [1300, 513], alibi=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(attention_paged(q, k, v, table, contexts, starts, **named, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    truth = attention_paged_reference(q.double(), k.double(), v.double(), table, contexts, starts, **named)
    assert worst_row(results[1], truth) <= 4 * torch.finfo(dtype).eps


@needs_compiler
def test_threads_do_not_change_a_bit():
    positional, named = make_case((9, 3, 64), torch.bfloat16, 16, [1] * 12 + [50, 70], [90] * 12 + [100, 70])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention_paged(*positional, **named, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
def test_lengths_that_make_no_sense_are_refused():
    (q, k, v, table, contexts, starts), named = make_case((4, 2, 16), torch.float32, 4, [1, 3], [9, 11])
    for wrong in (torch.tensor([9, 2]), torch.tensor([9, 1000])):
        with pytest.raises(ValueError, match="context_lens"):
            attention_paged(q, k, v, table, wrong.int(), starts, **named, backend="cpp")
    with pytest.raises(ValueError, match="cpp"):
        attention_paged(q.double(), k, v, table, contexts, starts, **named, backend="cpp")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages", ["same", "int8"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"rope": True}, {"rope": True, "clip": 0.7}])
def test_cache_writes(dtype, options, pages):
    torch.manual_seed(0)
    k = torch.randn(70, 5, 24).to(dtype)[:, 1:3]
    v = torch.randn(70, 2, 24).to(dtype)
    slots = torch.randperm(160)[:70]
    slots[3] = -1
    named = {"clip": options.get("clip")}
    if options.get("rope"):
        angles = torch.rand(100, 12) * 6
        named |= {"cos": angles.cos(), "sin": angles.sin(), "positions": torch.randint(0, 100, (70,))}
    caches = [torch.zeros(10, 16, 2, 24, dtype=torch.int8 if pages == "int8" else dtype) for _ in range(4)]
    if pages == "int8":
        named |= {"k_scale": torch.tensor([0.02, 0.03]), "v_scale": torch.tensor([0.01, 0.015])}
    kv_write(k, v, caches[0], caches[1], slots, **named, backend="cpp")
    kv_write_reference(k, v, caches[2], caches[3], slots, **named)
    assert torch.equal(caches[1], caches[3])
    if options.get("rope"):
        step = 1 if pages == "int8" else 8 * torch.finfo(dtype).eps
        assert (caches[0].float() - caches[2].float()).abs().max() <= step
    else:
        assert torch.equal(caches[0], caches[2])


def test_what_the_twin_cannot_take_goes_to_torch():
    x, cache = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8)
    assert cpu_attention.default_backend(x.double(), cache.double()) == "torch"
    assert cpu_attention.default_backend(x, cache.to(torch.float8_e4m3fn)) == "torch"
    assert cpu_attention.default_backend(x, cache, torch.ones(1)) == "torch"


@needs_compiler
def test_builds_of_other_processes_do_not_disturb(tmp_path):
    """A folder that is gone between being listed and being looked at: a link to nowhere is one for good."""
    (tmp_path / ".build-done").symlink_to(tmp_path / "nowhere")
    killed, at_work = tmp_path / ".build-killed", tmp_path / ".build-at-work"
    killed.mkdir()
    at_work.mkdir()
    os.utime(killed, (0, 0))
    cpu._compile("packed_linear", tmp_path / "made.so")
    assert (tmp_path / "made.so").is_file() and at_work.is_dir() and not killed.exists()


def test_without_a_compiler_torch_is_the_default_and_cpp_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "find_compiler", lambda: None)
    for cached in (cpu.default_backend, cpu.load, cpu._library_path):
        cached.cache_clear()
    try:
        assert cpu.default_backend("attention") == "torch"
        with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
            cpu.load("attention")
    finally:
        for cached in (cpu.default_backend, cpu.load, cpu._library_path):
            cached.cache_clear()


@needs_compiler
def test_a_failing_build_warns_once_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu.platformdirs, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DBREAK", "-include", "no_such_file.h"))
    for cached in (cpu.default_backend, cpu.load, cpu._library_path):
        cached.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"cannot build attention\.cpp"):
            assert cpu.default_backend("attention") == "torch"
        assert os.listdir(tmp_path / "cpu-kernels") == []
    finally:
        for cached in (cpu.default_backend, cpu.load, cpu._library_path):
            cached.cache_clear()


@needs_compiler
def test_twins_share_torchs_threads():
    """A second OpenMP runtime would spin on the same cores."""
    cpu.load("attention")
    used = subprocess.run(
        ["grep", "-oE", r"/\S*lib(gomp|iomp5|omp)[^/ ]*\.so\S*", "/proc/self/maps".replace("self", str(os.getpid()))],
        capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    assert len(set(used)) <= 1
