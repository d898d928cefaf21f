#!/usr/bin/env bash
# What a machine with a GPU has to say, in one command: tests on the device, the kernels' bandwidth, c(rows),
# the engines end to end.
#
#     OUT=results bash bench/gpu_check.sh
#
# Logs, JSON and summary.txt go to $OUT. Nothing is installed: the package is laid out in a temporary folder, from this
# checkout. Python ($PYTHON, python3 by default) must have torch, triton, diffusers, transformers, pytest and hypothesis.
# A kernel is not timed while its tests are red. Every step has a time limit, and all of them $BUDGET seconds (530 by
# default), so that the whole ends within nine minutes: what is cut short leaves what it had. Without a GPU it runs
# through all the same, on small networks: that it runs is all that shows.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results/latest}
budget=${BUDGET:-530}
mkdir -p "$out"
out=$(cd "$out" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r srds_fast "$site/"
cp -r kernels "$site/srds_fast/kernels"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

failed=0
step() { # name, seconds at most, command...
  local name=$1 seconds=$2 left=$((budget - SECONDS))
  shift 2
  local started=$SECONDS
  # a limit of 0 would be none
  seconds=$((left < 1 ? 1 : left < seconds ? left : seconds))
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    echo "$name: passed, $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  else
    echo "$name: FAILED ($?), $((SECONDS - started)) s; see $name.log" | tee -a "$out/summary.txt"
    failed=1
    return 1
  fi
}

: >"$out/summary.txt"
{
  git log -1 --format='commit %H' 2>/dev/null
  $python -m srds_fast.cli env
} >>"$out/summary.txt" 2>&1

pytest="$python -m pytest -q -p no:cacheprovider"
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  step kernel_tests 150 $pytest tests/kernels && kernels_green=1
else
  TRITON_INTERPRET=1 step kernel_tests 150 $pytest tests/kernels && kernels_green=1
fi
if [ -n "${kernels_green:-}" ]; then
  step kernels 150 $python bench/kernels.py --json "$out/kernels.json"
else
  echo "kernels: not timed, their tests are red" | tee -a "$out/summary.txt"
fi
step rows 150 $python bench/rows.py --json "$out/rows.json" ${ROWS:+--rows $ROWS}
step gpu_tests 240 $pytest -m gpu tests/test_gpu.py tests/test_gpu_graphs.py tests/test_gpu_methods.py
step engines 150 $python bench/engines.py --repeat 3 --json "$out/engines.json"

for name in kernels rows engines; do
  [ -f "$out/$name.log" ] && { echo; grep -v -i 'warning\|should be kept in float32\|Loading' "$out/$name.log"; } >>"$out/summary.txt"
done
for name in kernel_tests gpu_tests; do
  [ -f "$out/$name.log" ] && { echo; echo "$name:"; grep -E '^(FAILED|ERROR)|passed|failed|skipped' "$out/$name.log" | tail -40; } >>"$out/summary.txt"
done
cat "$out/summary.txt"
exit "$failed"
