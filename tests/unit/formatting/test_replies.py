"""What a reply is known by."""

from adder.formatting.replies import ANSWERED, joined, reply_key, reply_text


def messages(user, reply):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}


def answered(user, reply):
    return bool(joined([reply_key(messages(user, reply))])[0] & ANSWERED)


def test_a_reply_in_its_own_prompt_is_seen_as_whole_words():
    assert answered("Label: urgent. Is it urgent?", "urgent")
    assert answered("Is it URGENT?", "urgent") and answered("Es ist dringend: Straße", "strasse")
    assert not answered("An insurgent came.", "urgent") and not answered("Where is it?", "In Oslo.")
    assert reply_key({"text": "urgent"}) == reply_key(messages("Where is it?", "  ")) == bytes(8)


def test_equal_replies_have_one_key_whatever_their_prompts():
    rows = [messages("a", "In  Oslo."), messages("in oslo.", "in oslo."), messages("a", "No")]
    one, other, third = joined([reply_key(row) for row in rows])
    assert one & ~ANSWERED == other & ~ANSWERED != third & ~ANSWERED


def test_a_reply_is_the_last_one_with_its_calls():
    calls = [{"function": {"name": "f", "arguments": {}}}]
    assert '"f"' in reply_text({"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]})
    two = {"messages": [*messages("a", "b")["messages"], *messages("c", "d")["messages"]]}
    assert reply_text(two) == "d" and reply_text({"text": "plain"}) == ""
