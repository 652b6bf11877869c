#!/usr/bin/env bash
# bash runs/test.sh         the tests (under 10 minutes on 2 cores)
# bash runs/test.sh slow    the slow proofs
set -euo pipefail
. "$(dirname "$0")/install.sh"
# one thread a process: several processes at once are the parallelism here
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${1:-}" != slow ]; then exec python -m pytest -q -n 2 --durations=10 tests "$@"; fi
shift
# the documents' commands two pages at a time; 5: "$@" chooses none of them
python -m pytest -q --slow -n 2 --durations=10 tests/test_readme.py "$@" || [ $? = 5 ]
# the rest one after the other: some take all cores
exec python -m pytest -q --slow -n 0 --durations=10 tests --ignore=tests/test_readme.py "$@"
