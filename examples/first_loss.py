"""A first training loop of one's own: PyTorch and chunked_ce alone, on the source text that comes with Python.

    python examples/first_loss.py

Every word, space and sign of that text is an entry of the vocabulary. The model guesses the next one from the
last eight. The commented line is the loss with full logits, which takes the place of the line above it.
Takes a quarter of a minute on 2 cores.
"""

import argparse
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch

from chunked_ce import linear_cross_entropy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=30, metavar="N", help="(30)")
parser.add_argument("--batch", type=int, default=1024, metavar="N", help="tokens in a step (1024)")
options = parser.parse_args()

sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
words = [word for path in sources for word in re.findall(r"\w+|\s+|.", path.read_text("utf-8", errors="replace"))]
vocabulary = {word: number for number, word in enumerate(Counter(words))}
tokens = torch.tensor([vocabulary[word] for word in words])
print(f"{len(tokens):,} tokens, a vocabulary of {len(vocabulary):,}")

torch.manual_seed(0)
embedding = torch.nn.Embedding(len(vocabulary), 64)
body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 64, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
head = torch.nn.Linear(128, len(vocabulary))
optimizer = torch.optim.AdamW([*embedding.parameters(), *body.parameters(), *head.parameters()], lr=2e-3)

for step in range(1, options.steps + 1):
    start = torch.randint(len(tokens) - 8, (options.batch, 1))
    context, target = tokens[start + torch.arange(8)], tokens[start.squeeze(1) + 8]
    hidden = body(embedding(context))  # (N, D)
    loss = linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)
    # loss = torch.nn.functional.cross_entropy(head(hidden), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:3}  loss {loss.item():.4f}", flush=True)
