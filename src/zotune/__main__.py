"""`python -m zotune` is the command `zotune`."""

from __future__ import annotations

import sys

from zotune.cli.main import main

sys.exit(main())
