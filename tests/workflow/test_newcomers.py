"""What people who are new here bring: each goes from its file to packs as they would expect, or is refused with how."""

import json
import random

import pytest

from adder.core.errors import UserError
from prepared import prepare_to_train
from rag_rows import passage, rag_rows
from spreadsheets import write_ods, write_xlsx
from tiny import save_tiny_model, tiny_tokenizer

TOOLS_TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHOP = ("lamp", "desk", "chair", "shelf", "carpet", "mirror", "clock", "vase", "stool", "bench")
ASKS = (
    "How do I return the {}; it came broken?", "When is the {} in stock again?", "Can I pay for the {} in three parts?",
    "Is the {} sold in green?", "Which tools does the {} need?", "How heavy is the {} with its box?",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose template writes tools."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    tiny_tokenizer(TOOLS_TEMPLATE).save_pretrained(folder)
    return folder


def faq(count=300):
    """Questions of a shop's customers in a few ways of asking, and an answer to each."""
    draw = random.Random(5)
    rows = []
    for number in range(count):
        question = ASKS[number % len(ASKS)].format(f"{SHOP[number // len(ASKS) % len(SHOP)]} of series {number // 60}")
        answer = (
            f'Please write to us at "help{number}"; we reply within {draw.randrange(2, 40)} hours.\nYour shop für Möbel'
        )
        rows.append((question, answer))
    return rows


def as_csv(header, rows):
    """As a spreadsheet in a country with decimal commas saves it: semicolons, quotes where they are needed, CR LF."""

    def cell(text):
        return f'"{text.replace(chr(34), 2 * chr(34))}"' if any(sign in text for sign in ';"\n') else text

    return "".join(";".join([*map(cell, row), "", ""]) + "\r\n" for row in [header, *rows])


@pytest.mark.parametrize("kind", ["csv", "csv in cp1252", "xlsx", "ods"])
def test_a_table_of_300_questions_from_a_spreadsheet(tmp_path, model, kind):
    rows, source = faq(), {}
    if kind.startswith("csv"):
        path = tmp_path / "faq.csv"
        path.write_bytes(as_csv(("Question", "Answer"), rows).encode("cp1252" if "cp1252" in kind else "utf-8-sig"))
    else:
        path = tmp_path / f"faq.{kind}"
        (write_xlsx if kind == "xlsx" else write_ods)(path, {"FAQ": [("Question", "Answer"), *rows]})
    if "cp1252" in kind:
        with pytest.raises(
            UserError, match=r"faq.csv: .* Set `encoding:` .*probably Windows' `encoding: cp1252`.*Möbel"
        ):
            prepare_to_train(tmp_path / "refused", [{"path": str(path)}], model)
        source = {"encoding": "cp1252"}
    made = prepare_to_train(tmp_path / "made", [{"path": str(path), **source}], model)
    card = made.formatted.card
    assert card["rows_in"] == 300 == card["train"] + card["heldout"] and 15 <= card["heldout"] <= 60
    answers = dict(rows)
    for text, learnt in zip(made.texts, made.learnt, strict=True):
        question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert learnt == f"{answers.pop(question)}<|im_end|>"
    assert (
        len(answers) == card["heldout"] and made.lengths["dropped"] == 0 and made.lengths["examples"] == card["train"]
    )
    assert made.tokenize["rejected_count"] == 0


def test_a_table_with_names_in_another_language_is_refused_with_what_to_write(tmp_path, model):
    path = tmp_path / "faq.csv"
    path.write_text(as_csv(("Frage", "Antwort"), faq()), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        prepare_to_train(tmp_path / "refused", [{"path": str(path)}], model)
    assert "`columns:` maps other names" in str(refused.value) and 'prompt: "{Frage}"' in str(refused.value)
    for name, how in (
        ("columns", {"columns": {"question": "Frage", "answer": "Antwort"}}),
        ("template", {"prompt": "{Frage}", "completion": "{Antwort}"}),
    ):
        made = prepare_to_train(tmp_path / name, [{"path": str(path), **how}], model)
        assert set(made.learnt) <= {f"{answer}<|im_end|>" for _, answer in faq()}


@pytest.mark.parametrize("how", ["columns", "template"])
def test_50_passages_with_20_questions_each(tmp_path, model, how):
    rows = rag_rows(50, 20)
    (tmp_path / "rag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = {"prompt": "Context: {context}\n\nQuestion: {question}"} if how == "template" else {}
    made = prepare_to_train(tmp_path / "made", [{"path": str(tmp_path / "rag.jsonl"), **template}], model)
    card = made.formatted.card
    assert (card["rows_in"], card["leaked"], card["duplicates"], card["rejected"]) == (1000, 0, 0, 0)
    assert card["train"] + card["heldout"] == 1000 and 50 <= card["heldout"] <= 200 and card["heldout"] % 20 == 0
    assert "1,000 rows ask about 50 passages" in card["split"] and "50 passages" in made.shown
    held = {number for number in range(50) if passage(number) in str(made.formatted.heldout)}
    assert not any(passage(number) in text for number in held for text in made.texts)
    by_question = {row["question"]: row for row in rows}
    for text, learnt in zip(made.texts, made.learnt, strict=True):
        row = next(row for question, row in by_question.items() if question in text)
        assert row["context"] in text and learnt == f"{row['answer']}<|im_end|>"


CITIES = ("Oslo", "Rome", "Lima", "Kyiv")


def tool(name, key, type):
    """A tool's definition, with one parameter."""
    return {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": type}}}}}


def tool_rows(count=60):
    """Conversations that call one of two tools, whose arguments have other names and types."""
    rows = []
    for number in range(count):
        city = CITIES[number % 4]
        called = {"name": "convert", "arguments": {"amount": number}}
        if number % 2:
            called = {"name": "weather", "arguments": {"city": city, "days": number}}
        messages = [
            {"role": "user", "content": f"Number {number} for {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]},
            {"role": "tool", "content": f"{number} it is", "name": called["name"]},
            {"role": "assistant", "content": f"It is {number}."},
        ]
        rows.append(
            {"messages": messages, "tools": [tool("weather", "city", "string"), tool("convert", "amount", "number")]}
        )
    return rows


@pytest.mark.parametrize("form", ["objects", "text", "structs"])
def test_tool_calls_in_a_parquet_that_datasets_wrote(tmp_path, model, form):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = tool_rows()
    for row in rows:
        called = row["messages"][1]["tool_calls"][0]["function"]
        if form == "text":
            called["arguments"] = json.dumps(called["arguments"])
    expected = {row["messages"][0]["content"]: row["messages"][1]["tool_calls"][0]["function"] for row in rows}
    path = tmp_path / "calls.parquet"
    if form == "structs":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    made = prepare_to_train(tmp_path / "made", [{"path": str(path)}], model)
    card = made.formatted.card
    assert card["train"] + card["heldout"] == 60 and made.tokenize["rejected_count"] == 0
    for text, learnt in zip(made.texts, made.learnt, strict=True):
        asked = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        called, answer, _ = learnt.split("<|im_end|>")
        found = json.loads(called.removeprefix("<call>").removesuffix("</call>"))
        arguments = expected[asked]["arguments"]
        assert found["name"] == expected[asked]["name"]
        assert found["arguments"] == (json.loads(arguments) if isinstance(arguments, str) else arguments)
        assert answer == f"It is {asked.split()[1]}." and "null" not in text and "None" not in text
        assert text.count('"properties"') == 2
