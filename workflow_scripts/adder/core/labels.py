"""The label of a token that carries no loss."""

# What torch's cross_entropy ignores by default (its `ignore_index`), and with it transformers, TRL and PEFT.
IGNORE_INDEX = -100
