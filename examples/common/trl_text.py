"""Tekken's ids as a tokenizer of the examples for TRL."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.trainer_report import VOCAB

TOKENS = {"pad": 11, "bos": 1, "eos": 2}  # of Tekken
MODEL_TOKENS = {f"{name}_token_id": number for name, number in TOKENS.items()}  # keywords of a model's configuration


def ids_as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of texts that are Tekken's ids already, as `ids_as_text` writes them.

    Transformers can convert Tekken's own, which takes longer than the examples.
    """
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": str(number) for name, number in TOKENS.items()} | {"unk_token": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
