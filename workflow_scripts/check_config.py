"""Say in one sentence what is wrong with configuration files as files, before Snakemake reads them (`make`).

Usage: python workflow_scripts/check_config.py [CONFIG.yaml ...]
"""

import sys

from adder import config_file
from adder.errors import UserError

try:
    for name in sys.argv[1:]:
        config_file.read(name)
except UserError as error:
    sys.exit(f"adder: {error}")
