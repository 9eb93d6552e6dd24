"""`python -m zipperasr.cli`: the same as `zipperasr`, for launchers such as torchrun."""

import sys

from zipperasr.cli.main import main

sys.exit(main())
