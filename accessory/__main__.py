"""`python -m accessory`: the console command without an installation.

Must not do anything of its own; cli does it.
"""

import sys

from accessory.cli import main

sys.exit(main())
