"""What the examples for TRL share: Tekken's ids as a tokenizer, a small Llama, and a report of time and memory."""

import statistics
import time

import torch
from peak_memory import PeakMemory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

VOCAB = 131_072
PAD, BOS, EOS = 11, 1, 2  # of Tekken


def ids_as_text(ids) -> str:
    return " ".join(map(str, ids))


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of texts that are Tekken's ids already, as `ids_as_text` writes them.

    Transformers can convert Tekken's own, which takes longer than the examples.
    """
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": str(PAD), "bos_token": str(BOS), "eos_token": str(EOS), "unk_token": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def new_model(width: int, depth: int, heads: int, context: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


class Report(TrainerCallback):
    """Prints the numbers of each step by the ``names`` of TRL's logs, and at the end time and peak memory."""

    def __init__(self, *names: str):
        self.names = names

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory, self.seconds = PeakMemory(), []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.names[0] in logs:
            shown = "  ".join(f"{name} {float(logs[name]):.4f}" for name in self.names)
            print(f"step {state.global_step:4}  {shown}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        mebibytes = self.memory.bytes() / 2**20
        print(f"{statistics.median(self.seconds):.2f} s per step, training took {mebibytes:,.0f} MiB at its peak")
