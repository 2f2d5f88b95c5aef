"""Conversations that are written out in one text, with the marks of one model's template or with names of speakers."""

import re

ASKING = re.compile(
    r"<\|im_start\|>user|\[INST\]|<start_of_turn>user|<\|(user|prompter|start_header_id\|>user)"
    r"|(^|\n)\s*(#+ *)?(human|user|instruction|prompter|question)\s*:|#+ *(human|user|instruction)\s*:",
    re.IGNORECASE,
)
REPLYING = re.compile(
    r"<\|im_start\|>assistant|\[/INST\]|<start_of_turn>model|<\|(assistant|start_header_id\|>assistant)"
    r"|\n\s*(#+ *)?(assistant|gpt|ai|bot)\s*:|#+ *(assistant|response|bot)\s*:",
    re.IGNORECASE,
)
LOOKED_AT = 20_000  # characters: an instruction may be long


def is_transcript(text: str) -> bool:
    """Whether a text has turns of somebody who asks and of somebody who replies, both marked as such."""
    start = text[:LOOKED_AT]
    asked = ASKING.search(start)
    return asked is not None and REPLYING.search(start, asked.end()) is not None
