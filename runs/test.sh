#!/usr/bin/env bash
# bash runs/test.sh         the tests (under 10 minutes on 2 cores)
# bash runs/test.sh slow    the slow proofs
set -euo pipefail
. "$(dirname "$0")/install.sh"
# one thread a process: several processes at once are the parallelism here
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
processes=2
if [ "${1:-}" = slow ]; then shift; set -- --slow "$@"; processes=0; fi  # one after the other: some take all cores
exec python -m pytest -q -n "$processes" --durations=10 tests "$@"
