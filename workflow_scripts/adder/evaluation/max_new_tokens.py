"""How long a generated reply may get. Apart from the packer, whose changes are none of the evaluation's."""

import math
from typing import Literal, TypedDict

from adder.core.choice import Choice
from adder.core.length_summary import LengthSummary

WITHOUT_REPLIES = 256  # tokens, where only plain texts are trained on


class ReplyLimits(TypedDict):
    """What a limit was chosen from, in tokens."""

    longest_reply: int
    context: int


MaxNewTokens = Choice[int, ReplyLimits]


def choose_max_new_tokens(wanted: Literal["auto"] | int, reply_tokens: LengthSummary, context: int) -> MaxNewTokens:
    """Most new tokens of a reply: as set, or from the training replies' lengths. Half the context stays for prompts."""
    choice = Choice(wanted, "as set") if wanted != "auto" else from_training_replies(reply_tokens, context)
    half = max(1, context // 2)
    if choice.value <= half:
        return choice
    return Choice(half, f"{half} tokens, half of the model's context: the prompt needs room as well ({choice.reason})")


def from_training_replies(reply_tokens: LengthSummary, context: int) -> MaxNewTokens:
    """Choose how long a generated reply may get, from `reply_tokens.train` of tokenize.json (counts include the end).

    The longest training reply and an eighth more, rounded up to a multiple of 8, at most `context`: a reply that needs
    more is nothing like the training replies, and each further token costs a whole pass over the weights.
    """
    longest = reply_tokens.get("max")
    if longest is None:
        value = min(WITHOUT_REPLIES, context)
        return Choice(value, f"{value} tokens: no training example has a reply, which would tell")
    value = min(math.ceil(longest * 1.125 / 8) * 8, context)
    reason = f"{value} tokens: the longest training reply has {longest} with its end-of-turn token, and an eighth more"
    if value == context:
        reason = f"{value} tokens: the model's context; the longest training reply has {longest}"
    return Choice(value, reason, [{"longest_reply": longest, "context": context}])
