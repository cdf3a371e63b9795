"""What is told at the start of servers that a later stage will ask."""

import pytest

from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.servers import unreached
from dpo_fast.training.config import build
from tests.support.server import serving


def config_of(sampler: str | None, judge: str | None) -> RoundsConfig:
    tree = {"output_dir": "out", "model": {"path": "m"}, "sample": {"prompts": "p.jsonl"}}
    if sampler:
        tree["sample"]["engine"] = {"type": "openai", "url": sampler}
    tree["judge"] = {"type": "rule", "function": "a:b"}
    if judge:
        tree["judge"] = {"type": "openai", "url": judge, "model": "j"}
    return build(RoundsConfig, tree, "file")


def test_a_server_that_is_down_is_named_and_one_that_is_up_is_not():
    with serving() as server:
        up = server.url
        assert unreached(config_of(up, up)) == []
    down = "http://127.0.0.1:1/v1"
    sampler, judge = unreached(config_of(down, down))
    assert sampler.startswith(f"sample.engine.url={down} cannot be reached now (Connection refused")
    assert judge.startswith(f"judge.url={down} cannot be reached now")
    assert unreached(config_of(None, None)) == []


@pytest.mark.parametrize("url", ["http://nobody.invalid/v1", "http://127.0.0.1:99999/v1"])
def test_an_address_that_leads_nowhere_is_told_and_no_more(url):
    (told,) = unreached(config_of(url, None))
    assert url in told
