"""What only some systems have."""

import sys

import pytest

# By the system, not by what is installed: on Linux a ScaNN that is missing or broken must fail.
needs_scann = pytest.mark.skipif(sys.platform != "linux", reason="scann has wheels for Linux only")
