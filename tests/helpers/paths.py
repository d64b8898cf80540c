"""Where things lie: the repository, the tests, and their helpers, which tests start as scripts of their own."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
