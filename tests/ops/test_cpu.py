"""Which products a CPU is given, whatever CPU the tests run on."""

import itertools

import pytest
import torch

from dpo_fast.ops import cpu
from dpo_fast.ops.dispatch import _choice

BF16, FP16 = torch.bfloat16, torch.float16
ZEN5 = {"avx2", "avx512f", "avx512_bf16"}
RAPIDS = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16"}
GRAVITON = {"asimd", "asimdhp", "bf16", "sve"}
LIMIT = "ONEDNN_MAX_CPU_ISA="


@pytest.mark.parametrize(
    ("dtype", "features", "limit", "fast", "reason"),
    [
        (BF16, {"avx2"}, None, False, "this CPU has no AMX_BF16 or AVX512_BF16"),
        (BF16, {"avx2", "avx512f"}, None, False, "this CPU has no AMX_BF16 or AVX512_BF16"),
        (BF16, ZEN5, None, True, "this CPU has AVX512_BF16"),
        (BF16, RAPIDS, None, True, "this CPU has AMX_BF16"),
        (FP16, ZEN5, None, False, "this CPU has no AMX_FP16 or AVX512_FP16"),
        (FP16, RAPIDS, None, True, "this CPU has AMX_FP16"),
        (BF16, ZEN5, f"{LIMIT}AVX512_CORE", False, f"{LIMIT}AVX512_CORE keeps oneDNN from AVX512_"),
        (BF16, RAPIDS, f"{LIMIT}avx2_vnni_2", False, "keeps oneDNN from AMX_BF16"),
        (BF16, RAPIDS, f"{LIMIT}AVX512_CORE_BF16", True, "AMX_BF16"),
        (FP16, RAPIDS, f"{LIMIT}AVX512_CORE_BF16", False, "keeps oneDNN from AMX_FP16"),
        (FP16, RAPIDS, f"{LIMIT}AVX512_CORE_FP16", True, "AMX_FP16"),
        (BF16, ZEN5, f"{LIMIT}nonsense", True, "AVX512_BF16"),  # which oneDNN ignores
        (BF16, set(), None, False, "no AMX_BF16"),  # where nobody tells
        (BF16, GRAVITON, None, True, "this CPU has BF16"),
        (BF16, {"asimd"}, None, False, "this CPU has no BF16"),
        (FP16, GRAVITON, None, False, "no fast product of fp16"),
    ],
)
def test_features_and_limits_decide(monkeypatch, dtype, features, limit, fast, reason):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_acl_available", lambda: True)
    verdict = cpu.judge(dtype, features, limit)
    assert verdict.fast is fast and reason in verdict.reason


def test_without_its_library_a_feature_is_worth_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_acl_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu.judge(BF16, GRAVITON, None) == (
        False,
        "this PyTorch has no Arm Compute Library, which multiplies bf16",
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu.judge(BF16, RAPIDS, None).fast
    assert not cpu.by_onednn.__wrapped__()


def test_the_limit_is_read_as_onednn_reads_it(monkeypatch):
    for name in cpu.LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert cpu._limit() is None
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert cpu._limit() == "DNNL_MAX_CPU_ISA=AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    assert cpu._limit() == "DNNL_MAX_CPU_ISA=AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert cpu._limit() == "ONEDNN_MAX_CPU_ISA=AVX512_CORE"
    assert cpu.instruction_set().endswith(" ONEDNN_MAX_CPU_ISA=AVX512_CORE")


@pytest.mark.parametrize(
    ("features", "intel", "limit", "expected"),
    [
        (ZEN5, False, None, True),
        (ZEN5, True, None, False),
        (ZEN5, False, f"{LIMIT}AVX2", True),
        (ZEN5, False, f"{LIMIT}AVX", False),
        ({"sse4_1"}, False, None, False),
        (GRAVITON, False, None, False),
    ],
)
def test_onednn_multiplies_fp32_where_mkl_holds_back(monkeypatch, features, intel, limit, expected):
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setattr(cpu, "_made_by_intel", lambda: intel)
    monkeypatch.setattr(cpu, "_limit", lambda: limit)
    assert cpu.by_onednn.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not cpu.by_onednn.__wrapped__()


def laid_out(rows, columns, layout):
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    step = 2 if layout == "every second column" else 1
    return torch.randn(rows, 2 * columns)[:, : step * columns : step]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("M,K,N", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (37, 41, 43)])
def test_product(monkeypatch, onednn, M, K, N):
    monkeypatch.setattr(cpu, "by_onednn", lambda: onednn)
    layouts = ("transposed", "rows apart", "every second column")
    for first, second in itertools.product(layouts, layouts):
        a, b = laid_out(M, K, first), laid_out(K, N, second)
        for buffer in (None, torch.full((M * N + 5,), torch.nan)):
            out = cpu.product(a, b, buffer)
            assert out.shape == (M, N)
            torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    a, b = torch.randn(M, K).to(BF16), torch.randn(K, N).to(BF16)
    assert torch.equal(cpu.product(a, b), a @ b)


def test_the_verdict_is_logged_once(monkeypatch, caplog):
    caplog.set_level("INFO", "dpo_fast")
    monkeypatch.setattr(cpu, "judge", lambda *_: cpu.Verdict(False, "this CPU is odd"))
    cpu.half_products.cache_clear()
    try:
        assert not cpu.half_products(BF16).fast and not cpu.half_products(BF16).fast
    finally:
        cpu.half_products.cache_clear()
    assert caplog.messages == [
        "products of torch.bfloat16 on the CPU: in torch.float32 (this CPU is odd)"
    ]


@pytest.mark.parametrize("fast", [False, True])
def test_the_choice_says_how_products_are_made(monkeypatch, fast):
    monkeypatch.setattr(cpu, "half_products", lambda dtype: cpu.Verdict(fast, "this CPU is odd"))
    monkeypatch.setattr(cpu, "by_onednn", lambda: False)
    device = torch.device("cpu")
    assert cpu.product_dtype(device, BF16) == (BF16 if fast else torch.float32)
    assert cpu.product_dtype(torch.device("cuda"), BF16) == BF16
    assert cpu.product_dtype(device, torch.float64) == torch.float64
    how = "bfloat16" if fast else "float32 by torch.mm"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = _choice("linear_logp", device, BF16, "auto", small=False).reason
    assert reason.endswith(f"products in {how}: this CPU is odd")
