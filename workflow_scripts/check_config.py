"""Say in one sentence what is wrong with configuration files as files, before Snakemake reads them (`make`).

Usage: python workflow_scripts/check_config.py [CONFIG.yaml ...]
"""

import sys

from adder.core.errors import UserError
from adder.workflow import config_file

try:
    for name in sys.argv[1:]:
        config_file.read(name)
except UserError as error:
    sys.exit(f"adder: {error}")
