"""What several test files need. Test files import from here and never from one another."""

from pathlib import Path

import pytest


# An `assert` here says as much as one in a test.
pytest.register_assert_rewrite(*(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("*.py")))
