"""The table of tiles, what a descriptor can address, and the search that is opt-in."""

import itertools
import json
import re

import pytest
import torch

from dpo_fast.ops import linear_logp
from tests.support.device import DEVICE, needs_interpreter, needs_triton

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
    assert chosen("sm_90", entropy=True).num_stages < chosen("sm_90").num_stages
    assert chosen("sm_90") == chosen("sm_90", D=896)
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


@needs_triton
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_a_layout_without_a_descriptor_is_named_once(dtype, caplog):
    """Views and flat buffers: which tensor, why, and that it is read through pointers. The same numbers."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 24, generator=g), torch.randn(40, 24, generator=g)
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    targets = torch.arange(8, device=DEVICE)
    flat = torch.zeros(1 + 40 * 25, dtype=dtype, device=DEVICE)
    views = {
        "rows are .* bytes apart": flat[: 40 * 25].view(40, 25)[:, :24],
        "begins . bytes off": flat[1 : 1 + 40 * 24].view(40, 24),
        "neighbours in a row are 40": torch.empty(24, 40, dtype=dtype, device=DEVICE).t(),
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


@needs_interpreter  # its tiles, and no clock
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
    assert {key.split("/")[2] for key in kept} == {"rows", "gradient"}
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
    # An entry of another version, or one whose results were not compared, is searched again.
    for stale in ({"specialize": True}, {"compared": False}):
        file.write_text(json.dumps({key: entry | stale for key, entry in kept.items()}))
        timed.clear()
        evaluate()
        assert len(timed) == 6
        assert json.loads(file.read_text()).keys() == kept.keys()


FAULTS = {  # what a tile leaves behind, by where it is wrong
    "nothing": lambda logp, stored: None,
    "a row": lambda logp, stored: logp[20].sub_(0.5),
    "a row is NaN": lambda logp, stored: logp[20].fill_(torch.nan),
    "every row, by little": lambda logp, stored: logp.sub_(3e-3),
    "a stored row": lambda logp, stored: stored[20].mul_(1.1),
    "columns in another order": lambda logp, stored: stored.copy_(stored.flip(1)),
    "an unwritten entry": lambda logp, stored: stored[20, -1].fill_(torch.nan),
}


@needs_interpreter
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_search_never_chooses_a_tile_with_other_results(
    fault, dtype, tmp_path, monkeypatch, caplog
):
    """However fast: a compiler once made one whose sums were off by 6.8 nats. It is named in the log."""
    from dpo_fast.kernels import search
    from dpo_fast.kernels.device import interpretable

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=g).to(dtype)
    weight = torch.randn(75, 24, generator=g).to(dtype)
    given = hidden, weight, None, torch.randint(75, (37,), generator=g)
    kept = torch.empty(37, 80, dtype=dtype)[:, :75]
    options = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    flags = {"stores": True, "described": tiles.describable(*interpretable(hidden, weight, kept))}
    shipped, fastest, other = search.candidates("rows", "interpreter", dtype, 24, 75, **flags)
    times = {shipped: 3.0, fastest: 1.0, other: 2.0}
    launch = kernels.RowPass._launch

    def faulty(self, config, repair):
        launch(self, config, repair)
        if config == fastest:
            FAULTS[fault](self.sums["logp"], self.kept)

    monkeypatch.setattr(kernels.RowPass, "_launch", faulty)
    monkeypatch.setattr(search, "_median_ms", lambda run, tile, device: times[tile])
    monkeypatch.setenv(search.VARIABLE, str(tmp_path / "tiles.json"))
    with caplog.at_level("WARNING", logger=search.__name__):
        run = kernels.RowPass(
            *given, options=options, offset_T=torch.full((37,), 9.0), kept_TV=kept
        )
    assert run.config == (fastest if fault == "nothing" else other)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (fault != "nothing") and all(str(fastest) in line for line in said)
    assert all("not the shipped tile's" in line for line in said)
    assert not kept.isnan().any()


@needs_interpreter
def test_search_compares_gradient_tiles(tmp_path, monkeypatch, caplog):
    from dpo_fast.kernels import gradient_tile, search

    launch = gradient_tile.launch

    def faulty(kernel, grid, **arguments):
        launch(kernel, grid, **arguments)
        if arguments["BLOCK_V"] == 16:
            arguments["out"][3] *= 1.5

    monkeypatch.setattr(gradient_tile, "launch", faulty)
    monkeypatch.setattr(search, "_median_ms", lambda run, tile, device: tile.block_v)
    file = tmp_path / "tiles.json"
    monkeypatch.setenv(search.VARIABLE, str(file))
    with caplog.at_level("WARNING", logger=search.__name__):
        evaluate()
    chosen = {
        key.split("/")[2]: entry["block_v"] for key, entry in json.loads(file.read_text()).items()
    }
    assert chosen == {"rows": 16, "gradient": 32}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "gradient" in said and "block_v=16" in said and "stored" in said


def test_at_most_six_candidates_and_the_shipped_one_first():
    from dpo_fast.kernels import search

    archs, flags = ("sm_80", "sm_90", "sm_100", "sm_86"), ("stores", "entropy", "rich", "described")
    for arch, dtype, D in itertools.product(archs, (BF16, FP32), (896, 4096)):
        for values in itertools.product((False, True), repeat=len(flags)):
            chosen = dict(zip(flags, values))
            found = search.candidates("rows", arch, dtype, D, 128_256, **chosen)
            assert found[0] == tiles.config_for(arch, dtype, D, 128_256, **chosen)
            assert 2 <= len(set(found)) == len(found) <= 6
            if not chosen["described"]:
                assert not any(tile.tma for tile in found)
    gradient = search.candidates("gradient", "sm_90", BF16, 4096, 128_256)
    assert gradient == search.candidates("rows", "sm_90", BF16, 4096, 128_256, stores=True)
    with pytest.raises(ValueError, match="'merge'.*try 'rows'"):
        search.candidates("merge", "sm_90", BF16, 4096, 128_256)


def test_search_survives_candidates_that_fail(tmp_path, monkeypatch, caplog):
    """Whatever a compiler or a launch throws: such a tile is named, and the fastest other one is kept."""
    from triton.runtime.errors import OutOfResources

    from dpo_fast.kernels import alike, search
    from dpo_fast.kernels.device import COMPILE_ONLY

    errors = [
        OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("PassManager::run failed"),
    ]
    cpu, (shipped, *others) = (
        torch.device("cpu"),
        search.candidates("rows", "interpreter", BF16, 64, 64),
    )
    compiled = []

    def run(tile):
        compiled.append((tile, COMPILE_ONLY.get()))
        if tile in others:
            raise errors[others.index(tile)]
        return lambda: alike.Results({"logp": (torch.zeros(3), torch.ones(3))})

    file = tmp_path / "tiles.json"
    monkeypatch.setenv(search.VARIABLE, str(file))
    with caplog.at_level("WARNING", logger=search.__name__):
        assert search.choose_tile("rows", cpu, BF16, 64, 64, run) == shipped
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "shared memory" in said[0] and "PassManager" in said[1]
    assert all(str(tile) in line for tile, line in zip(others, said))
    assert {tile for tile, only in compiled if only} == {
        shipped,
        *others,
    }  # compiled first, and all
    # The shipped one is run to compare with, and timed; the others fail before.
    assert [only for _, only in compiled] == [True] * 3 + [False] * 4
    assert not COMPILE_ONLY.get()
    (entry,) = json.loads(file.read_text()).values()
    assert entry["tried"] == 3
    file.unlink()
    others.append(shipped), errors.append(ValueError("all fail"))
    assert search.choose_tile("rows", cpu, BF16, 64, 64, run) == shipped and not file.exists()


def test_a_tile_is_compiled_without_a_launch(monkeypatch):
    from dpo_fast.kernels import device

    done = []

    class Kernel:
        def warmup(self, **arguments):
            done.append(("compiled", arguments))

        def __getitem__(self, grid):
            return lambda **arguments: done.append(("launched", {"grid": grid, **arguments}))

    device.launch(Kernel(), (3,), T=1)
    token = device.COMPILE_ONLY.set(True)
    device.launch(Kernel(), (3,), T=1)
    device.COMPILE_ONLY.reset(token)
    given = {"grid": (3,), "T": 1}
    assert done == [("launched", given), ("compiled", given)]
