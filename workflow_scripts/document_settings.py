"""Write config/schema.json and the tables in config/README.md from the settings' model (`make settings`)."""

from pathlib import Path

from adder.workflow.settings_docs import filled, schema

config = Path(__file__).resolve().parents[1] / "config"
(config / "schema.json").write_text(schema())
page = config / "README.md"
page.write_text(filled(page.read_text()))
