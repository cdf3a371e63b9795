"""The table of tiles, what a descriptor can address, and the search that is opt-in."""

import json
import re

import pytest
import torch

from dpo_fast.ops import linear_logp
from dpo_fast.ops.dispatch import interpreting

kernels = pytest.importorskip("dpo_fast.kernels.linear_logp")
tiles = pytest.importorskip("dpo_fast.kernels.tiles")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def evaluate():
    """Log-probs and both gradients of a small head whose tiles are recomputed."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(75, 24, generator=g).bfloat16().requires_grad_()
    targets = torch.randint(75, (37,), generator=g)
    logp = linear_logp(hidden, weight, targets, implementation="triton", workspace_bytes=0).logp
    return logp.detach(), *torch.autograd.grad(logp.sum(), (hidden, weight))


def test_table_does_not_depend_on_the_batch():
    """Keyed by architecture and bins; unknown architectures get one that fits any."""

    def chosen(arch, dtype=BF16, D=4096, V=128_256, **flags):
        return tiles.config_for(arch, dtype, D, V, **flags)

    assert chosen("sm_90").block_v == 256 and chosen("sm_90").tma
    assert chosen("sm_90", stores=True).num_stages < chosen("sm_90").num_stages
    assert chosen("sm_90", described=False) == tiles.POINTER_HALF
    assert chosen("sm_90", rich=True, described=False) == tiles.RICH_HALF
    assert chosen("sm_90", rich=True).tma and not chosen("sm_80", rich=True).tma
    assert chosen("sm_100", entropy=True).block_t < chosen("sm_100").block_t
    assert chosen("sm_90", FP32) == tiles.FLOAT
    assert chosen("sm_86", FP16) == tiles.OTHER_HALF
    assert chosen("hip", rich=True) == tiles.OTHER_HALF


def test_what_a_descriptor_can_address():
    aligned = torch.empty(8, 64, dtype=BF16)
    assert tiles.describable(aligned, aligned[2:, :40], aligned[:, 8:])
    assert not tiles.describable(aligned[:, 1:])  # starts 2 bytes off
    assert not tiles.describable(torch.empty(8, 65, dtype=BF16))  # rows of 130 bytes
    assert not tiles.describable(aligned.t())
    assert not tiles.describable(aligned[:0])


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_a_layout_without_a_descriptor_is_named_once(dtype, caplog):
    """Views and flat buffers: which tensor, why, and that it is read through pointers. The same numbers."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 24, generator=g), torch.randn(40, 24, generator=g)
    hidden, weight, targets = hidden.to(dtype), weight.to(dtype), torch.arange(8)
    flat = torch.zeros(1 + 40 * 25, dtype=dtype)
    views = {
        "rows are .* bytes apart": flat[: 40 * 25].view(40, 25)[:, :24],
        "begins . bytes off": flat[1 : 1 + 40 * 24].view(40, 24),
        "neighbours in a row are 40": torch.empty(24, 40, dtype=dtype).t(),
    }
    expected = linear_logp(hidden, weight, targets, implementation="triton").logp
    tiles._say_once.cache_clear()
    for reason, view in views.items():
        view.copy_(weight)
        caplog.clear()
        with caplog.at_level("INFO", logger=tiles.__name__):
            for _ in range(2):
                got = linear_logp(hidden, view, targets, implementation="triton").logp
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        (said,) = [x.getMessage() for x in caplog.records if x.name == tiles.__name__]
        assert re.search(f"row kernel .* weight .*{dtype}.* through pointers.*{reason}", said)
    caplog.clear()
    with caplog.at_level("INFO", logger=tiles.__name__):
        linear_logp(hidden, weight, targets, implementation="triton")
    assert not [x for x in caplog.records if x.name == tiles.__name__]


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_search_is_opt_in_and_remembers(tmp_path, monkeypatch):
    """Nothing is timed without the variable; with it every key is searched once, and kept in the file."""
    from dpo_fast.kernels import search

    timed, time_one = [], search._median_ms
    monkeypatch.setattr(search, "_median_ms", lambda *a: timed.append(a[1]) or time_one(*a))
    plain = evaluate()
    assert timed == []
    file = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(search.VARIABLE, str(file))
    for found, value in zip(evaluate(), plain):
        torch.testing.assert_close(found, value, rtol=1e-2, atol=1e-2)
    kept = json.loads(file.read_text())
    assert {key.split("/")[1] for key in kept} == {"rows", "gradient"}
    assert len(timed) == sum(entry["tried"] for entry in kept.values()) == 6
    kept[next(key for key in kept if "rows" in key)]["block_v"] = 16  # what the file says is used
    file.write_text(json.dumps(kept))
    sizes = []
    launch = kernels.RowPass._launch
    monkeypatch.setattr(
        kernels.RowPass, "_launch", lambda self, c, r: sizes.append(c.block_v) or launch(self, c, r)
    )
    evaluate()
    assert sizes == [16] and len(timed) == 6


def test_search_skips_tiles_that_do_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from dpo_fast.kernels import search

    def run(config):
        if config.block_v != 16:
            raise OutOfResources(300_000, 232_448, "shared memory")

    found = search.candidates("rows", "interpreter", BF16, 64, 64)
    times = [search._median_ms(run, c, torch.device("cpu")) for c in found]
    assert times[1] < float("inf") and times[0] == times[2] == float("inf")
