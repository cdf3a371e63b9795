"""Small tokenizers, trained on the texts of a benchmark or with a token for each of its words."""

from __future__ import annotations

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
VOCABULARY = 8192


def train_tokenizer(texts: list[str], vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(VOCABULARY, vocabulary),
        special_tokens=[PAD, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def word_tokenizer(words: list[str]):
    """A tokenizer with a token for each word. The special tokens replace the first three."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate([PAD, EOS, UNKNOWN, *words[3:]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def _wrapped(tokenizer):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([PAD, EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
