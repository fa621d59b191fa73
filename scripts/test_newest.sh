#!/usr/bin/env bash
# The test suite with the newest releases of everything that setup.cfg permits, in an environment of its own.
#
#     scripts/test_newest.sh                          # the whole suite
#     scripts/test_newest.sh tests/training -k resume # options and files for pytest
#     BEYOND=1 scripts/test_newest.sh                 # Transformers and Accelerate beyond the bounds of setup.cfg, too
#     TORCH=newest scripts/test_newest.sh             # torch too: on Linux that brings gigabytes of CUDA
#
# ENVIRONMENT names the folder of the environment; one that is there is brought up to date. What differs from the tested
# versions of constraints.txt is printed first. Once the suite passes: bounds in setup.cfg, TESTED in private_api.py.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${ENVIRONMENT:-${TMPDIR:-/tmp}/hf_compressm_newest}
torch=$(grep '^torch==' constraints.txt)
[ "${TORCH:-}" = newest ] && torch=torch

python3 -m venv "$environment"
. "$environment/bin/activate"
pip install --quiet --upgrade --upgrade-strategy eager -e ".[test]" "$torch"
if [ -n "${BEYOND:-}" ]; then
    pip install --quiet --upgrade transformers accelerate
fi

echo "Beside constraints.txt:"
grep -vxFf <(grep == constraints.txt) <(pip list --format freeze --exclude-editable --exclude pip | sed "s/+cpu$//") || echo "nothing differs"
python -m pytest "$@"
