"""How long a generated reply may get. Apart from the packer, whose changes are none of the evaluation's."""

import math

from adder.core.choice import Choice

UNTOLD = 256  # tokens, where only plain texts are trained on


def choose_max_new_tokens(reply_tokens: dict, context: int) -> Choice:
    """Choose how long a generated reply may get, from `reply_tokens.train` of tokenize.json (counts include the end).

    The longest training reply and an eighth more, rounded up to a multiple of 8, at most `context`: a reply that needs
    more is nothing like the training replies, and each further token costs a whole pass over the weights.
    """
    longest = reply_tokens.get("max")
    if longest is None:
        value = min(UNTOLD, context)
        return Choice(value, f"{value} tokens: no training example has a reply, which would tell", [])
    value = min(math.ceil(longest * 1.125 / 8) * 8, context)
    reason = f"{value} tokens: the longest training reply has {longest} with its end-of-turn token, and an eighth more"
    if value == context:
        reason = f"{value} tokens: the model's context; the longest training reply has {longest}"
    return Choice(value, reason, [{"longest_reply": longest, "context": context}])
