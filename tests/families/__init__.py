"""Every class of Transformers with a head of words: the same training step with an `LMHead` as without.

``python -m tests.families --write docs/models.md`` builds a tiny model of each and writes what it finds.
"""
