"""Tokenizers small enough to know every id by heart."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS, IM_START, IM_END = range(len(SPECIAL))

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    *,
    bos: bool = False,
    template: str | None = None,
    merges: tuple[tuple[str, str], ...] = (),
    eos_token: str = "</s>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: ids 0..4 are SPECIAL, then the 256 bytes, then the merges.

    bos: whether encoding with special tokens puts <s> first. template: a chat template, as CHATML.
    merges: pairs of token strings, joined in this order; each makes one more token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos_token,
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer(
    *, template: str | None = None, merges: tuple[tuple[str, str], ...] = (), scheme: str = "legacy"
) -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 and Mistral have it: a space before the first word of any text.

    scheme: legacy (also after special tokens), or that of Metaspace, "first" or "always".
    merges: of ASCII characters and "▁". All other characters are bytes.
    """
    letters = ["▁", *map(chr, range(33, 127))]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=list(merges), byte_fallback=True)
    tokenizer = Tokenizer(model)
    if scheme == "legacy":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """The byte tokenizer with ChatML; a turn ends with <|im_end|>, which is its EOS."""
    return byte_tokenizer(bos=bos, template=CHATML, eos_token="<|im_end|>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of the text, with nothing put round it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
