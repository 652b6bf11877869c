#!/usr/bin/env bash
# bash runs/test.sh         the tests (under 10 minutes on 2 cores)
# bash runs/test.sh slow    the slow proofs
set -euo pipefail
. "$(dirname "$0")/install.sh"
# one thread a process: several processes at once are the parallelism here
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${1:-}" = slow ]; then shift; set -- --slow "$@"; fi
exec python -m pytest -q -n "${TEST_PROCESSES:-2}" --durations=10 tests "$@"
