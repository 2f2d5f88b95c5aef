"""What a person can do about conversations that can't be used, by the reason."""

OTHER_TEMPLATE = "set tokenize.chat_template to a Jinja file with a template that"
# By what a reason holds; the first that fits.
REMEDIES = {
    "refuses this conversation": f"mend the rows as it says, or {OTHER_TEMPLATE} takes them",
    "list of tools": f"{OTHER_TEMPLATE} has a place for tools, or leave `tools` out of the rows",
    "tool call": f"{OTHER_TEMPLATE} writes calls and their texts, or leave these out of the rows",
    "no reasoning can follow": "set tokenize.template_variables to what makes it think, such as `enable_thinking: "
    "true`, or leave the reasoning out of the rows",
    "reasoning": f"{OTHER_TEMPLATE} writes it, or leave it out of the rows",
    "control token": "take such texts out of the rows, or write them otherwise",
    "no tokens for": "take these characters out of the rows, or train a model whose vocabulary has them",
    "end-of-turn token": f"{OTHER_TEMPLATE} ends each reply with a control token of the vocabulary",
    "generation blocks": f"{OTHER_TEMPLATE} marks whole replies, or none",
    "generation prompt": f"{OTHER_TEMPLATE} writes before a reply what it gives generation",
    "no prompt for a reply": f"{OTHER_TEMPLATE} takes such turns, or leave the reply out of the rows",
    "nothing to train on": "unmark some replies, or leave the rows out",
    "empty reply": "leave such rows out, or write the replies",
    "empty text": "leave such rows out",
    "no assistant turn": "leave such rows out, or name the roles in the data's settings",
    "isn't to be learnt": "mark whole replies that occur once in their conversation",
    "aren't to be learnt": "mark parts of replies that occur once in their conversation",
    "beginning-of-text": f"{OTHER_TEMPLATE} writes it once",
}
DEFAULT = f"mend the rows, or {OTHER_TEMPLATE} writes all that they hold"


def remedy(reason: str) -> str:
    """What to do about conversations that can't be used for this reason (an UnusableRow's, or its kind)."""
    return next((told for part, told in REMEDIES.items() if part in reason), DEFAULT)
