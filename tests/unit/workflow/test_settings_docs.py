"""The settings' tables tell values, bounds and defaults as the model has them."""

from adder.workflow.settings_docs import schema, tables


def test_a_setting_has_a_row_with_values_default_and_meaning():
    text = tables()
    assert "| `train.learning_rate` | number, > 0, < 1 | `0.0001` | Peak learning rate. |" in text
    assert "| `model.source` | text | must be set |" in text
    assert "`train.reshuffle`" not in text and "`lengths.reshuffle`" in text  # where people set it


def test_a_list_of_sections_is_shown_once():
    text = tables()
    assert text.count("### data.sources[]") == 1 and text.count(".weight` |") == 1


def test_the_schema_is_json_with_sorted_keys():
    assert schema().endswith("}\n") and schema().index('"$defs"') < schema().index('"properties"')
