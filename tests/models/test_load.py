"""What is read beside the weights."""

import json

import pytest

from dpo_fast.models import end_of_turn_ids
from dpo_fast.models.config import ModelSection
from tests.support.models import write_model
from tests.support.tokenizers import EOS, IM_END


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ([EOS, IM_END], EOS, [EOS, IM_END]),
        (IM_END, EOS, [IM_END]),
        (None, [EOS, IM_END], [EOS, IM_END]),
        (None, EOS, [EOS]),
        (None, None, []),
    ],
)
def test_ids_at_which_the_model_stops(tmp_path, generation, config, expected):
    folder = write_model(tmp_path / "model")
    for name, ids in (("generation_config.json", generation), ("config.json", config)):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | {"eos_token_id": ids}))
    assert end_of_turn_ids(ModelSection(path=str(folder))) == expected
    (folder / "generation_config.json").unlink()
    fallback = [config] if isinstance(config, int) else config or []
    assert end_of_turn_ids(ModelSection(path=str(folder))) == fallback


def test_no_model_there_leaves_the_error_to_the_loader(tmp_path):
    assert end_of_turn_ids(ModelSection(path=str(tmp_path))) == []
