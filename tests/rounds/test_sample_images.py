"""Prompts with images: sampled, scored, judged and trained on."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.images.processor import load_processor
from dpo_fast.errors import UserError
from dpo_fast.judging import samples
from dpo_fast.judging.config import JudgeSection
from dpo_fast.judging.implicit import ImplicitJudge
from dpo_fast.judging.pictures import refuse_images
from dpo_fast.models import end_of_turn_ids, load_tokenizer
from dpo_fast.models.config import ModelSection
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.judge import judge
from dpo_fast.rounds.sample import sole_sample
from dpo_fast.rounds.stored import fill_references
from dpo_fast.training.config import build, build_config
from tests.support.image_rows import picture, png
from tests.support.image_runs import write_image_model
from tests.support.judging import read_rows, row
from tests.support.models import write_model

NAMES = ("qwen3-vl", "gemma3", "qwen3.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    for name in NAMES:
        write_image_model(folder / name, name)
    write_model(folder / "llama")
    picture(0, 16, 16).save(folder / "0.png")
    picture(1, 40, 20).save(folder / "1.png")
    inside = "data:image/png;base64," + base64.b64encode(png(picture(2, 24, 12))).decode()
    texts = [
        "<image>What is it?",
        "<image> or <image>?",
        "Why?",
        "And<image>",
        "<image>What is it?",
    ]
    images = [["0.png"], ["1.png", inside], [], ["1.png"], ["1.png"]]
    rows = [
        {"id": place, "prompt": [{"role": "user", "content": text}], "images": each}
        for place, (text, each) in enumerate(zip(texts, images))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder, out, name="qwen3-vl", data=None, sections=None, **options) -> RoundsConfig:
    section = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 6, "num_generations": 1}
    tree = {
        "output_dir": str(out),
        "model": {"path": str(folder / name), "dtype": "fp32"},
        "data": {"max_length": 200, "cache_dir": str(folder / "cache"), **(data or {})},
        "sample": section | {"temperature": 0, "engine": {"batch_size": 8}} | options,
        **(sections or {}),
    }
    return build(RoundsConfig, tree, "case")


class Alone:
    """transformers' own model and processor, on one prompt of the file at a time."""

    def __init__(self, folder, name) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / name)
        path = {"pretrained_model_name_or_path": str(folder / name)}
        self.processor = load_processor(path, self.tokenizer, name)
        self.model = AutoModelForImageTextToText.from_pretrained(folder / name).eval()

    def inputs(self, messages) -> dict:
        """messages: of a row of samples, whose parts bring their images."""
        parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
        images = [opened(part["image"]) for part in parts if part["type"] == "image"]
        prompt = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        given = {"images": images} if images else {}
        return self.processor(text=[prompt], return_tensors="pt", **given)

    @torch.no_grad()
    def answer(self, messages) -> str:
        given = self.inputs(messages)
        size, ends = given["input_ids"].shape[1], self.tokenizer.eos_token_id
        ids = self.model.generate(
            **given, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=ends
        )
        return self.tokenizer.decode(ids[0, size:], skip_special_tokens=True)

    @torch.no_grad()
    def logp(self, messages, answer: str, ended: bool) -> float:
        given = dict(self.inputs(messages))
        size = given["input_ids"].shape[1]
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids += [self.tokenizer.eos_token_id] if ended else []
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([ids])], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in given:
                given[name] = torch.cat([given[name], torch.zeros(1, len(ids)).long()], 1)
        logits = self.model(**given).logits[0, size - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids)[:, None]).sum().item()


def opened(image: str) -> Image.Image:
    if image.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))
    return Image.open(image)


@pytest.mark.parametrize("name", NAMES[1:])
def test_completions_and_their_log_probs_are_those_of_each_prompt_alone(folder, tmp_path, name):
    """Prompts with one image, two and none in one batch, against transformers and its processor."""
    rows = read_rows(sole_sample(config(folder, tmp_path, name)))
    alone = Alone(folder, name)
    assert [row["id"] for row in rows] == list(range(5))
    for each in rows:
        answer = alone.answer(each["prompt"])
        assert each["completions"] == [answer]
        ended = each["finish_reasons"][0] == "stop"
        assert each["logps"] == [pytest.approx(alone.logp(each["prompt"], answer, ended), abs=1e-4)]
    assert rows[0]["completions"] != rows[4]["completions"]  # which differ in the image alone


@pytest.fixture(scope="module")
def drawn(folder):
    """Three completions of each prompt, and the pairs that a judge makes of them."""
    out = folder / "drawn"
    sections = {
        "judge": {"type": "implicit", "reference": str(folder / "qwen3.5"), "dtype": "fp32"},
        "pairs": {"strategy": "all", "unfinished": "keep"},
    }
    own = config(folder, out, sections=sections, temperature=1.0, num_generations=3)
    sole_sample(own)
    judge(own)
    return out


def test_pairs_bring_their_images_and_fill_references(folder, drawn, tmp_path):
    """What was scored as it was sampled is found again by the rows that `train` reads."""
    run = build_config(
        {
            "model": {"path": str(folder / "qwen3-vl"), "dtype": "fp32"},
            "data": {
                "train": str(drawn / "pairs.jsonl"),
                "max_length": 200,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {
                "output_dir": str(tmp_path / "run"),
                "global_batch_size": 2,
                "micro_batch_size": 2,
            },
        },
        "case",
    )
    assert fill_references(run, [drawn / "samples.logps.parquet"]) == ["train"]
    tokenizer, ends = load_tokenizer(run.model), end_of_turn_ids(run.model)
    examples = load_examples(run.data, tokenizer, split="train", eos_ids=ends)
    pairs = read_rows(drawn / "pairs.jsonl")
    assert len(examples) == len(pairs) > 5
    counts = {len(examples[place]["images"] or ()) for place in range(len(examples))}
    assert counts == {0, 1, 2}


def test_an_implicit_judge_sees_the_images(folder, drawn, tmp_path):
    """Two models, on prompts with images and without, whichever came first."""
    names = ("qwen3-vl", "qwen3.5")  # which share a tokenizer
    section = JudgeSection(type="implicit", reference=str(folder / names[1]), dtype="fp32", beta=1)
    rows = list(samples.read_rows(drawn / "samples.jsonl"))
    model, data = ModelSection(path=str(folder / names[0])), DataConfig(train="x")
    judging = ImplicitJudge(section, model, data, "cpu")
    (texts,), (found,) = judging([[rows[2]]]), judging([rows])
    assert texts[0].verdicts[0].score == pytest.approx(found[2].verdicts[0].score, abs=1e-5)
    policy, reference = (Alone(folder, name) for name in names)
    for one, judged in zip(rows, found):
        ended = not one.unfinished(0)
        ours, theirs = (
            each.logp(one.prompt, one.completions[0], ended) for each in (policy, reference)
        )
        assert judged.verdicts[0].score == pytest.approx(ours - theirs, abs=1e-4)


def test_texts_with_images_and_parquet_hold_what_the_lines_hold(folder, tmp_path):
    prompts = tmp_path / "texts.jsonl"
    image = {"path": str(folder / "1.png"), "max_pixels": 256}
    rows = [{"prompt": "look: <image> and", "images": [image]}, {"prompt": "none"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for kind in ("jsonl", "parquet"):
        options = {"prompts": str(prompts), "output": kind}
        data = {"apply_chat_template": False}
        file = sole_sample(config(folder, tmp_path / kind, data=data, **options))
        found[kind] = [row.content for row in samples.read_rows(file)]
    assert found["jsonl"] == found["parquet"]
    first = found["jsonl"][0]
    assert first["prompt"] == "look: <image> and"
    assert first["images"] == [{"image": str(folder / "1.png"), "max_pixels": 256}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": {"type": "vllm"}}, "prompts.jsonl:1: .* sample.engine.type=vllm is not given"),
        (
            {"engine": {"type": "openai", "url": "http://localhost:1/v1"}},
            "prompts.jsonl:1: the prompt has images, and sample.engine.api=completions sends",
        ),
        ({"name": "llama"}, "prompts.jsonl:1: .* model.path=.*llama cannot take them: .*no vision"),
        ({"images": False}, "prompts.jsonl:1: .* model.images=false cannot be honoured"),
    ],
)
def test_what_cannot_sample_images_is_named(folder, tmp_path, options, message):
    images, name = options.pop("images", None), options.pop("name", "qwen3-vl")
    own = config(folder, tmp_path, name, **options)
    own = own.model_copy(update={"model": own.model.model_copy(update={"images": images})})
    with pytest.raises(UserError, match=message):
        sole_sample(own)


def test_a_classifier_reads_texts_alone():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
    asked = row("no", prompt=[{"role": "user", "content": parts}])
    with pytest.raises(UserError, match="samples.jsonl:1: .* judge.type=reward_model reads texts"):
        refuse_images(asked, "reward_model")
    refuse_images(row("no"), "reward_model")
